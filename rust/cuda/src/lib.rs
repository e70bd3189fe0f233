//! The CUDA kernels: which one solves a problem, and how it is loaded and launched.
//!
//! This crate knows nothing of Python and torch. Memory and streams are the caller's; nothing is allocated on a device
//! and nothing waits for one. Everything but the driver runs and is tested on a machine without a GPU.
//!
//! | module | concept |
//! |---|---|
//! | [`kernels`] | THE table of kernels |
//! | [`source`] | their text |
//! | [`problem`] | what is to be computed |
//! | [`plan`] | problem and device to kernel, constants, grid, shared memory and arguments |
//! | [`policy`] | which way wins for how many rows |
//! | `ops` | what each family of kernels takes |
//! | [`device`] | architectures and their limits |
//! | [`driver`] | `libcuda.so.1` behind a trait |
//! | [`module`] | loaded cubins |
//! | [`launch`] | tensors to parameters to a launch |

pub mod device;
pub mod driver;
pub mod error;
pub mod kernels;
pub mod launch;
#[cfg(test)]
mod mock;
pub mod module;
mod ops;
pub mod plan;
pub mod policy;
pub mod problem;
pub mod source;

pub use error::{Error, Result};
