//! Writing large results past the caches.
//!
//! A plain store to a line that is not in the cache reads the line from memory first. A result larger than
//! the caches is better written around them, even if it is read next: that is half the traffic.
#![allow(unsafe_code)]

use super::Isa;
use crate::dtype::Element;

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Elements that are computed before they are written; a whole number of lines.
const PIECE: usize = 1024;

/// Whether a result is so large that it is written past the caches.
pub(crate) fn exceeds_caches<E>(dst: &[E]) -> bool {
    /// Measured where a core has 2 MB of its own: from here on a result is written faster by a third and more,
    /// and summing it afterwards included, it is still faster by a tenth and more; at half of this, slower. The
    /// unit tests write small results so.
    const BYTES: usize = if cfg!(test) { 1 << 12 } else { 8 << 20 };
    size_of_val(dst) >= BYTES
}

/// Fills `dst`, past the caches if it is part of something `large`: `compute(start, piece)` writes the elements
/// from `start` on into `piece`, from the beginning of `dst` to its end.
#[inline(always)]
pub(crate) fn fill<I: Isa, E: Element>(isa: I, large: bool, dst: &mut [E], mut compute: impl FnMut(usize, &mut [E])) {
    /// Fences when it goes, even if `compute` panics.
    struct Fence<I: Isa>(I);
    impl<I: Isa> Drop for Fence<I> {
        fn drop(&mut self) {
            self.0.fence();
        }
    }
    // A buffer that stays in the first-level cache; what comes before the first whole line is written plainly,
    // and so is everything if it is not large.
    let mut buffer = [E::default(); PIECE];
    let plain = if large { dst.as_ptr().align_offset(LINE).min(dst.len()) } else { dst.len() };
    let (head, lines) = dst.split_at_mut(plain);
    compute(0, head);
    let _fence = Fence(isa);
    let mut start = plain;
    for dst in lines.chunks_mut(PIECE) {
        let piece = &mut buffer[..dst.len()];
        compute(start, piece);
        start += piece.len();
        let whole = size_of_val(piece) / LINE * LINE;
        let (from, to) = (piece.as_ptr().cast::<u8>(), dst.as_mut_ptr().cast::<u8>());
        for offset in (0..whole).step_by(LINE) {
            // SAFETY: both slices have `whole` bytes at least, of floats, which have no padding; `dst` is a whole
            // number of lines after the beginning of `lines`, which is that of a line; the fence follows.
            unsafe { isa.stream_line(from.add(offset), to.add(offset)) };
        }
        let whole = whole / size_of::<E>();
        dst[whole..].copy_from_slice(&piece[whole..]);
    }
}

#[cfg(test)]
mod tests {
    use super::{LINE, PIECE, fill};
    use crate::dtype::{Element, bf16};
    use crate::simd::{Isa, IsaKind, Op};

    struct Count<'a, E>(bool, &'a mut [E]);

    impl<E: Element> Op for Count<'_, E> {
        type Output = ();
        fn eval<I: Isa>(self, isa: I) {
            let mut expected = 0;
            fill(isa, self.0, self.1, |start, piece| {
                assert_eq!(start, expected, "pieces follow one another");
                expected += piece.len();
                for (i, value) in piece.iter_mut().enumerate() {
                    *value = E::from_f32(((start + i) % 251) as f32);
                }
            });
        }
    }

    fn check<E: Element + PartialEq>() {
        let sizes = [0, 1, 31, 32, 33, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 17];
        for isa in IsaKind::available() {
            for (size, offset) in sizes.into_iter().flat_map(|size| [0, 1, 7, 16].map(|offset| (size, offset))) {
                for large in [false, true] {
                    let mut buffer = vec![E::from_f32(-1.0); size + offset + LINE];
                    isa.run(Count(large, &mut buffer[offset..offset + size]));
                    for (i, value) in buffer.iter().enumerate() {
                        let inside = (offset..offset + size).contains(&i);
                        let expected = if inside { ((i - offset) % 251) as f32 } else { -1.0 };
                        assert!(*value == E::from_f32(expected), "{} {size} {offset} {i}", isa.name());
                    }
                }
            }
        }
    }

    #[test]
    fn every_element_is_written_wherever_the_result_begins() {
        check::<f32>();
        check::<bf16>();
    }
}
