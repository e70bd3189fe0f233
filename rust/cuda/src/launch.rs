//! From a plan and the caller's tensors to the parameters of a kernel.
#![allow(unsafe_code)]

use crate::driver::{Driver, Stream};
use crate::module::{Loaded, within};
use crate::plan::{Argument, Launch};
use crate::problem::Type;
use crate::{Error, Result};

/// Every pointer of a kernel is a multiple of this: it loads and stores 16 bytes at once.
pub const ALIGNMENT: u64 = 16;

/// A contiguous tensor on the kernel's device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// Address of its first element.
    pub address: u64,
    /// Type of its elements.
    pub dtype: Type,
    /// Number of its elements.
    pub numel: u64,
}

/// What the caller gives for an argument that the plan leaves open.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Given {
    /// For [`Argument::Tensor`].
    Tensor(Tensor),
    /// For [`Argument::Number`].
    Number(f32),
}

impl std::fmt::Display for Given {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tensor(tensor) => write!(f, "{} {} at {:#x}", tensor.numel, tensor.dtype, tensor.address),
            Self::Number(value) => write!(f, "{value}"),
        }
    }
}

/// Memory on the kernel's device that the caller lends for the launch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lent {
    /// Address and bytes of uninitialised memory.
    pub scratch: (u64, u64),
    /// Address of words that are zero, and their number.
    pub counters: (u64, u64),
}

/// The parameters of the kernel: what the plan fixes, what `given` has for the names it leaves open, and lent memory.
///
/// # Errors
/// [`Error::Argument`] if something is missing or not what the plan says.
pub fn marshal(launch: &Launch, lent: Lent, given: impl Fn(&str) -> Option<Given>) -> Result<Vec<u64>> {
    let kernel = launch.row.entry;
    let wrong = |name: &'static str, expected: String, got: String| Error::Argument { kernel, name, expected, got };
    let enough = |name, what: &str, (address, has): (u64, u64), needs: u64| {
        let fits = has >= needs && (needs == 0 || address != 0) && address.is_multiple_of(ALIGNMENT);
        if fits { Ok(()) } else { Err(wrong(name, format!("{needs} {what}"), format!("{has} at {address:#x}"))) }
    };
    enough("scratch", "bytes of scratch memory", lent.scratch, launch.scratch_bytes())?;
    enough("counters", "words of 32 bits", lent.counters, launch.counters())?;
    let mut scratch = lent.scratch.0;
    let mut parameters = Vec::with_capacity(launch.arguments.len());
    for (name, argument) in launch.named() {
        parameters.push(match argument {
            Argument::Fixed(bits) => *bits,
            Argument::Counters { .. } => lent.counters.0,
            Argument::Scratch { .. } => {
                let own = scratch;
                scratch += argument.scratch_bytes();
                own
            }
            open => {
                let value = given(name).ok_or_else(|| wrong(name, open.to_string(), "None".to_owned()))?;
                bits(open, value).ok_or_else(|| wrong(name, open.to_string(), value.to_string()))?
            }
        });
    }
    Ok(parameters)
}

/// The bits of what is given for an argument, if it fits.
fn bits(argument: &Argument, given: Given) -> Option<u64> {
    match (argument, given) {
        (Argument::Tensor { dtype, numel }, Given::Tensor(tensor)) => {
            let fits = tensor.dtype == *dtype && tensor.numel == *numel && tensor.address.is_multiple_of(ALIGNMENT);
            (fits && tensor.address != 0).then_some(tensor.address)
        }
        (Argument::Number, Given::Number(value)) => Some(u64::from(value.to_bits())),
        _ => None,
    }
}

/// Launches a loaded kernel on the caller's stream. Nothing is allocated on the device and nothing waits.
///
/// Addresses are taken at the caller's word, as every launcher takes them: each tensor and the lent memory are on the
/// device that the kernel was loaded for, as large as they say, and stay until the stream has passed the launch. The
/// binding keeps that word: it takes them from torch tensors, whose allocator reuses memory in the order of the stream.
///
/// # Errors
/// [`Error::Argument`] as [`marshal`]; the driver's.
pub fn launch(
    driver: &dyn Driver,
    loaded: Loaded,
    launch: &Launch,
    stream: Stream,
    lent: Lent,
    given: impl Fn(&str) -> Option<Given>,
) -> Result<()> {
    let parameters = marshal(launch, lent, given)?;
    within(driver, loaded.context, || {
        // SAFETY: `marshal` gives one value for each parameter of the row, whose order and types a test compares with
        // the source's entry, and has checked each tensor's type, length and alignment against the plan; that the
        // addresses are what they say, the caller promises (above).
        unsafe { driver.launch(loaded.kernel, launch.geometry, stream, &parameters) }
    })
}

#[cfg(test)]
mod tests;
