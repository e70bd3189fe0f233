//! Float32 values as a leading and a trailing bfloat16.
//!
//! A product of two split values `(a + a')·(b + b')` is four products of pairs in depth: on one side the
//! pairs `(a, a')`, twice; on the other `(b, b)` and then `(b', b')`.

use half::bf16;

use crate::simd::{Isa, LANES};

/// Depth of a product of `rank` split values, in whole steps.
pub(super) fn depth(rank: usize) -> usize {
    (4 * rank).next_multiple_of(crate::simd::dots::STEP)
}

/// `high[i] + low[i] ≈ values[i]`.
#[inline(always)]
pub(super) fn split<I: Isa>(isa: I, values: &[f32], high: &mut [bf16], low: &mut [bf16]) {
    let (body, tail) = values.as_chunks::<LANES>();
    let (high_body, high_tail) = high.as_chunks_mut::<LANES>();
    let (low_body, low_tail) = low.as_chunks_mut::<LANES>();
    for ((values, high), low) in body.iter().zip(high_body).zip(low_body) {
        (*high, *low) = split_lanes(isa, isa.load(values));
    }
    for ((value, high), low) in tail.iter().zip(high_tail).zip(low_tail) {
        *high = bf16::from_f32(*value);
        *low = bf16::from_f32(*value - high.to_f32());
    }
}

#[inline(always)]
fn split_lanes<I: Isa>(isa: I, values: I::F) -> ([bf16; LANES], [bf16; LANES]) {
    let (mut high, mut low) = ([bf16::ZERO; LANES], [bf16::ZERO; LANES]);
    isa.store_bf16(values, &mut high);
    isa.store_bf16(isa.fma(isa.load_bf16(&high), isa.splat(-1.0), values), &mut low);
    (high, low)
}

/// The pairs `(high, low)` of `scale · values`, one after another.
#[inline(always)]
pub(super) fn pairs<I: Isa>(isa: I, values: &[f32], scale: f32, out: &mut [bf16]) {
    let (body, tail) = values.as_chunks::<LANES>();
    let (out_body, out_tail) = out.as_chunks_mut::<{ 2 * LANES }>();
    for (values, out) in body.iter().zip(&mut *out_body) {
        let (high, low) = split_lanes(isa, isa.mul(isa.load(values), isa.splat(scale)));
        isa.store_pairs(isa.zip_pairs(&high, &low), out);
    }
    for (value, pair) in tail.iter().zip(out_tail.as_chunks_mut::<2>().0) {
        let value = value * scale;
        pair[0] = bf16::from_f32(value);
        pair[1] = bf16::from_f32(value - pair[0].to_f32());
    }
}

/// The other side of a product with [`pairs`]: `(high, high)` of every value, then `(low, low)` of every
/// value, then zeros.
#[inline(always)]
pub(super) fn doubled<I: Isa>(isa: I, values: &[f32], out: &mut [bf16]) {
    let (high_pairs, rest) = out.split_at_mut(2 * values.len());
    let (low_pairs, zeros) = rest.split_at_mut(2 * values.len());
    zeros.fill(bf16::ZERO);
    let chunks = high_pairs.chunks_mut(2 * LANES).zip(low_pairs.chunks_mut(2 * LANES));
    for (values, (high_out, low_out)) in values.chunks(LANES).zip(chunks) {
        let mut lanes = [0.0; LANES];
        lanes[..values.len()].copy_from_slice(values);
        let (high, low) = split_lanes(isa, isa.load(&lanes));
        for (half, out) in [(high, high_out), (low, low_out)] {
            let both = isa.zip_pairs(&half, &half);
            if let Some(out) = out.first_chunk_mut() {
                isa.store_pairs(both, out);
            } else {
                let mut whole = [bf16::ZERO; 2 * LANES];
                isa.store_pairs(both, &mut whole);
                out.copy_from_slice(&whole[..out.len()]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::{depth, doubled, pairs, split};
    use crate::simd::{Isa, IsaKind, Op};

    struct Product<'a>(&'a [f32], &'a [f32]);

    impl Op for Product<'_> {
        type Output = (f64, f64);

        /// The product by pairs, and the sum of what `split` leaves of the first operand.
        fn eval<I: Isa>(self, isa: I) -> (f64, f64) {
            let rank = self.0.len();
            let mut left = vec![bf16::ONE; depth(rank)];
            let mut right = vec![bf16::ZERO; 2 * rank];
            let (mut high, mut low) = (vec![bf16::ZERO; rank], vec![bf16::ZERO; rank]);
            doubled(isa, self.0, &mut left);
            pairs(isa, self.1, 2.0, &mut right);
            split(isa, self.0, &mut high, &mut low);
            assert!(left[4 * rank..].iter().all(|v| *v == bf16::ZERO));
            let both = right.iter().chain(&right);
            let product = left.iter().zip(both).map(|(a, b)| a.to_f64() * b.to_f64()).sum();
            let halves = high.iter().zip(&low).map(|(h, l)| h.to_f64() + l.to_f64());
            (product, halves.zip(self.0).map(|(a, b)| (a - f64::from(*b)).abs()).sum())
        }
    }

    #[test]
    fn a_product_of_split_values_is_that_of_the_values() {
        for rank in [0, 1, 5, 16, 17, 40] {
            let a: Vec<f32> = (0..rank).map(|i| (i as f32 * 0.37 + 0.1).sin()).collect();
            let b: Vec<f32> = (0..rank).map(|i| (i as f32 * 0.73 + 0.2).cos()).collect();
            let terms = || a.iter().zip(&b).map(|(a, b)| 2.0 * f64::from(*a) * f64::from(*b));
            let magnitude: f64 = terms().map(f64::abs).sum();
            for kind in IsaKind::available() {
                let (product, left_over) = kind.run(Product(&a, &b));
                // Each operand is split with a relative error of at most 2^-17.
                let bound = magnitude * 2.0_f64.powi(-16) * 1.01;
                assert!((product - terms().sum::<f64>()).abs() <= bound, "{} r={rank}", kind.name());
                let sizes: f64 = a.iter().map(|v| f64::from(v.abs())).sum();
                assert!(left_over <= sizes * 2.0_f64.powi(-17), "{} r={rank}", kind.name());
            }
        }
    }
}
