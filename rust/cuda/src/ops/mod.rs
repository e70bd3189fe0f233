//! One family of kernels a file: what it takes, and the geometry of its launch.
#![allow(clippy::unnecessary_wraps)] // every choice has the type of a candidate, also where nothing is refused

pub(crate) mod dequantize;
pub(crate) mod fma;
pub(crate) mod gemm;
pub(crate) mod gemv;
pub(crate) mod lora;
pub(crate) mod quantize;

use crate::device::Device;
use crate::plan::Reason;
use crate::problem::{Problem, Type};

/// The oldest architecture with a tensor core for bfloat16.
const BF16_TENSOR_CORE: u32 = 80;

/// Whether the tensor cores multiply the type of the activations.
fn tensor_cores(problem: &Problem, device: Device) -> Result<(), Reason> {
    match problem.dtype {
        Type::F16 => Ok(()),
        Type::Bf16 if device.sm >= BF16_TENSOR_CORE => Ok(()),
        Type::Bf16 => Err(format!("bfloat16 needs sm_{BF16_TENSOR_CORE} or newer; use float16")),
        other => Err(format!("the tensor cores take float16 and bfloat16, not {other}")),
    }
}

/// Whether the weight has 4 bits.
fn four_bit(problem: &Problem) -> Result<(), Reason> {
    if problem.is_4bit() { Ok(()) } else { Err(format!("it decodes nf4 and fp4, not {}", problem.codec)) }
}

/// Whether a size is a multiple of what a kernel reads at once.
fn multiple(what: &str, size: u64, of: u64) -> Result<(), Reason> {
    if size.is_multiple_of(of) { Ok(()) } else { Err(format!("{what} must be a multiple of {of}, not {size}")) }
}
