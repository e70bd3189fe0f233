//! How a call is executed: which instruction set, how many threads.

use crate::simd::IsaKind;

/// Execution settings of one call. They change speed, never results of the codec.
#[derive(Debug, Clone, Copy)]
pub struct Exec {
    /// Instruction set to run on; it was checked to exist on this machine.
    pub isa: IsaKind,
    /// Threads that may work on the call, the calling one included; at least 1.
    pub threads: usize,
}

impl Exec {
    /// The best instruction set of this machine (or the one `FERROLORA_ISA` forces) on `threads` threads.
    ///
    /// # Errors
    /// [`crate::Error::Unknown`] when `FERROLORA_ISA` names no instruction set of this machine.
    pub fn new(threads: usize) -> crate::Result<Self> {
        Ok(Self { isa: IsaKind::detect()?, threads: threads.max(1) })
    }

    /// All `threads` for work of `operations` scalar operations, or 1 when waking a second thread would
    /// cost more than it saves.
    #[must_use]
    pub(crate) fn threads_for(&self, operations: usize) -> usize {
        /// A helper thread wakes in 10-20 µs; one core does about this many operations meanwhile. Measured on two
        /// cores with AVX-512, with a cut-off low enough to use both: products of 1.2 to 1.5 million operations took as
        /// long on two threads as on one, those of 2.4 million a seventh less. The unit tests put small problems on
        /// every thread they ask for.
        const WORTH_A_THREAD: usize = if cfg!(test) { 1 } else { 1 << 20 };
        if operations >= 2 * WORTH_A_THREAD { self.threads } else { 1 }
    }
}
