//! Quantization, packing and fused dequantize-matmul-plus-LoRA kernels.
//!
//! This crate knows nothing of Python, CUDA or torch. Bytes come in as slices, bytes go out as
//! slices; every length is validated once, in the constructor of the type that carries the value.
//!
//! | module | concept |
//! |---|---|
//! | [`codec`] | float tensor to 4- or 8-bit codes and back |
//! | [`linear`] | `y = x·deq(W)ᵀ` with an optional low-rank branch, and its backward |
//! | [`reference`] | slow readable twins of both, the oracles of the tests |
//! | `simd` | the instruction sets behind one trait |
//! | [`parallel`] | the thread pool; results never depend on its size |

pub mod codec;
pub mod dtype;
pub mod error;
pub mod exec;
pub mod linear;
pub mod parallel;
pub mod reference;
pub mod simd;

pub use error::{Error, Result};
pub use exec::Exec;

// A module of the unit tests, not a test of its own: that would compile this crate a second time, for minutes.
#[cfg(test)]
extern crate self as ferrolora_core;
#[cfg(test)]
#[path = "../../../tests/rust/golden.rs"]
mod golden;
