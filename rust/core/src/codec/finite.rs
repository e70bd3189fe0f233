//! The error for a tensor that cannot be quantized.

use crate::Error;
use crate::dtype::Element;

/// Names the count and the first index of the values that are not finite. Slow: only for the error.
pub(super) fn non_finite<E: Element>(src: &[E], name: &str) -> Error {
    let bad = |v: &E| !v.to_f32().is_finite();
    Error::NonFinite {
        name: name.to_owned(),
        count: src.iter().filter(|v| bad(v)).count(),
        first: src.iter().position(bad).unwrap_or(src.len()),
    }
}

/// Bits of infinity: magnitudes of finite numbers have smaller bits.
pub(super) const INFINITY_BITS: i32 = 0x7f80_0000;
