//! The driver's functions, from `libcuda.so.1` at run time, behind a trait so that what calls them is tested without one.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use libloading::Library;

use crate::{Error, Result};

const LIBRARY: &str = "libcuda.so.1";

/// A context of the driver: `CUcontext`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Context(pub usize);

/// A loaded cubin: `CUlibrary`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Module(pub usize);

/// An entry of a loaded cubin: `CUkernel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernel(pub usize);

/// A stream of the caller: `CUstream`, 0 for the default one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stream(pub usize);

/// Blocks, threads and dynamic shared memory of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block in bytes.
    pub shared: u32,
}

/// A property of a device that the driver tells: `CUdevice_attribute`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Attribute {
    /// `MULTIPROCESSOR_COUNT`
    MultiprocessorCount = 16,
    /// `COMPUTE_CAPABILITY_MAJOR`
    ComputeCapabilityMajor = 75,
    /// `COMPUTE_CAPABILITY_MINOR`
    ComputeCapabilityMinor = 76,
    /// `MAX_SHARED_MEMORY_PER_BLOCK_OPTIN`
    SharedPerBlock = 97,
}

/// What this crate asks of a driver. A device is its ordinal, which for the driver is also its handle.
pub trait Driver: Send + Sync {
    /// Version of CUDA that the driver speaks, 1000 · major + 10 · minor.
    fn version(&self) -> Result<i32>;
    /// Number of devices.
    fn device_count(&self) -> Result<i32>;
    /// A property of a device.
    fn attribute(&self, attribute: Attribute, device: i32) -> Result<i32>;
    /// A device's name.
    fn device_name(&self, device: i32) -> Result<String>;
    /// The primary context of a device, the one that torch uses, kept alive from now on.
    fn primary_context(&self, device: i32) -> Result<Context>;
    /// The context of this thread, if it has one.
    fn current_context(&self) -> Result<Option<Context>>;
    /// Makes a context this thread's until [`Driver::pop_context`].
    fn push_context(&self, context: Context) -> Result<()>;
    /// Gives this thread back the context it had.
    fn pop_context(&self) -> Result<()>;
    /// Loads a cubin; the driver keeps a copy.
    fn load(&self, cubin: &[u8]) -> Result<Module>;
    /// An entry of a loaded cubin.
    fn kernel(&self, module: Module, entry: &str) -> Result<Kernel>;
    /// Lets a kernel have so much dynamic shared memory on a device.
    fn allow_shared(&self, kernel: Kernel, device: i32, bytes: u32) -> Result<()>;
    /// Launches a kernel in this thread's context. Each parameter is the bits of one value, in the order of the entry.
    ///
    /// # Safety
    /// There are as many parameters as the entry has, each with the bits of the type it has there, and each pointer
    /// is to memory of the context's device that the kernel may use as it does until the stream has passed the launch.
    unsafe fn launch(&self, kernel: Kernel, geometry: Geometry, stream: Stream, parameters: &[u64]) -> Result<()>;
}

type Status = c_int;

/// Declares the functions of the library and loads them all.
macro_rules! functions {
    ($($field:ident: $symbol:literal ($($argument:ty),*);)*) => {
        /// `libcuda.so.1`.
        pub struct LibCuda {
            $($field: unsafe extern "C" fn($($argument),*) -> Status,)*
            /// The functions live in it. It is never unloaded: its value is in a static.
            _library: Library,
        }

        impl LibCuda {
            fn open() -> Result<Self> {
                let missing = |error: &libloading::Error| {
                    let cause = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
                    Error::NoDriver { library: LIBRARY, reason: cause }
                };
                // SAFETY: loading NVIDIA's driver library runs its initializers, which every user of CUDA runs.
                let library = unsafe { Library::new(LIBRARY) }.map_err(|error| missing(&error))?;
                Ok(Self {
                    // SAFETY: each symbol is a function of the driver's stable ABI, declared in cuda.h with these
                    // argument types and the result CUresult; the library outlives the pointer, both are in one value.
                    $($field: unsafe {
                        *library
                            .get::<unsafe extern "C" fn($($argument),*) -> Status>(concat!($symbol, "\0").as_bytes())
                            .map_err(|_| Error::OldDriver { name: $symbol })?
                    },)*
                    _library: library,
                })
            }
        }
    };
}

functions! {
    init: "cuInit"(c_uint);
    driver_version: "cuDriverGetVersion"(*mut c_int);
    error_name: "cuGetErrorName"(Status, *mut *const c_char);
    error_string: "cuGetErrorString"(Status, *mut *const c_char);
    count: "cuDeviceGetCount"(*mut c_int);
    name: "cuDeviceGetName"(*mut c_char, c_int, c_int);
    get_attribute: "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
    retain: "cuDevicePrimaryCtxRetain"(*mut usize, c_int);
    current: "cuCtxGetCurrent"(*mut usize);
    push: "cuCtxPushCurrent_v2"(usize);
    pop: "cuCtxPopCurrent_v2"(*mut usize);
    load_data: "cuLibraryLoadData"(
        *mut usize, *const c_void, *mut c_int, *mut *mut c_void, c_uint, *mut c_int, *mut *mut c_void, c_uint
    );
    get_kernel: "cuLibraryGetKernel"(*mut usize, usize, *const c_char);
    set_attribute: "cuKernelSetAttribute"(c_int, c_int, usize, c_int);
    launch_kernel: "cuLaunchKernel"(
        usize, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, usize, *mut *mut c_void, *mut *mut c_void
    );
}

/// The driver of this machine, loaded and initialised at the first call.
///
/// # Errors
/// [`Error::NoDriver`], [`Error::OldDriver`], or the failure of `cuInit`, the same at every call.
pub fn driver() -> Result<&'static LibCuda> {
    static DRIVER: OnceLock<Result<LibCuda>> = OnceLock::new();
    let loaded = DRIVER.get_or_init(|| {
        let cuda = LibCuda::open()?;
        // SAFETY: cuInit takes flags, which must be 0.
        cuda.check("cuInit", || "starting the driver".to_owned(), unsafe { (cuda.init)(0) })?;
        Ok(cuda)
    });
    loaded.as_ref().map_err(Clone::clone)
}

/// A function of the driver that describes a status.
type Describe = unsafe extern "C" fn(Status, *mut *const c_char) -> Status;

/// The text that one of the driver's two describing functions gives for a status.
fn describe(describe: Describe, status: Status) -> String {
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: the function writes a pointer to a static string, or null for a status it does not know.
    unsafe {
        describe(status, &raw mut text);
        if text.is_null() { "unknown".to_owned() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    }
}

impl LibCuda {
    fn check(&self, call: &'static str, place: impl FnOnce() -> String, status: Status) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let (name, text) = (describe(self.error_name, status), describe(self.error_string, status));
        Err(Error::Driver { call, code: status, name, text, place: place() })
    }
}

impl Driver for LibCuda {
    fn version(&self) -> Result<i32> {
        let mut version = 0;
        // SAFETY: the function writes one int.
        let status = unsafe { (self.driver_version)(&raw mut version) };
        self.check("cuDriverGetVersion", || "asking the driver's version".to_owned(), status)?;
        Ok(version)
    }

    fn device_count(&self) -> Result<i32> {
        let mut count = 0;
        // SAFETY: the function writes one int.
        let status = unsafe { (self.count)(&raw mut count) };
        self.check("cuDeviceGetCount", || "counting devices".to_owned(), status)?;
        Ok(count)
    }

    fn attribute(&self, attribute: Attribute, device: i32) -> Result<i32> {
        let mut value = 0;
        // SAFETY: the function writes one int; a wrong device is an error status.
        let status = unsafe { (self.get_attribute)(&raw mut value, attribute as c_int, device) };
        self.check("cuDeviceGetAttribute", || format!("asking cuda:{device} for {attribute:?}"), status)?;
        Ok(value)
    }

    fn device_name(&self, device: i32) -> Result<String> {
        let mut name: [c_char; 256] = [0; 256];
        // SAFETY: the function writes at most as many characters as it is told, the last of them 0.
        let status = unsafe { (self.name)(name.as_mut_ptr(), 256, device) };
        self.check("cuDeviceGetName", || format!("asking for the name of cuda:{device}"), status)?;
        // SAFETY: after success the buffer holds a string with its final 0.
        Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
    }

    fn primary_context(&self, device: i32) -> Result<Context> {
        let mut context = 0;
        // SAFETY: the function writes one handle.
        let status = unsafe { (self.retain)(&raw mut context, device) };
        self.check("cuDevicePrimaryCtxRetain", || format!("taking the context of cuda:{device}"), status)?;
        Ok(Context(context))
    }

    fn current_context(&self) -> Result<Option<Context>> {
        let mut context = 0;
        // SAFETY: the function writes one handle, 0 if the thread has no context.
        let status = unsafe { (self.current)(&raw mut context) };
        self.check("cuCtxGetCurrent", || "asking for this thread's context".to_owned(), status)?;
        Ok((context != 0).then_some(Context(context)))
    }

    fn push_context(&self, context: Context) -> Result<()> {
        // SAFETY: a context comes from `primary_context`, which keeps it alive.
        let status = unsafe { (self.push)(context.0) };
        self.check("cuCtxPushCurrent", || "entering a device's context".to_owned(), status)
    }

    fn pop_context(&self) -> Result<()> {
        let mut context = 0;
        // SAFETY: the function writes one handle.
        let status = unsafe { (self.pop)(&raw mut context) };
        self.check("cuCtxPopCurrent", || "leaving a device's context".to_owned(), status)
    }

    fn load(&self, cubin: &[u8]) -> Result<Module> {
        let (mut module, none) = (0, std::ptr::null_mut());
        // SAFETY: `cubin` is read during the call only, since no option says that it is preserved; the driver finds
        // its end from the ELF headers, which the compiler wrote. Null option arrays go with counts of 0.
        let status = unsafe {
            let options = std::ptr::null_mut();
            (self.load_data)(&raw mut module, cubin.as_ptr().cast(), none, options, 0, none, options, 0)
        };
        self.check("cuLibraryLoadData", || format!("loading a cubin of {} bytes", cubin.len()), status)?;
        Ok(Module(module))
    }

    fn kernel(&self, module: Module, entry: &str) -> Result<Kernel> {
        let name = CString::new(entry).map_err(|_| Error::Unknown {
            what: "entry",
            allowed: "the entries of the kernel table".to_owned(),
            got: format!("{entry:?}"),
        })?;
        let mut kernel = 0;
        // SAFETY: the module comes from `load` and is never unloaded; the name ends in 0.
        let status = unsafe { (self.get_kernel)(&raw mut kernel, module.0, name.as_ptr()) };
        self.check("cuLibraryGetKernel", || format!("looking for {entry}"), status)?;
        Ok(Kernel(kernel))
    }

    fn allow_shared(&self, kernel: Kernel, device: i32, bytes: u32) -> Result<()> {
        const MAX_DYNAMIC_SHARED_SIZE_BYTES: c_int = 8;
        let value = c_int::try_from(bytes).unwrap_or(c_int::MAX);
        // SAFETY: the kernel comes from `kernel`; a wrong value is an error status.
        let status = unsafe { (self.set_attribute)(MAX_DYNAMIC_SHARED_SIZE_BYTES, value, kernel.0, device) };
        self.check("cuKernelSetAttribute", || format!("asking for {bytes} bytes of shared memory"), status)
    }

    unsafe fn launch(&self, kernel: Kernel, geometry: Geometry, stream: Stream, parameters: &[u64]) -> Result<()> {
        let mut places: Vec<*mut c_void> =
            parameters.iter().map(|value| (&raw const *value).cast_mut().cast()).collect();
        let ([gx, gy, gz], [bx, by, bz]) = (geometry.grid, geometry.block);
        // SAFETY: each place holds eight bytes, of which the driver reads as many as the entry's parameter has (the
        // machine is little-endian) before the call returns. The rest is this function's own contract.
        let status = unsafe {
            let extra = std::ptr::null_mut();
            let places = places.as_mut_ptr();
            (self.launch_kernel)(kernel.0, gx, gy, gz, bx, by, bz, geometry.shared, stream.0, places, extra)
        };
        self.check("cuLaunchKernel", || format!("{geometry:?}"), status)
    }
}

#[cfg(test)]
mod tests {
    use super::driver;
    use crate::Error;

    #[test]
    fn a_machine_without_a_driver_gets_an_error_that_names_the_library_and_not_an_abort() {
        match driver().map(|_| ()) {
            Ok(()) | Err(Error::Driver { .. }) => {} // a driver is here, with or without a device
            Err(error) => assert!(error.to_string().contains("libcuda.so.1"), "{error}"),
        }
    }
}
