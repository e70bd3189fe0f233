//! What the module says of itself.

use ferrolora_core::codec::codebook::{dynamic8, fp4, nf4};
use ferrolora_core::simd::IsaKind;
use pyo3::prelude::*;

use crate::error::{map, raise};

/// Version of the crate, the same as the package's.
#[pyfunction]
fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Instruction set of the kernels: the best of this machine, or the one `FERROLORA_ISA` names.
#[pyfunction]
fn isa(py: Python<'_>) -> PyResult<&'static str> {
    IsaKind::detect().map(IsaKind::name).map_err(|error| map(py, &error))
}

/// Instruction sets of this machine, the plainest first.
#[pyfunction]
fn available_isas() -> Vec<&'static str> {
    IsaKind::all().into_iter().map(IsaKind::name).collect()
}

/// Value of each code of "nf4", "fp4" or "dynamic8".
#[pyfunction]
fn codebook(py: Python<'_>, name: &str) -> PyResult<Vec<f32>> {
    match name {
        "nf4" => Ok(nf4::VALUES.to_vec()),
        "fp4" => Ok(fp4::VALUES.to_vec()),
        "dynamic8" => Ok(dynamic8::map().values.to_vec()),
        other => {
            let message = format!("codebook must be one of nf4, fp4, dynamic8, got {other:?}");
            Err(raise(py, "UnsupportedError", message))
        }
    }
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(version, module)?)?;
    module.add_function(wrap_pyfunction!(isa, module)?)?;
    module.add_function(wrap_pyfunction!(available_isas, module)?)?;
    module.add_function(wrap_pyfunction!(codebook, module)?)
}
