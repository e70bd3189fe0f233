//! The absmax values quantized again: centred, then 8-bit dynamic codes in blocks of 256.

use super::blockwise8::encode_block;
use super::codebook::dynamic8;
use super::finite::non_finite;
use super::quantize::absmax_bits;
use super::spec::NESTED_BLOCK_SIZE;
use crate::error::check_len;
use crate::simd::{Isa, Op};
use crate::{Exec, Result, parallel};

/// Blocks of one task.
const TASK: usize = 64 * NESTED_BLOCK_SIZE;

/// Quantizes `absmax` and returns its offset.
///
/// `offset = mean(absmax)`, summed in float64 and rounded once, so that it depends on no thread count
/// and no vector width; `codes = dynamic8(absmax - offset)` in blocks of 256 with their own
/// `nested_absmax`.
///
/// # Errors
/// [`crate::Error::NonFinite`] if a value is NaN or infinite, [`crate::Error::Length`] if a buffer does not fit.
pub fn double_quantize(exec: &Exec, absmax: &[f32], codes: &mut [u8], nested_absmax: &mut [f32]) -> Result<f32> {
    check_len("codes", absmax.len(), codes.len())?;
    check_len("nested_absmax", absmax.len().div_ceil(NESTED_BLOCK_SIZE), nested_absmax.len())?;
    let offset = mean(absmax);
    // A mean of finite magnitudes is finite, and one that is not spoils it: the sum is in float64.
    if !offset.is_finite() {
        return Err(non_finite(absmax, "absmax"));
    }
    let tasks: Vec<_> = absmax
        .chunks(TASK)
        .zip(codes.chunks_mut(TASK))
        .zip(nested_absmax.chunks_mut(TASK / NESTED_BLOCK_SIZE))
        .map(|((absmax, codes), nested_absmax)| Chunk { absmax, offset, codes, nested_absmax })
        .collect();
    // A nearest-value search in 256 entries is about sixteen operations.
    parallel::for_each(exec.threads_for(absmax.len() * 32), tasks, |task| exec.isa.run(task));
    Ok(offset)
}

fn mean(values: &[f32]) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    (values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64) as f32
}

struct Chunk<'a> {
    absmax: &'a [f32],
    offset: f32,
    codes: &'a mut [u8],
    nested_absmax: &'a mut [f32],
}

impl Op for Chunk<'_> {
    type Output = ();

    fn eval<I: Isa>(self, isa: I) {
        let map = dynamic8::map();
        isa.vectorize(
            #[inline(always)]
            || {
                let blocks = self.absmax.chunks(NESTED_BLOCK_SIZE).zip(self.codes.chunks_mut(NESTED_BLOCK_SIZE));
                for ((absmax, codes), nested) in blocks.zip(self.nested_absmax) {
                    let mut centred = [0.0_f32; NESTED_BLOCK_SIZE];
                    let centred = &mut centred[..absmax.len()];
                    for (c, a) in centred.iter_mut().zip(absmax) {
                        *c = a - self.offset;
                    }
                    *nested = f32::from_bits(absmax_bits(isa, centred).cast_unsigned());
                    encode_block(isa, map, centred, *nested, codes);
                }
            },
        );
    }
}
