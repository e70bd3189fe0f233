//! The module `ferrolora._native`.
//!
//! Every function does four things: converts its arguments, releases the interpreter, calls the core,
//! and maps the error. Outputs are tensors that the caller allocated.
//! Those of `cuda` ask the crate `ferrolora-cuda` instead of the core.

mod buffer;
mod cuda;
mod error;
mod info;
mod linear;
mod linear_group;
#[cfg(target_os = "linux")]
mod openmp;
mod quantize;
mod weight;

use pyo3::prelude::*;

/// Kernels of ferrolora.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    #[cfg(target_os = "linux")]
    openmp::register();
    info::register(module)?;
    quantize::register(module)?;
    linear::register(module)?;
    linear_group::register(module)?;
    cuda::register(module)
}
