//! A driver that remembers what it was asked: the tests of loading and launching run over it.

use std::sync::Mutex;

use crate::driver::{Attribute, Context, Driver, Geometry, Kernel, Module, Stream};
use crate::{Error, Result};

/// One call of the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    Push(Context),
    Pop,
    Load(usize),
    Kernel(Module, String),
    AllowShared(Kernel, i32, u32),
    Launch(Kernel, Geometry, Stream, Vec<u64>),
}

/// A machine whose devices are all the same; the context of device `i` is `100 + i`.
pub struct Mock {
    sm: i32,
    sm_count: i32,
    current: Mutex<Vec<Context>>,
    calls: Mutex<Vec<Call>>,
    fail_launch: bool,
}

impl Mock {
    pub fn new(sm: i32, sm_count: i32) -> Self {
        Self { sm, sm_count, current: Mutex::default(), calls: Mutex::default(), fail_launch: false }
    }

    /// The same, with every launch refused.
    pub fn failing(sm: i32, sm_count: i32) -> Self {
        Self { fail_launch: true, ..Self::new(sm, sm_count) }
    }

    /// What was asked since the last time, in order.
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().expect("no panic inside"))
    }

    fn note(&self, call: Call) {
        self.calls.lock().expect("no panic inside").push(call);
    }
}

impl Driver for Mock {
    fn version(&self) -> Result<i32> {
        Ok(13_020)
    }
    fn device_count(&self) -> Result<i32> {
        Ok(2)
    }
    fn attribute(&self, attribute: Attribute, _: i32) -> Result<i32> {
        let device = crate::device::Device::of(self.sm.unsigned_abs(), None)?;
        Ok(match attribute {
            Attribute::MultiprocessorCount => self.sm_count,
            Attribute::ComputeCapabilityMajor => self.sm / 10,
            Attribute::ComputeCapabilityMinor => self.sm % 10,
            Attribute::SharedPerBlock => device.shared_per_block.cast_signed(),
        })
    }
    fn device_name(&self, device: i32) -> Result<String> {
        Ok(format!("mock {device}"))
    }
    fn primary_context(&self, device: i32) -> Result<Context> {
        Ok(Context(100 + usize::try_from(device).expect("an ordinal")))
    }
    fn current_context(&self) -> Result<Option<Context>> {
        Ok(self.current.lock().expect("no panic inside").last().copied())
    }
    fn push_context(&self, context: Context) -> Result<()> {
        self.current.lock().expect("no panic inside").push(context);
        self.note(Call::Push(context));
        Ok(())
    }
    fn pop_context(&self) -> Result<()> {
        self.current.lock().expect("no panic inside").pop();
        self.note(Call::Pop);
        Ok(())
    }
    fn load(&self, cubin: &[u8]) -> Result<Module> {
        self.note(Call::Load(cubin.len()));
        Ok(Module(cubin.len()))
    }
    fn kernel(&self, module: Module, entry: &str) -> Result<Kernel> {
        self.note(Call::Kernel(module, entry.to_owned()));
        Ok(Kernel(module.0 + 1))
    }
    fn allow_shared(&self, kernel: Kernel, device: i32, bytes: u32) -> Result<()> {
        self.note(Call::AllowShared(kernel, device, bytes));
        Ok(())
    }
    #[allow(unsafe_code)] // the signature of the trait; nothing here is unsafe
    unsafe fn launch(&self, kernel: Kernel, geometry: Geometry, stream: Stream, parameters: &[u64]) -> Result<()> {
        if self.fail_launch {
            let (name, text) = ("CUDA_ERROR_INVALID_VALUE".to_owned(), "invalid argument".to_owned());
            return Err(Error::Driver { call: "cuLaunchKernel", code: 1, name, text, place: "mock".to_owned() });
        }
        self.note(Call::Launch(kernel, geometry, stream, parameters.to_vec()));
        Ok(())
    }
}
