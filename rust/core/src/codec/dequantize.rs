//! `x = table[code] · absmax`, rounded once to the output type.

use super::spec::Packed;
use crate::dtype::{Element, FloatsMut, with_floats};
use crate::error::check_len;
use crate::simd::{Isa, LANES, Op};
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
    let threads = exec.threads_for(out.len());
    let tasks: Vec<_> =
        out.chunks_mut(TASK).enumerate().map(|(i, out)| DequantizeChunk { packed, start: i * TASK, out }).collect();
    parallel::for_each(threads, tasks, |task| exec.isa.run(task));
}

struct DequantizeChunk<'a, E> {
    packed: &'a Packed<'a>,
    start: usize,
    out: &'a mut [E],
}

impl<E: Element> Op for DequantizeChunk<'_, E> {
    type Output = ();

    fn eval<I: Isa>(self, isa: I) {
        isa.vectorize(
            #[inline(always)]
            || decode_range(isa, self.packed, self.start, self.out),
        );
    }
}

/// Decodes elements `start .. start + out.len()` of the flattened tensor, wherever they lie in blocks
/// and bytes.
///
/// Scaling the table's sixteen entries once a block gives every product `table[code] · absmax` with
/// its one rounding, without a multiplication an element.
#[inline(always)]
pub(crate) fn decode_range<I: Isa, E: Element>(isa: I, packed: &Packed<'_>, start: usize, out: &mut [E]) {
    let values = packed.spec().quant_type().values();
    let block_size = packed.spec().block_size();
    let table = isa.table(values);
    let (mut position, mut rest) = (start, out);
    while !rest.is_empty() {
        let block = position / block_size;
        let length = ((block + 1) * block_size - position).min(rest.len());
        let (segment, after) = rest.split_at_mut(length);
        decode_segment(isa, packed, table, packed.scales().get(block), position, segment);
        position += length;
        rest = after;
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
    let table = isa.scale_table(table, absmax);
    let (body, tail) = out.as_chunks_mut::<LANES>();
    let bytes = &packed.codes()[start / 2..][..body.len() * (LANES / 2)];
    for (eight, lanes) in bytes.as_chunks::<8>().0.iter().zip(&mut *body) {
        E::store(isa, isa.lookup(table, isa.nibbles(eight)), lanes);
    }
    let start = start + body.len() * LANES;
    for (i, value) in tail.iter_mut().enumerate() {
        *value = one(start + i);
    }
}
