//! K3: products on the tensor cores, forward and backward, over one layout of the weight.

use super::{four_bit, multiple, tensor_cores};
use crate::device::{Device, STATIC_SHARED};
use crate::plan::{Choice, Reason, splits};
use crate::problem::Problem;

/// Depth of a tile.
const STEP: u64 = 64;
/// The oldest architecture whose copies run beside the products.
const ASYNC_COPIES: u32 = 80;

/// Tile of the output and the warps that share it, rows first.
#[derive(Clone, Copy)]
struct Tile {
    m: u64,
    n: u64,
    warps_m: u64,
    warps_n: u64,
}

/// The tiles, the largest first; each warp has 16 to 64 rows and 32 or 64 columns.
const TILES: [Tile; 5] = [
    Tile { m: 128, n: 128, warps_m: 2, warps_n: 4 },
    Tile { m: 64, n: 128, warps_m: 2, warps_n: 2 },
    Tile { m: 32, n: 128, warps_m: 1, warps_n: 4 },
    Tile { m: 16, n: 128, warps_m: 1, warps_n: 4 },
    Tile { m: 16, n: 64, warps_m: 1, warps_n: 2 },
];

/// Steps in shared memory, the most first: one is multiplied, one decoded, the rest are on their way.
fn stages(device: Device) -> &'static [u64] {
    if device.sm >= ASYNC_COPIES { &[4, 3] } else { &[3] }
}

pub(crate) fn takes_forward(problem: &Problem, device: Device) -> Result<(), Reason> {
    tensor_cores(problem, device)?;
    four_bit(problem)?;
    multiple("k", problem.k, STEP)
}

pub(crate) fn takes_backward(problem: &Problem, device: Device) -> Result<(), Reason> {
    tensor_cores(problem, device)?;
    four_bit(problem)?;
    multiple("n", problem.n, 8)?;
    multiple("k", problem.k, 32)
}

pub(crate) fn forward(problem: &Problem, device: Device) -> Result<Choice, Reason> {
    takes_forward(problem, device)?;
    let scales = if problem.block_size == 32 { 24 } else { 12 };
    choose("gemm_4bit", (problem.m, problem.n, problem.k), device, scales)
}

pub(crate) fn backward(problem: &Problem, device: Device) -> Result<Choice, Reason> {
    takes_backward(problem, device)?;
    choose("gemm_4bit_backward", (problem.m, problem.k, problem.n), device, 24)
}

/// The largest tile that the rows fill and the device holds, for an output of `rows` by `cols` summed over `depth`, with
/// `scales` bytes of scales a column of the tile.
fn choose(
    entry: &'static str,
    (rows, cols, depth): (u64, u64, u64),
    device: Device,
    scales: u64,
) -> Result<Choice, Reason> {
    let shared = |tile: Tile, stages| stages * (tile.m * 128 + tile.n * 32) + tile.n * (256 + scales);
    let most = u64::from(device.shared_per_block - STATIC_SHARED);
    let filled = |tile: &&Tile| tile.m == 16 || tile.m < 2 * rows;
    let wide_enough = |tile: &&Tile| tile.n <= 64 || cols > 64;
    for tile in TILES.iter().filter(filled).filter(wide_enough) {
        let deepest = stages(device).iter().find(|stages| shared(*tile, **stages) <= most);
        let Some(stages) = deepest else { continue };
        let (across, down) = (cols.div_ceil(tile.n), rows.div_ceil(tile.m));
        return Ok(Choice {
            entry,
            constants: vec![
                ("FL_TILE_M", tile.m),
                ("FL_TILE_N", tile.n),
                ("FL_WARPS_M", tile.warps_m),
                ("FL_WARPS_N", tile.warps_n),
                ("FL_STAGES", *stages),
            ],
            grid: [across, down, splits(across * down, depth, 4 * STEP, device)],
            threads: 32 * (tile.warps_m * tile.warps_n) as u32,
            shared: shared(*tile, *stages),
        });
    }
    Err(format!("no tile fits the {} bytes of shared memory of sm_{}", device.shared_per_block, device.sm))
}
