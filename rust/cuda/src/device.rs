//! What a device can do: the limits that a plan must keep.

use crate::driver::{Attribute, Driver};
use crate::{Error, Result};

/// The most threads of a block, on every architecture here.
pub const MAX_THREADS: u32 = 1024;
/// The most blocks in y and z, on every architecture here; in x it is 2³¹ - 1.
pub const MAX_GRID_YZ: u32 = 65_535;

/// What a kernel may have in shared memory beside what its launch asks for: the word that tells a block it is the last.
pub const STATIC_SHARED: u32 = 1024;

/// An architecture that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Architecture {
    /// Compute capability, 10 · major + minor.
    pub sm: u32,
    /// Shared memory of a block in bytes, at most. "CUDA C++ Programming Guide", technical specifications.
    pub shared_per_block: u32,
    /// Multiprocessors of a common card, for a plan without a device: T4, A100, A10, 4090, H100, B200, 5090.
    pub common_sm_count: u32,
}

/// Every architecture, the oldest first.
pub const ARCHITECTURES: [Architecture; 11] = [
    Architecture { sm: 75, shared_per_block: 65_536, common_sm_count: 40 },
    Architecture { sm: 80, shared_per_block: 166_912, common_sm_count: 108 },
    Architecture { sm: 86, shared_per_block: 101_376, common_sm_count: 72 },
    Architecture { sm: 87, shared_per_block: 166_912, common_sm_count: 16 },
    Architecture { sm: 89, shared_per_block: 101_376, common_sm_count: 128 },
    Architecture { sm: 90, shared_per_block: 232_448, common_sm_count: 132 },
    Architecture { sm: 100, shared_per_block: 232_448, common_sm_count: 148 },
    Architecture { sm: 103, shared_per_block: 232_448, common_sm_count: 148 },
    Architecture { sm: 110, shared_per_block: 232_448, common_sm_count: 20 },
    Architecture { sm: 120, shared_per_block: 101_376, common_sm_count: 170 },
    Architecture { sm: 121, shared_per_block: 101_376, common_sm_count: 48 },
];

/// A device as a plan sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// Compute capability, 10 · major + minor.
    pub sm: u32,
    /// Number of multiprocessors.
    pub sm_count: u32,
    /// Shared memory of a block in bytes, at most.
    pub shared_per_block: u32,
}

impl Device {
    /// The device of an architecture, with the multiprocessors of a common card unless told otherwise.
    ///
    /// # Errors
    /// [`Error::Unknown`] for an architecture without kernels.
    pub fn of(sm: u32, sm_count: Option<u32>) -> Result<Self> {
        let known = ARCHITECTURES.iter().find(|row| row.sm == sm);
        let row = known.ok_or_else(|| Error::Unknown {
            what: "compute capability",
            allowed: ARCHITECTURES.map(|row| row.sm.to_string()).join(", "),
            got: sm.to_string(),
        })?;
        let sm_count = sm_count.unwrap_or(row.common_sm_count);
        Ok(Self { sm, sm_count: sm_count.max(1), shared_per_block: row.shared_per_block })
    }

    /// The device of this ordinal, as the driver describes it, whether or not there are kernels for it.
    ///
    /// # Errors
    /// The driver's.
    pub fn raw(driver: &dyn Driver, ordinal: i32) -> Result<Self> {
        let ask = |attribute| driver.attribute(attribute, ordinal).map(|value| u32::try_from(value).unwrap_or(0));
        Ok(Self {
            sm: 10 * ask(Attribute::ComputeCapabilityMajor)? + ask(Attribute::ComputeCapabilityMinor)?,
            sm_count: ask(Attribute::MultiprocessorCount)?,
            shared_per_block: ask(Attribute::SharedPerBlock)?,
        })
    }

    /// The same, of an architecture with kernels.
    ///
    /// # Errors
    /// The driver's, and [`Error::Unknown`] for an architecture without kernels.
    pub fn query(driver: &dyn Driver, ordinal: i32) -> Result<Self> {
        let raw = Self::raw(driver, ordinal)?;
        Self::of(raw.sm, Some(raw.sm_count)).map(|_| raw)
    }
}

#[cfg(test)]
mod tests {
    use super::{ARCHITECTURES, Device};
    use crate::mock::Mock;

    #[test]
    fn architectures_stand_in_order_and_once() {
        assert!(ARCHITECTURES.is_sorted_by(|a, b| a.sm < b.sm));
    }

    #[test]
    fn an_unknown_architecture_is_an_error_that_lists_the_known_ones() {
        let error = Device::of(61, None).expect_err("Pascal has no kernels").to_string();
        assert!(error.contains("75, 80") && error.contains("got 61"), "{error}");
    }

    #[test]
    fn a_device_is_what_the_driver_says() {
        let device = Device::query(&Mock::new(89, 76), 0).expect("a device");
        assert_eq!(device, Device { sm: 89, sm_count: 76, shared_per_block: 101_376 });
    }
}
