//! The scales of one row of a weight of whole blocks.

use crate::codec::spec::{Packed, RUN};
use crate::simd::Isa;

/// Scales of the `out.len()` blocks of row `row`, decoded.
#[inline(always)]
pub(super) fn row_scales<I: Isa>(isa: I, packed: &Packed<'_>, row: usize, out: &mut [f32]) {
    let first = row * out.len();
    let mut buffer = [0.0; RUN];
    for (i, part) in out.chunks_mut(RUN).enumerate() {
        part.copy_from_slice(packed.scales().run(isa, first + i * RUN, part.len(), &mut buffer));
    }
}
