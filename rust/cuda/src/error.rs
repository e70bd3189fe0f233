//! The one error type of this crate. A message says what was asked, what came, and the mend.

/// Result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong. The binding maps the variants to its own exception classes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The driver library is not on this machine.
    #[error(
        "no NVIDIA driver: {library} cannot be loaded ({reason}); install the driver of the GPU, version 525 or later"
    )]
    NoDriver {
        /// Name of the library.
        library: &'static str,
        /// What the loader said.
        reason: String,
    },
    /// The driver is too old: it lacks a function that this crate calls.
    #[error("the NVIDIA driver lacks {name}; ferrolora needs CUDA 12.0 or later, that is driver 525 or later")]
    OldDriver {
        /// The function.
        name: &'static str,
    },
    /// A call of the driver failed.
    #[error("{call} failed with {name} ({code}): {text}; {place}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// Its status.
        code: i32,
        /// The status' name, such as `CUDA_ERROR_INVALID_VALUE`.
        name: String,
        /// What the driver says of it.
        text: String,
        /// What was being done.
        place: String,
    },
    /// No kernel for this problem on this device.
    #[error("{op}: no kernel for {problem}: {reason}")]
    Refused {
        /// The operator.
        op: &'static str,
        /// Shape, types, codec and device, readable.
        problem: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A value outside a closed set.
    #[error("{what} must be one of {allowed}, got {got}")]
    Unknown {
        /// Which parameter.
        what: &'static str,
        /// The valid values, readable.
        allowed: String,
        /// What came.
        got: String,
    },
    /// An argument that does not fit what the plan says of it.
    #[error("{kernel}: {name} must be {expected}, got {got}")]
    Argument {
        /// The kernel.
        kernel: &'static str,
        /// Which of its parameters.
        name: &'static str,
        /// What it must be.
        expected: String,
        /// What came.
        got: String,
    },
}
