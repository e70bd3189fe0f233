//! The one error type of the core. A message says what was expected, what came, and where.

use crate::dtype::DType;

/// Result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong. Bindings map the variants to their own exception classes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A buffer or matrix does not have the size that its description asks for.
    #[error("{what}: expected {expected} elements, got {got}")]
    Length {
        /// Which argument.
        what: &'static str,
        /// Elements the other arguments imply.
        expected: usize,
        /// Elements that came.
        got: usize,
    },
    /// A tensor holds NaN or infinity and therefore cannot be quantized.
    #[error(
        "{name} holds {count} NaN or infinite value(s), the first at flat index {first}; {mend}",
        mend = "clean the weight before quantizing it"
    )]
    NonFinite {
        /// Name of the tensor, as the caller knows it.
        name: String,
        /// How many values are not finite.
        count: usize,
        /// Flat row-major index of the first.
        first: usize,
    },
    /// A value outside the closed set that a parameter allows.
    #[error("{what} must be one of {allowed}, got {got}")]
    Unknown {
        /// Which parameter.
        what: &'static str,
        /// The valid values, readable.
        allowed: &'static str,
        /// What came.
        got: String,
    },
    /// Two buffers that must have one float type.
    #[error("{what} must have the type of {of}, {expected}, got {got}")]
    Type {
        /// Which argument.
        what: &'static str,
        /// The argument that decides the type.
        of: &'static str,
        /// Its type.
        expected: DType,
        /// What came.
        got: DType,
    },
    /// A number outside its range.
    #[error("{what} must be {expected}, got {got}")]
    Range {
        /// Which parameter.
        what: &'static str,
        /// The range, readable.
        expected: &'static str,
        /// What came.
        got: String,
    },
}

/// Fails with [`Error::Length`] unless `got == expected`.
pub(crate) fn check_len(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::Length { what, expected, got }) }
}

/// Fails with [`Error::Range`] at the first value that is NaN or infinite.
pub(crate) fn check_finite(what: &'static str, values: &[f32]) -> Result<()> {
    // Without a way out of the loop it is one of vectors.
    if values.iter().fold(true, |all, value| all & value.is_finite()) {
        return Ok(());
    }
    let at = values.iter().position(|value| !value.is_finite()).expect("one was found");
    Err(Error::Range { what, expected: "finite", got: format!("{} at index {at}", values[at]) })
}

/// Fails with [`Error::Length`] unless `got == rows · cols`. A product beyond `usize` fits no buffer.
pub(crate) fn check_matrix(what: &'static str, (rows, cols): (usize, usize), got: usize) -> Result<()> {
    check_len(what, rows.saturating_mul(cols), got)
}
