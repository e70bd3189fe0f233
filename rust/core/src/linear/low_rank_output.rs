//! `dS = scaling · dY·B`, the gradient of the branch's middle.

use super::input_gradient::{multiply_row, store_rows};
use super::lora::LowRank;
use super::panel::{Source, column_panel, padded};
use super::scratch;
use super::tile::{self, DEPTH, Sliver};
use crate::parallel;
use crate::simd::Isa;

/// Writes `ds [rows, r]` from slivers of `dy [rows, n]`, `block` elements a block of depth.
pub(super) fn low_rank_output<I: Isa>(
    isa: I,
    threads: usize,
    lora: &LowRank<'_>,
    (n, block): (usize, usize),
    dy_slivers: &[f32],
    ds: &mut [f32],
) {
    let tall = tile::rows::<I>();
    let room = padded::<I>(lora.rank);
    let b = Source::plain(&lora.b, lora.rank);
    scratch::with(
        n * room,
        #[inline(always)]
        |panel| {
            isa.vectorize(
                #[inline(always)]
                || column_panel(isa, &b, (0, n), (0, lora.rank, room), room.max(1), panel),
            );
            let panel = &*panel;
            let tasks: Vec<_> = ds.chunks_mut((tall * lora.rank).max(1)).enumerate().collect();
            parallel::for_each(threads, tasks, |(i, out)| {
                isa.vectorize(
                    #[inline(always)]
                    || {
                        scratch::with(
                            tall * room,
                            #[inline(always)]
                            |tiles| {
                                tiles.fill(0.0);
                                for (block, slivers) in dy_slivers.chunks(block).enumerate() {
                                    let depth = DEPTH.min(n - block * DEPTH);
                                    let data = &slivers[i * tall * DEPTH..][..tall * DEPTH];
                                    let panel = &panel[block * DEPTH * room..][..depth * room];
                                    let left = Sliver { data, rows: tall };
                                    multiply_row(isa, depth, left, panel, room, lora.rank, tiles);
                                }
                                store_scaled::<I>(lora, tiles, out);
                            },
                        );
                    },
                );
            });
        },
    );
}

/// One sliver's rows of dS.
#[inline(always)]
fn store_scaled<I: Isa>(lora: &LowRank<'_>, tiles: &[f32], out: &mut [f32]) {
    store_rows::<I>(
        tiles,
        tile::rows::<I>(),
        lora.rank,
        #[inline(always)]
        |row, col, values| {
            let Some(line) = out.chunks_mut(lora.rank).nth(row) else { return };
            for (d, v) in line[col..].iter_mut().zip(values) {
                *d = v * lora.scaling;
            }
        },
    );
}
