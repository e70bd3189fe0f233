//! Row-wise int8: `SCB[n] = max|W[n]|`, `CB = round_half_even(W · (127 / SCB))`, decode `CB · SCB / 127`.

use std::sync::atomic::{AtomicBool, Ordering};

use super::finite::{INFINITY_BITS, non_finite};
use super::quantize::absmax_bits;
use crate::dtype::{Element, Floats, FloatsMut, narrow, with_floats};
use crate::error::{check_len, check_matrix};
use crate::simd::{Isa, LANES, Op, exceeds_caches, fill};
use crate::{Exec, Result, parallel};

/// 1 / 127 in float32: decoding multiplies by it, as the format's other readers do.
const INVERSE_127: f32 = 7.874_016e-3;

/// An int8 matrix in memory, `rows × cols`.
#[derive(Debug, Clone, Copy)]
pub struct Int8Matrix<'a> {
    codes: &'a [i8],
    scb: &'a [f32],
    cols: usize,
}

impl<'a> Int8Matrix<'a> {
    /// Checks the lengths.
    ///
    /// # Errors
    /// [`crate::Error::Length`] naming the buffer that does not fit.
    pub fn new(codes: &'a [i8], scb: &'a [f32], rows: usize, cols: usize) -> Result<Self> {
        check_matrix("codes", (rows, cols), codes.len())?;
        check_len("SCB", rows, scb.len())?;
        Ok(Self { codes, scb, cols })
    }

    /// The codes, row-major.
    pub(crate) fn codes(&self) -> &'a [i8] {
        self.codes
    }

    /// Decodes `out.len()` values of row `row` from column `col`.
    #[inline(always)]
    pub(crate) fn decode_row<I: Isa, E: Element>(&self, isa: I, row: usize, col: usize, out: &mut [E]) {
        let codes = &self.codes[row * self.cols + col..][..out.len()];
        let (scb, inverse) = (isa.splat(self.scb[row]), isa.splat(INVERSE_127));
        let (body, tail) = out.as_chunks_mut::<LANES>();
        let (codes_body, codes_tail) = codes.as_chunks::<LANES>();
        for (lanes, codes) in body.iter_mut().zip(codes_body) {
            E::store(isa, isa.mul(isa.mul(isa.load_i8(codes), scb), inverse), lanes);
        }
        for (value, code) in tail.iter_mut().zip(codes_tail) {
            *value = E::from_f32(f32::from(*code) * self.scb[row] * INVERSE_127);
        }
    }
}

/// Quantizes the matrix `src` of `scb.len()` rows. A zero row gives zeros and SCB 0.
///
/// # Errors
/// [`crate::Error::NonFinite`] naming `name`, or [`crate::Error::Length`].
pub fn quantize_int8(exec: &Exec, src: Floats<'_>, codes: &mut [i8], scb: &mut [f32], name: &str) -> Result<()> {
    check_len("codes", src.len(), codes.len())?;
    let cols = src.len().checked_div(scb.len()).unwrap_or(0);
    check_len("src", scb.len() * cols, src.len())?;
    if cols == 0 {
        scb.fill(0.0);
        return Ok(());
    }
    with_floats!(Floats, src, src => {
        let rows = rows_per_task(cols);
        let chunks = src.chunks(rows * cols).zip(codes.chunks_mut(rows * cols)).zip(scb.chunks_mut(rows));
        let tasks: Vec<_> = chunks.map(|((src, codes), scb)| Rows { src, codes, scb }).collect();
        let finite = AtomicBool::new(true);
        parallel::for_each(exec.threads_for(src.len() * 8), tasks, |task| {
            if !exec.isa.run(task) {
                finite.store(false, Ordering::Relaxed);
            }
        });
        if finite.into_inner() { Ok(()) } else { Err(non_finite(src, name)) }
    })
}

/// Whole rows of one task, of about this many elements.
fn rows_per_task(cols: usize) -> usize {
    const ELEMENTS: usize = 1 << 15;
    (ELEMENTS / cols).max(1)
}

struct Rows<'a, E> {
    src: &'a [E],
    codes: &'a mut [i8],
    scb: &'a mut [f32],
}

impl<E: Element> Op for Rows<'_, E> {
    type Output = bool;

    fn eval<I: Isa>(self, isa: I) -> bool {
        let cols = self.src.len() / self.scb.len().max(1);
        isa.vectorize(
            #[inline(always)]
            || {
                let rows = self.src.chunks(cols).zip(self.codes.chunks_mut(cols)).zip(self.scb);
                rows.fold(true, |finite, ((src, codes), scb)| encode_row(isa, src, codes, scb) && finite)
            },
        )
    }
}

/// Whether every value of the row was finite.
#[inline(always)]
fn encode_row<I: Isa, E: Element>(isa: I, src: &[E], codes: &mut [i8], scb: &mut f32) -> bool {
    let bits = absmax_bits(isa, src);
    *scb = f32::from_bits(bits.cast_unsigned());
    let (lift, factor) = scale_to_127(*scb);
    let ((body, tail), (codes_body, codes_tail)) = (src.as_chunks::<LANES>(), codes.as_chunks_mut::<LANES>());
    for (codes, values) in codes_body.iter_mut().zip(body) {
        let lifted = isa.mul(E::load(isa, values), isa.splat(lift));
        let bytes = isa.low_bytes(isa.round(isa.mul(lifted, isa.splat(factor))));
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code = byte.cast_signed();
        }
    }
    for (code, value) in codes_tail.iter_mut().zip(tail) {
        *code = (value.to_f32() * lift * factor).round_ties_even() as i8;
    }
    bits < INFINITY_BITS
}

/// Two factors whose product is 127 / `scb`, to be applied one after the other. The first is 1, exactly, unless
/// the row is so small that 127 / `scb` overflows.
#[inline(always)]
fn scale_to_127(scb: f32) -> (f32, f32) {
    /// 2^64, a power of two: it lifts such a row out of the subnormal numbers without a rounding.
    const LIFT: f32 = 18_446_744_073_709_551_616.0;
    // In this order: it is what the writers of the format compute, and a tie of the rounding shows the difference.
    let factor = |scb: f32| (1.0 / scb) * 127.0;
    if scb == 0.0 {
        (1.0, 0.0)
    } else if factor(scb).is_finite() {
        (1.0, factor(scb))
    } else {
        (LIFT, factor(scb * LIFT))
    }
}

/// `out = codes · SCB / 127`
///
/// # Errors
/// [`crate::Error::Length`] if `out` does not fit.
pub fn dequantize_int8(exec: &Exec, matrix: &Int8Matrix<'_>, out: FloatsMut<'_>) -> Result<()> {
    check_len("out", matrix.codes.len(), out.len())?;
    if matrix.cols == 0 {
        return Ok(());
    }
    with_floats!(FloatsMut, out, out => {
        let threads = exec.threads_for(out.len() * 8);
        let rows = rows_per_task(matrix.cols);
        let (elements, large) = (rows * matrix.cols, exceeds_caches(out));
        let chunks = out.chunks_mut(elements).enumerate();
        let tasks: Vec<_> = chunks.map(|(i, out)| DecodeRows { matrix, start: i * elements, out, large }).collect();
        parallel::for_each(threads, tasks, |task| exec.isa.run(task));
    });
    Ok(())
}

/// Elements from `start` on.
struct DecodeRows<'a, E> {
    matrix: &'a Int8Matrix<'a>,
    start: usize,
    out: &'a mut [E],
    large: bool,
}

impl<E: Element> Op for DecodeRows<'_, E> {
    type Output = ();

    fn eval<I: Isa>(self, isa: I) {
        isa.vectorize(
            #[inline(always)]
            || {
                fill(
                    isa,
                    self.large,
                    self.out,
                    #[inline(always)]
                    |start, out| decode_range(isa, self.matrix, self.start + start, out),
                );
            },
        );
    }
}

/// Decodes elements `start .. start + out.len()` of the flattened matrix.
#[inline(always)]
fn decode_range<I: Isa, E: Element>(isa: I, matrix: &Int8Matrix<'_>, start: usize, out: &mut [E]) {
    /// Values decoded at a time, on the stack.
    const STEP: usize = 512;
    let mut wide = [0.0_f32; STEP];
    let (mut row, mut col, mut rest) = (start / matrix.cols, start % matrix.cols, out);
    while !rest.is_empty() {
        let (now, later) = rest.split_at_mut((matrix.cols - col).min(STEP).min(rest.len()));
        let wide = &mut wide[..now.len()];
        matrix.decode_row(isa, row, col, wide);
        narrow(isa, wide, now);
        (col, rest) = (col + now.len(), later);
        if col == matrix.cols {
            (row, col) = (row + 1, 0);
        }
    }
}
