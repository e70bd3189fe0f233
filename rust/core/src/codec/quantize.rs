//! `code = nearest(x / absmax)` block by block, packed two to a byte.

use std::sync::atomic::{AtomicBool, Ordering};

use super::codebook::buckets::{self, Buckets};
use super::codebook::{fp4, nf4};
use super::finite::{INFINITY_BITS, non_finite};
use super::spec::{QuantSpec, QuantType};
use crate::dtype::{Element, Floats, with_floats};
use crate::error::check_len;
use crate::simd::{Isa, LANES, Op};
use crate::{Exec, Result, parallel};

/// Elements of one task. A multiple of every block size, so that no block spans two tasks.
const TASK: usize = 1 << 15;

/// Values that are encoded together: four vectors fill 32 bytes of codes.
const QUAD: usize = 4 * LANES;

const HALF_QUAD: usize = QUAD / 2;

/// Bytes ahead of which memory is asked for values: a page, because the processor's own prefetch stops there.
const AHEAD: usize = 4096;

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
    parallel::for_each(exec.threads_for(src.len() * 8), tasks, |task| {
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
                QuantType::Nf4 => self.blocks(isa, &Ranks::new(isa, &nf4::BUCKETS)),
                QuantType::Fp4 => self.blocks(isa, &Fp4Encoder::new(isa)),
            },
        )
    }
}

impl<E: Element> QuantizeChunk<'_, E> {
    #[inline(always)]
    fn blocks<I: Isa>(self, isa: I, encoder: &impl Encoder<I>) -> bool {
        match self.spec.block_size() {
            QUAD => self.quads::<I, 1>(isa, encoder),
            HALF_QUAD => self.quads::<I, 2>(isa, encoder),
            _ => self.any_blocks(isa, encoder),
        }
    }

    /// `N` blocks in sixty-four values, which stay in registers between the maximum and the codes.
    #[inline(always)]
    fn quads<I: Isa, const N: usize>(self, isa: I, encoder: &impl Encoder<I>) -> bool {
        let Self { src, spec, codes, absmax } = self;
        let (body, src) = src.as_chunks::<QUAD>();
        let (codes_body, codes) = codes.split_at_mut(body.len() * (QUAD / 2));
        let (absmax_body, absmax) = absmax.split_at_mut(body.len() * N);
        let mut largest = 0;
        for (i, ((src, codes), absmax)) in
            body.iter().zip(codes_body.as_chunks_mut().0).zip(absmax_body.as_chunks_mut::<N>().0).enumerate()
        {
            if let Some(later) = body.get(i + AHEAD / size_of_val(src)) {
                isa.prefetch(later);
            }
            let values = load_quad(isa, src);
            let mut inverse = [isa.splat(0.0); 4];
            for n in 0..N {
                let mut bits = isa.zero_i();
                for value in &values[n * 4 / N..(n + 1) * 4 / N] {
                    bits = isa.max_abs_bits(bits, *value);
                }
                let bits = isa.reduce_max(bits);
                largest = largest.max(bits);
                absmax[n] = f32::from_bits(bits.cast_unsigned());
                inverse[n * 4 / N..(n + 1) * 4 / N].fill(isa.splat(1.0 / absmax[n].max(SMALLEST_ABSMAX)));
            }
            isa.store_nibbles(encode_quad(isa, encoder, values, inverse), codes);
        }
        let rest = QuantizeChunk { src, spec, codes, absmax }.any_blocks(isa, encoder);
        largest < INFINITY_BITS && rest
    }

    #[inline(always)]
    fn any_blocks<I: Isa>(self, isa: I, encoder: &impl Encoder<I>) -> bool {
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
    let inverse = [isa.splat(inverse); 4];
    let (body, tail) = src.as_chunks();
    let (codes_body, codes_tail) = codes.split_at_mut(body.len() * (QUAD / 2));
    for (src, codes) in body.iter().zip(codes_body.as_chunks_mut().0) {
        isa.store_nibbles(encode_quad(isa, encoder, load_quad(isa, src), inverse), codes);
    }
    if !tail.is_empty() {
        let (mut padded, mut bytes) = ([E::default(); QUAD], [0; QUAD / 2]);
        padded[..tail.len()].copy_from_slice(tail);
        isa.store_nibbles(encode_quad(isa, encoder, load_quad(isa, &padded), inverse), &mut bytes);
        if tail.len() % 2 == 1 {
            bytes[tail.len() / 2] = (bytes[tail.len() / 2] & 0xf0) | zero;
        }
        codes_tail.copy_from_slice(&bytes[..codes_tail.len()]);
    }
}

#[inline(always)]
fn load_quad<I: Isa, E: Element>(isa: I, src: &[E; QUAD]) -> [I::F; 4] {
    let mut values = [isa.splat(0.0); 4];
    for (value, lanes) in values.iter_mut().zip(src.as_chunks().0) {
        *value = E::load(isa, lanes);
    }
    values
}

#[inline(always)]
fn encode_quad<I: Isa>(isa: I, encoder: &impl Encoder<I>, values: [I::F; 4], inverse: [I::F; 4]) -> [I::I; 4] {
    let mut codes = [isa.zero_i(); 4];
    for i in 0..4 {
        codes[i] = encoder.encode(isa, isa.mul(values[i], inverse[i]));
    }
    codes
}

/// Sixteen scaled values to sixteen codes.
trait Encoder<I: Isa> {
    fn encode(&self, isa: I, scaled: I::F) -> I::I;
}

/// The number of thresholds below a value, by its bucket.
struct Ranks<I: Isa> {
    thresholds: [I::Table; 2],
    ranks: [I::Table; 2],
}

impl<I: Isa> Ranks<I> {
    #[inline(always)]
    fn new(isa: I, buckets: &Buckets) -> Self {
        let [thresholds, ranks] = [&buckets.thresholds, &buckets.ranks];
        Self {
            thresholds: [isa.table(&thresholds[0]), isa.table(&thresholds[1])],
            ranks: [isa.table(&ranks[0]), isa.table(&ranks[1])],
        }
    }

    #[inline(always)]
    fn of(&self, isa: I, value: I::F) -> I::I {
        let bucket = isa.to_bits(isa.fma(value, isa.splat(buckets::PER_UNIT), isa.splat(buckets::OFFSET)));
        let rank = isa.to_bits(isa.lookup_wide(self.ranks, bucket));
        isa.add_i(rank, isa.gt_bit(value, isa.lookup_wide(self.thresholds, bucket), 1))
    }
}

impl<I: Isa> Encoder<I> for Ranks<I> {
    /// NF4: the code is the rank.
    #[inline(always)]
    fn encode(&self, isa: I, scaled: I::F) -> I::I {
        self.of(isa, scaled)
    }
}

struct Fp4Encoder<I: Isa> {
    ranks: Ranks<I>,
    code_of_rank: I::Table,
}

impl<I: Isa> Fp4Encoder<I> {
    #[inline(always)]
    fn new(isa: I) -> Self {
        let mut codes = [0.0; LANES];
        for (code, magnitude) in codes.iter_mut().zip(fp4::CODE_OF_RANK) {
            *code = f32::from_bits(u32::from(magnitude));
        }
        Self { ranks: Ranks::new(isa, &fp4::BUCKETS), code_of_rank: isa.table(&codes) }
    }
}

impl<I: Isa> Encoder<I> for Fp4Encoder<I> {
    #[inline(always)]
    fn encode(&self, isa: I, scaled: I::F) -> I::I {
        let rank = self.ranks.of(isa, isa.abs(scaled));
        let magnitude = isa.to_bits(isa.lookup(self.code_of_rank, rank));
        isa.or(magnitude, isa.gt_bit(isa.splat(0.0), scaled, 8))
    }
}
