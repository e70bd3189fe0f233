//! `code = nearest(x / absmax)` block by block, packed two to a byte.

use std::sync::atomic::{AtomicBool, Ordering};

use super::codebook::{fp4, nf4};
use super::finite::{INFINITY_BITS, non_finite};
use super::spec::{QuantSpec, QuantType};
use crate::dtype::{Element, Floats, with_floats};
use crate::error::check_len;
use crate::simd::{Isa, LANES, Op};
use crate::{Exec, Result, parallel};

/// Elements of one task. A multiple of every block size, so that no block spans two tasks.
const TASK: usize = 1 << 15;

/// An absmax below this counts as this in the division, so that its reciprocal is finite. (The
/// reference implementations clamp at the same value.)
pub(crate) const SMALLEST_ABSMAX: f32 = 1e-38;

/// Quantizes `src` to 4 bits.
///
/// Per block: `absmax = max|x|`, `scaled = f32(x) · (1 / max(absmax, 1e-38))`, and the code is the number
/// of thresholds below `scaled` (NF4) or below `|scaled|` with the sign in bit 3 (FP4).
///
/// `codes` has `ceil(numel / 2)` bytes, the high nibble first; the pad nibble of an odd tensor is the
/// code of zero. `absmax` has one float32 a block.
///
/// # Errors
/// [`crate::Error::NonFinite`] naming `name` if a value is NaN or infinite: `codes` and `absmax` are
/// then unspecified. [`crate::Error::Length`] if a buffer does not fit.
pub fn quantize_4bit(
    exec: &Exec,
    src: Floats<'_>,
    spec: QuantSpec,
    codes: &mut [u8],
    absmax: &mut [f32],
    name: &str,
) -> Result<()> {
    check_len("codes", src.len().div_ceil(2), codes.len())?;
    check_len("absmax", spec.blocks(src.len()), absmax.len())?;
    with_floats!(Floats, src, src => quantize_typed(exec, src, spec, codes, absmax, name))
}

fn quantize_typed<E: Element>(
    exec: &Exec,
    src: &[E],
    spec: QuantSpec,
    codes: &mut [u8],
    absmax: &mut [f32],
    name: &str,
) -> Result<()> {
    let tasks: Vec<_> = src
        .chunks(TASK)
        .zip(codes.chunks_mut(TASK / 2))
        .zip(absmax.chunks_mut(TASK / spec.block_size()))
        .map(|((src, codes), absmax)| QuantizeChunk { src, spec, codes, absmax })
        .collect();
    let finite = AtomicBool::new(true);
    parallel::for_each(exec.threads_for(src.len()), tasks, |task| {
        if !exec.isa.run(task) {
            finite.store(false, Ordering::Relaxed);
        }
    });
    if finite.into_inner() { Ok(()) } else { Err(non_finite(src, name)) }
}

/// Whole blocks but for the tensor's last. Evaluates to whether every value was finite.
struct QuantizeChunk<'a, E> {
    src: &'a [E],
    spec: QuantSpec,
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
}

impl<E: Element> Op for QuantizeChunk<'_, E> {
    type Output = bool;

    fn eval<I: Isa>(self, isa: I) -> bool {
        isa.vectorize(
            #[inline(always)]
            || match self.spec.quant_type() {
                QuantType::Nf4 => self.blocks(isa, &Nf4Encoder::new(isa)),
                QuantType::Fp4 => self.blocks(isa, &Fp4Encoder::new(isa)),
            },
        )
    }
}

impl<E: Element> QuantizeChunk<'_, E> {
    #[inline(always)]
    fn blocks<I: Isa>(self, isa: I, encoder: &impl Encoder<I>) -> bool {
        let block_size = self.spec.block_size();
        let zero = self.spec.quant_type().zero_code();
        let blocks = self.src.chunks(block_size).zip(self.codes.chunks_mut(block_size / 2)).zip(self.absmax);
        let mut largest = 0;
        for ((src, codes), absmax) in blocks {
            let bits = absmax_bits(isa, src);
            largest = largest.max(bits);
            *absmax = f32::from_bits(bits.cast_unsigned());
            encode_block(isa, encoder, src, 1.0 / absmax.max(SMALLEST_ABSMAX), zero, codes);
        }
        largest < INFINITY_BITS
    }
}

/// Bits of the largest magnitude, which compare as the magnitudes do; NaN is the largest of all.
#[inline(always)]
pub(super) fn absmax_bits<I: Isa, E: Element>(isa: I, src: &[E]) -> i32 {
    let (body, tail) = src.as_chunks::<LANES>();
    let mut largest = isa.zero_i();
    for lanes in body {
        largest = isa.max_abs_bits(largest, E::load(isa, lanes));
    }
    tail.iter().fold(isa.reduce_max(largest), |m, v| m.max(v.to_f32().abs().to_bits().cast_signed()))
}

#[inline(always)]
fn encode_block<I: Isa, E: Element>(
    isa: I,
    encoder: &impl Encoder<I>,
    src: &[E],
    inverse: f32,
    zero: u8,
    codes: &mut [u8],
) {
    let inverse = isa.splat(inverse);
    let (body, tail) = src.as_chunks::<LANES>();
    let (codes_body, codes_tail) = codes.split_at_mut(body.len() * (LANES / 2));
    for (lanes, bytes) in body.iter().zip(codes_body.as_chunks_mut::<8>().0) {
        *bytes = isa.pack_nibbles(encoder.encode(isa, isa.mul(E::load(isa, lanes), inverse)));
    }
    if !tail.is_empty() {
        let mut lanes = [E::default(); LANES];
        lanes[..tail.len()].copy_from_slice(tail);
        let mut bytes = isa.pack_nibbles(encoder.encode(isa, isa.mul(E::load(isa, &lanes), inverse)));
        if tail.len() % 2 == 1 {
            bytes[tail.len() / 2] = (bytes[tail.len() / 2] & 0xf0) | zero;
        }
        codes_tail.copy_from_slice(&bytes[..codes_tail.len()]);
    }
}

/// Sixteen scaled values to sixteen codes.
trait Encoder<I: Isa> {
    fn encode(&self, isa: I, scaled: I::F) -> I::I;
}

struct Nf4Encoder<I: Isa> {
    thresholds: I::Table,
}

impl<I: Isa> Nf4Encoder<I> {
    #[inline(always)]
    fn new(isa: I) -> Self {
        Self { thresholds: isa.table(&nf4::THRESHOLDS) }
    }
}

impl<I: Isa> Encoder<I> for Nf4Encoder<I> {
    #[inline(always)]
    fn encode(&self, isa: I, scaled: I::F) -> I::I {
        isa.rank(self.thresholds, &nf4::THRESHOLDS, scaled)
    }
}

struct Fp4Encoder<I: Isa> {
    thresholds: I::Table,
    code_of_rank: I::Table,
}

impl<I: Isa> Fp4Encoder<I> {
    #[inline(always)]
    fn new(isa: I) -> Self {
        let code = |rank: usize| f32::from_bits(u32::from(fp4::CODE_OF_RANK[rank % 8]));
        Self { thresholds: isa.table(&fp4::THRESHOLDS), code_of_rank: isa.table(&std::array::from_fn(code)) }
    }
}

impl<I: Isa> Encoder<I> for Fp4Encoder<I> {
    #[inline(always)]
    fn encode(&self, isa: I, scaled: I::F) -> I::I {
        let rank = isa.rank(self.thresholds, &fp4::THRESHOLDS, isa.abs(scaled));
        let magnitude = isa.to_bits(isa.lookup(self.code_of_rank, rank));
        isa.or(magnitude, isa.gt_bit(isa.splat(0.0), scaled, 8))
    }
}
