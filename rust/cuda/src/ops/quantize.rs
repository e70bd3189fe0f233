//! K1: floats to codes and scales, and scales to codes and scales.

use super::four_bit as require_4bit;
use crate::device::Device;
use crate::plan::{Choice, Reason};
use crate::problem::{Codec, Problem};

const THREADS: u32 = 256;

pub(crate) fn four_bit(problem: &Problem, _: Device) -> Result<Choice, Reason> {
    require_4bit(problem)?;
    let values = (8 * problem.block_size).max(2048);
    let grid = [problem.numel().div_ceil(values), 1, 1];
    Ok(Choice { entry: "quantize_4bit", constants: vec![], grid, threads: THREADS, shared: 0 })
}

pub(crate) fn int8(problem: &Problem, _: Device) -> Result<Choice, Reason> {
    if problem.codec != Codec::Int8 {
        return Err(format!("it makes int8, not {}", problem.codec));
    }
    Ok(Choice { entry: "quantize_int8", constants: vec![], grid: [problem.n, 1, 1], threads: THREADS, shared: 0 })
}

pub(crate) fn absmax_mean(_: &Problem, _: Device) -> Result<Choice, Reason> {
    Ok(Choice { entry: "absmax_mean", constants: vec![], grid: [1, 1, 1], threads: 1024, shared: 0 })
}

pub(crate) fn absmax(problem: &Problem, _: Device) -> Result<Choice, Reason> {
    let grid = [problem.blocks().div_ceil(2048), 1, 1];
    Ok(Choice { entry: "quantize_absmax", constants: vec![], grid, threads: THREADS, shared: 0 })
}
