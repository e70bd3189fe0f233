//! Float32 buffers that a thread keeps between calls: a fresh large buffer costs more in page faults
//! than the kernel that fills it.

use std::cell::RefCell;
use std::thread::LocalKey;

use half::bf16;

/// Bytes a thread keeps at the most in one buffer; a larger one is freed after the call.
const KEEP: usize = 64 << 20;

/// Bytes of a cache line. Buffers start at one: a vector load that spans two takes twice as long.
const LINE: usize = 64;

type Pool<T> = RefCell<Vec<Vec<T>>>;

thread_local! {
    static F32: Pool<f32> = const { RefCell::new(Vec::new()) };
    static BF16: Pool<bf16> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with a buffer of `length` floats whose contents are unspecified.
#[inline(always)]
pub(super) fn with<R>(length: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    borrow(&F32, length, work)
}

/// [`with`], of bfloat16.
#[inline(always)]
pub(super) fn with_bf16<R>(length: usize, work: impl FnOnce(&mut [bf16]) -> R) -> R {
    borrow(&BF16, length, work)
}

#[inline(always)]
fn borrow<T: Copy + Default, R>(
    pool: &'static LocalKey<Pool<T>>,
    length: usize,
    work: impl FnOnce(&mut [T]) -> R,
) -> R {
    // Taken out of the cell, so that `work` may itself ask for a buffer.
    let mut buffer = pool.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < length + LINE {
        // Not `resize` on the old contents: they need not be copied.
        buffer = Vec::new();
        buffer.resize(length + LINE, T::default());
    }
    let start = buffer.as_ptr().align_offset(LINE).min(LINE);
    let result = work(&mut buffer[start..][..length]);
    if buffer.len() * size_of::<T>() <= KEEP {
        pool.with_borrow_mut(|buffers| buffers.push(buffer));
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
