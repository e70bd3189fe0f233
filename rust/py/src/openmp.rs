//! The threads of torch's own pool, lent to the core.
//!
//! torch runs its operators on the OpenMP runtime (GNU's, or one with its entry points) that is loaded
//! with it. After an operator its threads wait actively for the next, for milliseconds: a second pool
//! would share its cores with them. So the core's tasks run on those threads.
#![allow(unsafe_code)]

use std::any::Any;
use std::ffi::{c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};

use ferrolora_core::parallel;
use libloading::os::unix::Library;

/// `void GOMP_parallel(void (*fn)(void *), void *data, unsigned num_threads, unsigned flags)` of libgomp.
type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

/// The process that imported the module: a forked child has none of the runtime's threads.
static OWNER: OnceLock<u32> = OnceLock::new();

/// Lends torch's threads to the core.
pub fn register() {
    OWNER.get_or_init(std::process::id);
    parallel::use_host_threads(team);
}

/// The runtime's entry point, if a runtime is loaded. Looked up at the first call: torch is loaded by
/// then, since a tensor has come.
fn entry() -> Option<Parallel> {
    static ENTRY: OnceLock<Option<Parallel>> = OnceLock::new();
    *ENTRY.get_or_init(|| {
        // SAFETY: the symbol of this name is part of the stable ABI of libgomp, and of the runtimes
        // that stand in for it, with the type of `Parallel`. The runtime is never unloaded: torch
        // cannot be.
        unsafe { Library::this().get::<Parallel>(b"GOMP_parallel\0").ok().map(|symbol| *symbol) }
    })
}

/// What the threads of one call share.
struct Shared<'a> {
    work: &'a (dyn Fn() + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Runs the work on one thread. A panic must not cross the runtime's frames: it is kept.
extern "C" fn member(data: *mut c_void) {
    // SAFETY: `team` passes a `Shared` that outlives the parallel region, which ends only when every
    // member has returned; `Shared` is only read, but for the mutex.
    let shared = unsafe { &*data.cast::<Shared<'_>>() };
    if let Err(payload) = catch_unwind(AssertUnwindSafe(shared.work)) {
        *shared.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
    }
}

fn team(threads: usize, work: &(dyn Fn() + Sync)) -> bool {
    let (Some(parallel), Ok(count)) = (entry(), c_uint::try_from(threads)) else { return false };
    if OWNER.get() != Some(&std::process::id()) {
        return false;
    }
    let mut shared = Shared { work, panic: Mutex::new(None) };
    // SAFETY: `member` takes the `Shared` that it is given here, which lives until the call returns,
    // after the last thread has left the region; flags 0 ask for nothing special.
    unsafe { parallel(member, (&raw mut shared).cast(), count, 0) };
    if let Some(payload) = shared.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(payload);
    }
    true
}
