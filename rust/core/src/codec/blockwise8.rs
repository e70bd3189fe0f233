//! 8-bit block-wise quantization with the dynamic map: `code = dynamic8(x / absmax)`.

use std::sync::atomic::{AtomicBool, Ordering};

use super::codebook::dynamic8;
use super::finite::{INFINITY_BITS, non_finite};
use super::quantize::{SMALLEST_ABSMAX, absmax_bits};
use crate::dtype::{Element, Floats, FloatsMut, with_floats};
use crate::error::check_len;
use crate::simd::{Isa, Op, exceeds_caches, fill};
use crate::{Error, Exec, Result, parallel};

/// The longest block.
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
        let (blocks, elements) = task_size(block_size);
        let tasks: Vec<_> = src
            .chunks(elements)
            .zip(codes.chunks_mut(elements))
            .zip(absmax.chunks_mut(blocks))
            .map(|((src, codes), absmax)| Blocks { src, codes, absmax, block_size })
            .collect();
        let finite = AtomicBool::new(true);
        parallel::for_each(exec.threads_for(src.len() * 32), tasks, |task| {
            if !exec.isa.run(task) {
                finite.store(false, Ordering::Relaxed);
            }
        });
        if finite.into_inner() { Ok(()) } else { Err(non_finite(src, name)) }
    })
}

/// Whole blocks of one task, of about this many elements: blocks, elements.
fn task_size(block_size: usize) -> (usize, usize) {
    const ELEMENTS: usize = 1 << 14;
    let blocks = (ELEMENTS / block_size).max(1);
    (blocks, blocks * block_size)
}

struct Blocks<'a, E> {
    src: &'a [E],
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
    block_size: usize,
}

impl<E: Element> Op for Blocks<'_, E> {
    type Output = bool;

    fn eval<I: Isa>(self, isa: I) -> bool {
        let map = dynamic8::map();
        isa.vectorize(
            #[inline(always)]
            || {
                let blocks = self.src.chunks(self.block_size).zip(self.codes.chunks_mut(self.block_size));
                let mut largest = 0;
                for ((src, codes), absmax) in blocks.zip(self.absmax) {
                    let bits = absmax_bits(isa, src);
                    *absmax = f32::from_bits(bits.cast_unsigned());
                    encode_block(isa, map, src, *absmax, codes);
                    largest = largest.max(bits);
                }
                largest < INFINITY_BITS
            },
        )
    }
}

/// `codes[i] = nearest(values[i] · (1 / absmax))`
#[inline(always)]
pub(super) fn encode_block<I: Isa, E: Element>(
    isa: I,
    map: &dynamic8::Map,
    values: &[E],
    absmax: f32,
    codes: &mut [u8],
) {
    let inverse = 1.0 / absmax.max(SMALLEST_ABSMAX);
    let ((body, tail), (codes_body, codes_tail)) = (values.as_chunks(), codes.as_chunks_mut());
    for (codes, values) in codes_body.iter_mut().zip(body) {
        let scaled = isa.mul(E::load(isa, values), isa.splat(inverse));
        *codes = isa.low_bytes(map.encode_lanes(isa, scaled));
    }
    for (code, value) in codes_tail.iter_mut().zip(tail) {
        *code = map.encode(value.to_f32() * inverse);
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
    with_floats!(FloatsMut, out, out => {
        let ((blocks, elements), large) = (task_size(block_size), exceeds_caches(out));
        let tasks: Vec<_> = out
            .chunks_mut(elements)
            .zip(codes.chunks(elements))
            .zip(absmax.chunks(blocks))
            .map(|((out, codes), absmax)| DecodeBlocks { codes, absmax, block_size, out, large })
            .collect();
        parallel::for_each(exec.threads_for(codes.len() * 8), tasks, |task| exec.isa.run(task));
    });
    Ok(())
}

/// Whole blocks but for the tensor's last.
struct DecodeBlocks<'a, E> {
    codes: &'a [u8],
    absmax: &'a [f32],
    block_size: usize,
    out: &'a mut [E],
    large: bool,
}

impl<E: Element> Op for DecodeBlocks<'_, E> {
    type Output = ();

    fn eval<I: Isa>(self, isa: I) {
        let Self { codes, absmax, block_size, out, large } = self;
        isa.vectorize(
            #[inline(always)]
            || {
                fill(
                    isa,
                    large,
                    out,
                    #[inline(always)]
                    |start, out| {
                        let (mut block, mut rest) = (start / block_size, out);
                        let mut codes = &codes[start..][..rest.len()];
                        let mut length = block_size - start % block_size;
                        while !rest.is_empty() {
                            let (now, later) = rest.split_at_mut(length.min(rest.len()));
                            let (now_codes, later_codes) = codes.split_at(now.len());
                            decode_block(isa, now_codes, absmax[block], now);
                            (block, length, rest, codes) = (block + 1, block_size, later, later_codes);
                        }
                    },
                );
            },
        );
    }
}

/// Decodes within one block.
#[inline(always)]
fn decode_block<I: Isa, E: Element>(isa: I, codes: &[u8], absmax: f32, out: &mut [E]) {
    let values = &dynamic8::map().values;
    let ((body, tail), (codes, codes_tail)) = (out.as_chunks_mut(), codes.as_chunks());
    for (lanes, codes) in body.iter_mut().zip(codes) {
        E::store(isa, isa.mul(isa.gather(values, isa.load_u8(codes)), isa.splat(absmax)), lanes);
    }
    for (value, code) in tail.iter_mut().zip(codes_tail) {
        *value = E::from_f32(values[usize::from(*code)] * absmax);
    }
}
