//! K4: the low-rank branch on the tensor cores.

use super::{multiple, tensor_cores};
use crate::device::Device;
use crate::plan::{Choice, Reason, splits};
use crate::problem::Problem;

const THREADS: u32 = 128;
/// Side of an output tile, and the columns of S that a block has.
const TILE: u64 = 64;
/// Rows and columns of the part of x or dY that a block reads, the largest first.
const PARTS: [(u64, u64); 6] = [(512, 256), (256, 256), (128, 256), (128, 128), (64, 128), (64, 64)];
/// Above this rank a block's part of A or B leaves room for half as many columns.
const WIDE_RANK: u64 = 48;
const MOST_COLUMNS_WIDE: u64 = 128;

/// What the products of the branch alone need.
fn takes(problem: &Problem, device: Device) -> Result<(), Reason> {
    tensor_cores(problem, device)?;
    multiple("k", problem.k, 8)?;
    multiple("n", problem.n, 8)
}

/// What adding the branch to a product needs.
pub(crate) fn takes_add(problem: &Problem, device: Device) -> Result<(), Reason> {
    tensor_cores(problem, device)
}

fn choice(entry: &'static str, grid: [u64; 3]) -> Choice {
    Choice { entry, constants: vec![], grid, threads: THREADS, shared: 0 }
}

pub(crate) fn input(problem: &Problem, device: Device) -> Result<Choice, Reason> {
    takes(problem, device)?;
    let (across, down) = (problem.rank.div_ceil(TILE), problem.m.div_ceil(TILE));
    let parts = splits(across * down, problem.k, 4 * TILE, device);
    Ok(choice("lora_input", [across, down, parts]))
}

pub(crate) fn output_gradients(problem: &Problem, device: Device) -> Result<Choice, Reason> {
    takes(problem, device)?;
    Ok(gradients("lora_output_gradients", problem, problem.n, device))
}

pub(crate) fn input_gradient(problem: &Problem, device: Device) -> Result<Choice, Reason> {
    takes(problem, device)?;
    Ok(gradients("lora_input_gradient", problem, problem.k, device))
}

/// The largest parts of an `[m, width]` matrix that still give every multiprocessor one.
fn gradients(entry: &'static str, problem: &Problem, width: u64, device: Device) -> Choice {
    let grid = |(rows, columns)| [width.div_ceil(columns), problem.m.div_ceil(rows), problem.rank.div_ceil(TILE)];
    let fills = |part: &&(u64, u64)| grid(**part).iter().product::<u64>() >= u64::from(device.sm_count);
    let widest = if problem.rank > WIDE_RANK { MOST_COLUMNS_WIDE } else { u64::MAX };
    let held = PARTS.iter().filter(|(_, columns)| *columns <= widest);
    let (rows, columns) = held.clone().find(fills).copied().unwrap_or((TILE, TILE));
    Choice { constants: vec![("FL_ROWS", rows), ("FL_COLUMNS", columns)], ..choice(entry, grid((rows, columns))) }
}

pub(crate) fn add_input_gradient(problem: &Problem, device: Device) -> Result<Choice, Reason> {
    takes_add(problem, device)?;
    let grid = [problem.k.div_ceil(TILE), problem.m.div_ceil(TILE), 1];
    Ok(choice("lora_add_input_gradient", grid))
}

pub(crate) fn add_output(problem: &Problem, device: Device) -> Result<Choice, Reason> {
    takes_add(problem, device)?;
    let grid = [problem.n.div_ceil(TILE), problem.m.div_ceil(TILE), 1];
    Ok(choice("lora_add_output", grid))
}
