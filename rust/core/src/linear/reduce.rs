//! Products that sum over rows: `out[i, c] = Σ_m left[m, i] · src[m, c]`, for dA (left dS, src drop(x)) and
//! dB (left S, src dY; scaled when stored).

use super::panel::{Source, column_panel, column_sliver};
use super::scratch;
use super::tile::{self, DEPTH, Panel, Sliver, width_for};
use crate::dtype::Element;
use crate::parallel;
use crate::simd::{Isa, LANES};

/// Columns of a task at the most.
pub(super) const COLUMNS: usize = 256;

/// Row stride of the panels: not a power of two, so that a column does not fall into one cache set.
const STRIDE: usize = COLUMNS + LANES;

/// Columns of a task when `cols` columns are to be shared evenly among a few threads.
pub(super) fn columns_per_task(cols: usize) -> usize {
    (cols / 4).next_multiple_of(2 * LANES).clamp(2 * LANES, COLUMNS)
}

/// A task's part of the result: `rank` rows of at most [`COLUMNS`] columns.
pub(super) struct Part<'a> {
    tiles: &'a [f32],
    tall: usize,
    room: usize,
}

impl Part<'_> {
    /// Element `(i, c)`.
    #[inline(always)]
    pub(super) fn get<I: Isa>(&self, i: usize, c: usize, cols: usize) -> f32 {
        let full = tile::cols::<I>();
        let first = c / full * full;
        let width = width_for::<I>(cols - first);
        self.tiles[i / self.tall * self.tall * self.room + first * self.tall + i % self.tall * width + c - first]
    }
}

/// Computes the product for each task's columns and hands it to `store` with the task's destination.
///
/// `left` is `[rows, rank]`, row-major; task t owns columns `t·width ..`.
pub(super) fn over_rows<I: Isa, E: Element, T: Send>(
    isa: I,
    threads: usize,
    (left, rank): (&[f32], usize),
    source: &Source<'_, E>,
    (rows, width): (usize, usize),
    destinations: Vec<T>,
    store: impl Fn(&Part<'_>, usize, T) + Sync,
) {
    let tall = tile::rank_rows::<I>();
    let slivers = rank.div_ceil(tall);
    scratch::with(
        rows.div_ceil(DEPTH) * slivers * tall * DEPTH,
        #[inline(always)]
        |packed| {
            for (i, sliver) in packed.chunks_mut(tall * DEPTH).enumerate() {
                let row = i / slivers * DEPTH;
                let span = (row, DEPTH.min(rows - row));
                isa.vectorize(
                    #[inline(always)]
                    || column_sliver(left, rank, i % slivers * tall, span, sliver),
                );
            }
            let packed = &*packed;
            let tasks: Vec<_> = destinations.into_iter().enumerate().collect();
            parallel::for_each(threads, tasks, |(task, destination)| {
                let col = task * width;
                let cols = width.min(source.cols - col);
                let room = super::panel::padded::<I>(cols);
                isa.vectorize(
                    #[inline(always)]
                    || {
                        scratch::with(
                            slivers * tall * room,
                            #[inline(always)]
                            |tiles| {
                                tiles.fill(0.0);
                                scratch::with(
                                    DEPTH * STRIDE,
                                    #[inline(always)]
                                    |panel| {
                                        for (row, slivers) in
                                            (0..rows).step_by(DEPTH).zip(packed.chunks(slivers * tall * DEPTH))
                                        {
                                            let depth = DEPTH.min(rows - row);
                                            column_panel(isa, source, (row, depth), (col, cols, room), STRIDE, panel);
                                            multiply(isa, depth, slivers, panel, cols, tiles);
                                        }
                                    },
                                );
                                store(&Part { tiles, tall, room }, cols, destination);
                            },
                        );
                    },
                );
            });
        },
    );
}

#[inline(always)]
fn multiply<I: Isa>(isa: I, depth: usize, slivers: &[f32], panel: &[f32], cols: usize, tiles: &mut [f32]) {
    let (tall, room) = (tile::rank_rows::<I>(), super::panel::padded::<I>(cols));
    for (data, tiles) in slivers.chunks(tall * DEPTH).zip(tiles.chunks_mut(tall * room)) {
        for first in (0..cols).step_by(tile::cols::<I>()) {
            let width = width_for::<I>(cols - first);
            let panel = Panel { data: &panel[first..], stride: STRIDE };
            let acc = &mut tiles[first * tall..][..tall * width];
            tile::multiply(isa, depth, Sliver { data, rows: tall }, panel, width, acc);
        }
    }
}
