//! K2: a product with a few rows, bound by reading the weight.

use super::{four_bit, multiple, tensor_cores};
use crate::device::Device;
use crate::plan::{Choice, Reason, splits};
use crate::problem::Problem;

/// The most rows.
pub(crate) const MAX_ROWS: u64 = 8;
/// Rows of the weight in a tile.
const TILE_ROWS: u64 = 16;
/// Columns that a warp decodes under one scale, at most.
const MAX_STEP: u64 = 128;
const WARPS: u64 = 4;

pub(crate) fn takes(problem: &Problem, device: Device) -> Result<(), Reason> {
    tensor_cores(problem, device)?;
    four_bit(problem)?;
    multiple("k", problem.k, problem.block_size.min(MAX_STEP))?;
    if problem.exact {
        return Err("it multiplies rounded table values; exact products are the GEMM's".to_owned());
    }
    if problem.m > MAX_ROWS {
        return Err(format!("m must be at most {MAX_ROWS}, not {}", problem.m));
    }
    Ok(())
}

pub(crate) fn forward(problem: &Problem, device: Device) -> Result<Choice, Reason> {
    takes(problem, device)?;
    // Two tiles a block share the loads of x, once there are blocks enough.
    let enough = problem.n / (2 * TILE_ROWS) >= 4 * u64::from(device.sm_count);
    let tiles = if enough { 2 } else { 1 };
    let blocks = problem.n.div_ceil(TILE_ROWS * tiles);
    let parts = splits(blocks, problem.k, WARPS * MAX_STEP, device);
    // Where memory is fast, four permutes a byte do not keep up with it, and a table of 32 KB does.
    let pair_table = matches!(device.sm, 80 | 87 | 90 | 100 | 103 | 110);
    Ok(Choice {
        entry: "gemv_4bit",
        constants: vec![("FL_PAIR_TABLE", u64::from(pair_table)), ("FL_WARPS", WARPS), ("FL_TILES", tiles)],
        grid: [blocks, 1, parts],
        threads: 32 * WARPS as u32,
        shared: 0,
    })
}
