//! `x = table[code] · absmax`, rounded once to the output type.

use super::spec::{Packed, RUN};
use crate::dtype::{Element, FloatsMut, with_floats};
use crate::error::check_len;
use crate::simd::{Isa, LANES, Op, exceeds_caches, fill};
use crate::{Exec, Result, parallel};

/// Elements of one task.
const TASK: usize = 1 << 16;

/// Decodes the whole tensor into `out`, which has its number of elements.
///
/// # Errors
/// [`crate::Error::Length`] if `out` does not fit.
pub fn dequantize_4bit(exec: &Exec, packed: &Packed<'_>, out: FloatsMut<'_>) -> Result<()> {
    check_len("out", packed.numel(), out.len())?;
    with_floats!(FloatsMut, out, out => dequantize_typed(exec, packed, out));
    Ok(())
}

fn dequantize_typed<E: Element>(exec: &Exec, packed: &Packed<'_>, out: &mut [E]) {
    let threads = exec.threads_for(out.len() * 8);
    let large = exceeds_caches(out);
    let chunks = out.chunks_mut(TASK).enumerate();
    let tasks: Vec<_> = chunks.map(|(i, out)| DequantizeChunk { packed, start: i * TASK, out, large }).collect();
    parallel::for_each(threads, tasks, |task| exec.isa.run(task));
}

struct DequantizeChunk<'a, E> {
    packed: &'a Packed<'a>,
    start: usize,
    out: &'a mut [E],
    large: bool,
}

impl<E: Element> Op for DequantizeChunk<'_, E> {
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
                    |start, out| decode_range(isa, self.packed, self.start + start, out),
                );
            },
        );
    }
}

/// Values of one step of [`Element::lookup`].
const GROUP: usize = 2 * LANES;

/// Decodes elements `start .. start + out.len()` of the flattened tensor, wherever they lie in blocks
/// and bytes.
///
/// Scaling and rounding the table's sixteen entries once a block gives every `table[code] · absmax` with
/// its one rounding, without an operation an element.
#[inline(always)]
pub(crate) fn decode_range<I: Isa, E: Element>(isa: I, packed: &Packed<'_>, start: usize, out: &mut [E]) {
    // Shifts, not divisions: five of them would take as long as two hundred values.
    let log_block = packed.spec().log_block_size();
    let table = isa.table(packed.spec().quant_type().values());
    let first = (start + (1 << log_block) - 1) >> log_block;
    let (head, whole) = out.split_at_mut(((first << log_block) - start).min(out.len()));
    if !head.is_empty() {
        decode_segment(isa, packed, table, packed.scales().get(start >> log_block), start, head);
    }
    let (whole, tail) = whole.split_at_mut(whole.len() >> log_block << log_block);
    let last = first + (whole.len() >> log_block);
    let mut buffer = [0.0; RUN];
    for (i, out) in whole.chunks_mut(RUN << log_block).enumerate() {
        let first = first + i * RUN;
        let codes = &packed.codes()[(first << log_block) / 2..];
        let scales = packed.scales().run(isa, first, out.len() >> log_block, &mut buffer);
        if log_block == GROUP.trailing_zeros() {
            decode_blocks::<I, E, 1>(isa, table, scales, log_block, codes, out);
        } else {
            decode_blocks::<I, E, 2>(isa, table, scales, log_block, codes, out);
        }
    }
    if !tail.is_empty() {
        decode_segment(isa, packed, table, packed.scales().get(last), last << log_block, tail);
    }
}

/// Decodes whole blocks of `2^log_block` values, from their first byte on, until `out` is full: `STEP` groups
/// at a time. A larger block scales its table again at each step, which costs a little less than to ask
/// whether it must.
#[inline(always)]
fn decode_blocks<I: Isa, E: Element, const STEP: usize>(
    isa: I,
    table: I::Table,
    scales: &[f32],
    log_block: u32,
    codes: &[u8],
    out: &mut [E],
) {
    let log_steps = log_block - (STEP * GROUP).trailing_zeros();
    let codes = codes.as_chunks().0.as_chunks::<STEP>().0;
    let out = out.as_chunks_mut().0.as_chunks_mut::<STEP>().0;
    for (i, (codes, out)) in codes.iter().zip(out).enumerate() {
        E::lookup(isa, table, scales[i >> log_steps], codes, out);
    }
}

/// [`decode_range`] within one block.
#[inline(always)]
fn decode_segment<I: Isa, E: Element>(
    isa: I,
    packed: &Packed<'_>,
    table: I::Table,
    absmax: f32,
    start: usize,
    out: &mut [E],
) {
    let values = packed.spec().quant_type().values();
    let one = |i: usize| E::from_f32(values[usize::from(packed.code(i))] * absmax);
    // A segment may begin in the middle of a byte.
    let (head, out) = out.split_at_mut((start % 2).min(out.len()));
    if let [first] = head {
        *first = one(start);
    }
    let start = start + head.len();
    let (body, tail) = out.as_chunks_mut();
    let bytes = &packed.codes()[start / 2..].as_chunks().0[..body.len()];
    E::lookup(isa, table, absmax, bytes, body);
    let start = start + body.as_flattened().len();
    for (i, value) in tail.iter_mut().enumerate() {
        *value = one(start + i);
    }
}
