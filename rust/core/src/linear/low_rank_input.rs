//! `S = drop(x)·Aᵀ` for few rows: dot products along K, the order in which both operands are stored.

use super::lora::LowRank;
use super::panel::Source;
use super::scratch;
use crate::dtype::{Element, narrow};
use crate::parallel;
use crate::simd::{Isa, LANES};

/// Rows of A at a time: so many chains of multiply-adds overlap, and share their loads of x.
const TOGETHER: usize = 4;

/// S in float32, `[m, r]`; also writes it to `s`, rounded, unless that is empty.
pub(super) fn low_rank_input<I: Isa, E: Element>(
    isa: I,
    threads: usize,
    lora: &LowRank<'_>,
    source: &Source<'_, E>,
    m: usize,
    s: &mut [E],
) -> Vec<f32> {
    let k = source.cols;
    let source = Source { dropout: lora.dropout, ..*source };
    let mut product = vec![0.0_f32; m * lora.rank];
    let tasks: Vec<_> = product.chunks_mut(lora.rank.max(1)).enumerate().collect();
    parallel::for_each(threads, tasks, |(row, out)| {
        isa.vectorize(
            #[inline(always)]
            || {
                scratch::with(
                    k,
                    #[inline(always)]
                    |line| {
                        source.read(isa, row, 0, line);
                        let own = lora.row_ranks.as_ref().map_or(0..lora.rank, |row_ranks| row_ranks.of(row));
                        dots(isa, line, &lora.a[own.start * k..own.end * k], &mut out[own]);
                    },
                );
            },
        );
    });
    if !s.is_empty() {
        isa.vectorize(
            #[inline(always)]
            || narrow(isa, &product, s),
        );
    }
    product
}

/// `out[j] = Σ x[i] · a[j, i]`
#[inline(always)]
fn dots<I: Isa>(isa: I, x: &[f32], a: &[f32], out: &mut [f32]) {
    let k = x.len();
    let (groups, rest) = out.as_chunks_mut::<TOGETHER>();
    for (j, values) in groups.iter_mut().enumerate() {
        *values = dots_of(isa, x, &a[j * TOGETHER * k..][..TOGETHER * k]);
    }
    let first = groups.len() * TOGETHER;
    for (j, value) in rest.iter_mut().enumerate() {
        [*value] = dots_of(isa, x, &a[(first + j) * k..][..k]);
    }
}

/// Dot products with `R` rows: sixteen lanes each, the tail by itself.
#[inline(always)]
fn dots_of<I: Isa, const R: usize>(isa: I, x: &[f32], a: &[f32]) -> [f32; R] {
    let (body, tail) = x.as_chunks::<LANES>();
    let mut rows: [&[f32]; R] = [&[]; R];
    for (row, part) in rows.iter_mut().zip(a.chunks(x.len().max(1))) {
        *row = part;
    }
    let mut bodies: [&[[f32; LANES]]; R] = [&[]; R];
    for r in 0..R {
        bodies[r] = &rows[r].as_chunks().0[..body.len()];
    }
    let mut sums = [isa.splat(0.0); R];
    for (i, x) in body.iter().enumerate() {
        let x = isa.load(x);
        for r in 0..R {
            sums[r] = isa.fma(x, isa.load(&bodies[r][i]), sums[r]);
        }
    }
    let mut out = [0.0; R];
    for r in 0..R {
        let row_tail = &rows[r][body.len() * LANES..];
        out[r] = tail.iter().zip(row_tail).fold(isa.reduce_sum(sums[r]), |sum, (x, a)| x.mul_add(*a, sum));
    }
    out
}
