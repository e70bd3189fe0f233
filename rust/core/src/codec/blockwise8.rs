//! 8-bit block-wise quantization with the dynamic map: `code = dynamic8(x / absmax)`.

use std::sync::atomic::{AtomicBool, Ordering};

use super::codebook::dynamic8;
use super::finite::{INFINITY_BITS, non_finite};
use super::quantize::{SMALLEST_ABSMAX, absmax_bits};
use crate::dtype::{Element, Floats, FloatsMut, widen, with_floats};
use crate::error::check_len;
use crate::simd::{Isa, Op};
use crate::{Error, Exec, Result, parallel};

/// Blocks up to this long are widened on the stack.
const LONGEST: usize = 4096;

fn check_block_size(block_size: usize) -> Result<()> {
    if (1..=LONGEST).contains(&block_size) {
        return Ok(());
    }
    Err(Error::Range { what: "block_size", expected: "from 1 to 4096", got: block_size.to_string() })
}

/// Quantizes `src` to one byte an element and one float32 absmax a block.
///
/// # Errors
/// [`Error::NonFinite`], [`Error::Length`], or [`Error::Range`] for the block size.
pub fn quantize_blockwise(
    exec: &Exec,
    src: Floats<'_>,
    block_size: usize,
    codes: &mut [u8],
    absmax: &mut [f32],
    name: &str,
) -> Result<()> {
    check_block_size(block_size)?;
    check_len("codes", src.len(), codes.len())?;
    check_len("absmax", src.len().div_ceil(block_size), absmax.len())?;
    with_floats!(Floats, src, src => {
        let tasks: Vec<_> = src
            .chunks(block_size)
            .zip(codes.chunks_mut(block_size))
            .zip(absmax)
            .map(|((src, codes), absmax)| Block { src, codes, absmax })
            .collect();
        let finite = AtomicBool::new(true);
        parallel::for_each(exec.threads_for(src.len() * 16), tasks, |task| {
            if !exec.isa.run(task) {
                finite.store(false, Ordering::Relaxed);
            }
        });
        if finite.into_inner() { Ok(()) } else { Err(non_finite(src, name)) }
    })
}

struct Block<'a, E> {
    src: &'a [E],
    codes: &'a mut [u8],
    absmax: &'a mut f32,
}

impl<E: Element> Op for Block<'_, E> {
    type Output = bool;

    fn eval<I: Isa>(self, isa: I) -> bool {
        let map = dynamic8::map();
        isa.vectorize(
            #[inline(always)]
            || {
                let mut wide = [0.0_f32; LONGEST];
                let wide = &mut wide[..self.src.len()];
                widen(isa, self.src, wide);
                let bits = absmax_bits(isa, wide);
                *self.absmax = f32::from_bits(bits.cast_unsigned());
                encode_block(map, wide, *self.absmax, self.codes);
                bits < INFINITY_BITS
            },
        )
    }
}

/// `codes[i] = nearest(values[i] · (1 / absmax))`
#[inline(always)]
pub(super) fn encode_block(map: &dynamic8::Map, values: &[f32], absmax: f32, codes: &mut [u8]) {
    let inverse = 1.0 / absmax.max(SMALLEST_ABSMAX);
    for (code, value) in codes.iter_mut().zip(values) {
        *code = map.encode(value * inverse);
    }
}

/// `out[i] = dynamic8[codes[i]] · absmax[i / block_size]`
///
/// # Errors
/// [`Error::Length`], or [`Error::Range`] for the block size.
pub fn dequantize_blockwise(
    exec: &Exec,
    codes: &[u8],
    absmax: &[f32],
    block_size: usize,
    out: FloatsMut<'_>,
) -> Result<()> {
    check_block_size(block_size)?;
    check_len("out", codes.len(), out.len())?;
    check_len("absmax", codes.len().div_ceil(block_size), absmax.len())?;
    let values = &dynamic8::map().values;
    with_floats!(FloatsMut, out, out => {
        let tasks: Vec<_> = out.chunks_mut(block_size).zip(codes.chunks(block_size)).zip(absmax).collect();
        parallel::for_each(exec.threads_for(codes.len()), tasks, |((out, codes), absmax)| {
            for (value, code) in out.iter_mut().zip(codes) {
                *value = Element::from_f32(values[usize::from(*code)] * absmax);
            }
        });
    });
    Ok(())
}
