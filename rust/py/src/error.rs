//! Core errors to the exception classes of `ferrolora.errors`.

use ferrolora_core::Error;
use pyo3::prelude::*;
use pyo3::types::PyType;

/// Makes an instance of `ferrolora.errors.<class>`, or the error that importing it gave.
pub fn raise(py: Python<'_>, class: &str, message: String) -> PyErr {
    let class = py
        .import("ferrolora.errors")
        .and_then(|module| module.getattr(class))
        .and_then(|class| class.cast_into::<PyType>().map_err(PyErr::from));
    match class {
        Ok(class) => PyErr::from_type(class, message),
        Err(error) => error,
    }
}

/// Maps a core error to its class.
pub fn map(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error {
        Error::Length { .. } => "ShapeError",
        Error::NonFinite { .. } => "QuantizationError",
        Error::Type { .. } | Error::Range { .. } | Error::Unknown { .. } => "UnsupportedError",
    };
    raise(py, class, error.to_string())
}

/// Runs `work` without the interpreter and maps its error.
pub fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> ferrolora_core::Result<T> + Send) -> PyResult<T> {
    py.detach(work).map_err(|error| map(py, &error))
}
