//! `dS = scaling · dY·B`, and dS as the left operand of `dS·A`.

use half::bf16;

use super::backward::place;
use super::operand::{DEPTH, SLIVER, STRIDE, blocks, multiply, padded, row_panels};
use super::split;
use crate::linear::lora::LowRank;
use crate::linear::scratch;
use crate::parallel::{self, split_columns};
use crate::simd::Isa;
use crate::simd::dots::{Dots, SIDE};

/// B in panels, block after block of depth: columns of its leading parts, then of its trailing ones.
pub(super) fn pack_b<I: Isa>(isa: I, threads: usize, lora: &LowRank<'_>, n: usize, out: &mut [bf16]) {
    let rank = lora.rank;
    let tasks: Vec<_> = blocks(n).zip(out.chunks_mut((padded(2 * rank) * DEPTH).max(1))).collect();
    parallel::for_each(threads, tasks, |((row, depth), out)| {
        isa.vectorize(
            #[inline(always)]
            || {
                row_panels(
                    isa,
                    (n - row, depth),
                    2 * rank,
                    out,
                    #[inline(always)]
                    |i, line| {
                        let (high, low) = line.split_at_mut(rank);
                        split::split(isa, &lora.b[(row + i) * rank..][..rank], high, low);
                    },
                );
            },
        );
    });
}

/// The product for a chunk of rows.
pub(super) struct LowRankOutput<'a> {
    pub(super) threads: usize,
    /// The number of the chunk's first row.
    pub(super) first: usize,
    pub(super) lora: &'a LowRank<'a>,
    /// Elements of one block of depth in slivers.
    pub(super) block: usize,
    /// As [`pack_b`] writes them.
    pub(super) b_panels: &'a [bf16],
}

impl LowRankOutput<'_> {
    /// Writes `ds [rows, r]`, and its slivers, block after block of the depth of its pairs.
    pub(super) fn compute<D: Dots>(&self, dots: D, dy_slivers: &[bf16], ds: &mut [f32], ds_slivers: &mut [bf16]) {
        let rank = self.lora.rank;
        if rank == 0 {
            return;
        }
        let slivers = split_columns(ds_slivers, self.block, SLIVER);
        let tasks: Vec<_> = ds.chunks_mut(SIDE * rank).zip(slivers).enumerate().collect();
        parallel::for_each(self.threads, tasks, |(i, (ds, slivers))| {
            dots.base().vectorize(
                #[inline(always)]
                || {
                    dots.prepared(
                        #[inline(always)]
                        || self.sliver(dots, &dy_slivers[i * SLIVER..], ds),
                    );
                    if let Some(row_ranks) = &self.lora.row_ranks {
                        row_ranks.clear_others(self.first + i * SIDE, rank, ds);
                    }
                    pack_ds(dots.base(), rank, ds, slivers);
                },
            );
        });
    }

    /// dS of the rows of one sliver, the first of each block of `dy_slivers`.
    #[inline(always)]
    fn sliver<D: Dots>(&self, dots: D, dy_slivers: &[bf16], ds: &mut [f32]) {
        let rank = self.lora.rank;
        let room = padded(2 * rank);
        scratch::with(
            SIDE * room,
            #[inline(always)]
            |tiles| {
                tiles.fill(0.0);
                let mut rest = self.b_panels;
                for (left, (row, depth)) in dy_slivers.chunks(self.block).zip(blocks(rest.len() / room)) {
                    let (panels, after) = rest.split_at(depth * room);
                    rest = after;
                    multiply(dots, (0, depth, depth), &left[..SLIVER], panels, 2 * rank, tiles, row > 0);
                }
                for (row, line) in ds.chunks_mut(rank).enumerate() {
                    for (j, value) in line.iter_mut().enumerate() {
                        let part = |col| tiles[place(row, col, 2 * rank)];
                        *value = self.lora.scaling * (part(j) + part(rank + j));
                    }
                }
            },
        );
    }
}

/// The rows of dS of one sliver, in pairs: `slivers[b]` is block b of their depth.
#[inline(always)]
fn pack_ds<I: Isa>(isa: I, rank: usize, ds: &[f32], mut slivers: Vec<&mut [bf16]>) {
    let height = split::depth(rank);
    scratch::with_bf16(
        height,
        #[inline(always)]
        |line| {
            for row in 0..SIDE {
                match ds.chunks(rank).nth(row) {
                    Some(values) => split::doubled(isa, values, line),
                    None => line.fill(bf16::ZERO),
                }
                for ((from, depth), sliver) in blocks(height).zip(&mut slivers) {
                    sliver[row * STRIDE..][..depth].copy_from_slice(&line[from..][..depth]);
                }
            }
        },
    );
}
