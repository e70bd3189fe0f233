//! Float32 buffers that a thread keeps between calls: a fresh large buffer costs more in page faults
//! than the kernel that fills it.

use std::cell::RefCell;

/// Floats a thread keeps at the most in one buffer; a larger one is freed after the call.
const KEEP: usize = 16 << 20;

thread_local! {
    static BUFFERS: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with a buffer of `length` floats whose contents are unspecified.
#[inline(always)]
pub(super) fn with<R>(length: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    // Taken out of the cell, so that `work` may itself ask for a buffer.
    let mut buffer = BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < length {
        // Not `resize` on the old contents: they need not be copied.
        buffer = Vec::new();
        buffer.resize(length, 0.0);
    }
    let result = work(&mut buffer[..length]);
    if buffer.len() <= KEEP {
        BUFFERS.with_borrow_mut(|buffers| buffers.push(buffer));
    }
    result
}

#[cfg(test)]
mod tests {
    use super::with;

    #[test]
    fn nested_buffers_are_different_ones() {
        with(8, |outer| {
            outer.fill(1.0);
            with(8, |inner| inner.fill(2.0));
            assert_eq!(outer, [1.0; 8]);
        });
        with(3, |again| assert_eq!(again.len(), 3));
    }
}
