//! Every product in plain float32 multiply-adds: any shape, any type, int8, and GPUs without a bfloat16 tensor core.

use crate::device::Device;
use crate::plan::{Choice, Reason, splits};
use crate::problem::Problem;

const THREADS: u32 = 256;
/// Side of an output tile.
const TILE: u64 = 64;
/// The least depth of a part of a split sum.
const LEAST_DEPTH: u64 = 256;

/// A product `[rows, cols]` summed over `depth`.
fn product(entry: &'static str, rows: u64, cols: u64, depth: u64, device: Device) -> Choice {
    let (across, down) = (cols.div_ceil(TILE), rows.div_ceil(TILE));
    let grid = [across, down, splits(across * down, depth, LEAST_DEPTH, device)];
    Choice { entry, constants: vec![], grid, threads: THREADS, shared: 0 }
}

pub(crate) fn forward(problem: &Problem, device: Device) -> Result<Choice, Reason> {
    Ok(product("fma_forward", problem.m, problem.n, problem.k, device))
}

pub(crate) fn backward(problem: &Problem, device: Device) -> Result<Choice, Reason> {
    Ok(product("fma_backward", problem.m, problem.k, problem.n, device))
}

pub(crate) fn lora_input(problem: &Problem, device: Device) -> Result<Choice, Reason> {
    Ok(product("fma_lora_input", problem.m, problem.rank, problem.k, device))
}

pub(crate) fn lora_ds(problem: &Problem, device: Device) -> Result<Choice, Reason> {
    Ok(product("fma_lora_ds", problem.m, problem.rank, problem.n, device))
}

pub(crate) fn lora_db(problem: &Problem, device: Device) -> Result<Choice, Reason> {
    Ok(product("fma_lora_db", problem.n, problem.rank, problem.m, device))
}

pub(crate) fn lora_da(problem: &Problem, device: Device) -> Result<Choice, Reason> {
    Ok(product("fma_lora_da", problem.rank, problem.k, problem.m, device))
}
