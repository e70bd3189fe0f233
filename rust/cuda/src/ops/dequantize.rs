//! K0: a packed weight to floats.

use super::four_bit as require_4bit;
use crate::device::Device;
use crate::plan::{Choice, Reason};
use crate::problem::{Codec, Problem};

/// Values of a block.
const VALUES: u64 = 8192;
const THREADS: u32 = 256;
/// Side of the square that a block transposes.
const TILE: u64 = 64;

pub(crate) fn four_bit(problem: &Problem, _: Device) -> Result<Choice, Reason> {
    require_4bit(problem)?;
    let grid = [problem.numel().div_ceil(VALUES), 1, 1];
    Ok(Choice { entry: "dequantize_4bit", constants: vec![], grid, threads: THREADS, shared: 0 })
}

pub(crate) fn transposed(problem: &Problem, _: Device) -> Result<Choice, Reason> {
    require_4bit(problem)?;
    let grid = [problem.k.div_ceil(TILE), problem.n.div_ceil(TILE), 1];
    Ok(Choice { entry: "dequantize_4bit_transposed", constants: vec![], grid, threads: THREADS, shared: 0 })
}

pub(crate) fn int8(problem: &Problem, _: Device) -> Result<Choice, Reason> {
    if problem.codec != Codec::Int8 {
        return Err(format!("it decodes int8, not {}", problem.codec));
    }
    let grid = [problem.numel().div_ceil(VALUES), 1, 1];
    Ok(Choice { entry: "dequantize_int8", constants: vec![], grid, threads: THREADS, shared: 0 })
}
