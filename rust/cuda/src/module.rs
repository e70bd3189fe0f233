//! Loaded cubins: each kernel is loaded once for each device, before anything is captured in a graph.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::driver::{Context, Driver, Kernel};
use crate::plan::Launch;
use crate::{Error, Result};

/// The first bytes of a cubin, which is an ELF file.
const ELF: &[u8] = b"\x7fELF";

/// A kernel on a device, ready to launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// The device's primary context, torch's own.
    pub context: Context,
    /// The kernel, with as much shared memory as its plan asks for.
    pub kernel: Kernel,
}

/// The kernels that a process has loaded. Nothing is ever unloaded: a captured graph may hold any of them.
#[derive(Default)]
pub struct Modules {
    kernels: Mutex<HashMap<(i32, String), (Loaded, u32)>>,
    contexts: Mutex<HashMap<i32, Context>>,
}

impl Modules {
    /// The kernel of a plan on a device, if it is loaded and has the shared memory that the plan asks for.
    #[must_use]
    pub fn find(&self, device: i32, launch: &Launch) -> Option<Loaded> {
        let kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let (loaded, shared) = kernels.get(&(device, launch.key()))?;
        (*shared >= launch.geometry.shared).then_some(*loaded)
    }

    /// The kernel of a plan on a device, loaded from `cubin` if it is not yet.
    ///
    /// # Errors
    /// [`Error::Unknown`] if `cubin` is none; the driver's, for one of another architecture or without the entry.
    pub fn load(&self, driver: &dyn Driver, device: i32, launch: &Launch, cubin: &[u8]) -> Result<Loaded> {
        if let Some(loaded) = self.find(device, launch) {
            return Ok(loaded);
        }
        if !cubin.starts_with(ELF) {
            let got = format!("{} bytes that start with {:?}", cubin.len(), &cubin[..cubin.len().min(4)]);
            return Err(Error::Unknown { what: "cubin", allowed: "the ELF file of NVRTC".to_owned(), got });
        }
        let context = self.context(driver, device)?;
        let entry = launch.row.entry;
        let place = |error| in_place(error, &format!("{entry} on cuda:{device}"));
        let kernel = within(driver, context, || {
            let kernel = driver.kernel(driver.load(cubin)?, entry)?;
            driver.allow_shared(kernel, device, launch.geometry.shared)?;
            Ok(kernel)
        })
        .map_err(place)?;
        let loaded = Loaded { context, kernel };
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        kernels.insert((device, launch.key()), (loaded, launch.geometry.shared));
        Ok(loaded)
    }

    fn context(&self, driver: &dyn Driver, device: i32) -> Result<Context> {
        let mut contexts = self.contexts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(context) = contexts.get(&device) {
            return Ok(*context);
        }
        let context = driver.primary_context(device)?;
        contexts.insert(device, context);
        Ok(context)
    }
}

/// Runs `work` in a context: this thread's own if it is that already, as it nearly always is.
pub fn within<T>(driver: &dyn Driver, context: Context, work: impl FnOnce() -> Result<T>) -> Result<T> {
    if driver.current_context()? == Some(context) {
        return work();
    }
    driver.push_context(context)?;
    let done = work();
    driver.pop_context()?;
    done
}

/// The error with where it happened in front of what was being done.
fn in_place(error: Error, place: &str) -> Error {
    match error {
        Error::Driver { call, code, name, text, place: doing } => {
            Error::Driver { call, code, name, text, place: format!("{place}: {doing}") }
        }
        other => other,
    }
}
