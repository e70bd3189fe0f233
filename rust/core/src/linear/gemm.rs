//! Forward for many rows: `yᵀ = W·xᵀ`, so that the weight is decoded along its rows, in the order it is
//! stored, and x, which is small, is the operand that is transposed.
//!
//! A chunk of x's rows is transposed into panels once. Each task owns a range of output columns (rows
//! of W): per block of depth it decodes its rows into slivers and multiplies them with every panel.
//! The low-rank branch is more depth: slivers of `scaling·B` times panels of Sᵀ.

use super::forward::Problem;
use super::lora::LowRank;
use super::panel::{Source, padded, row_sliver, transpose, weight_sliver};
use super::scratch;
use super::tile::{self, DEPTH, Panel, Sliver, width_for};
use crate::dtype::{Element, narrow};
use crate::exec::Exec;
use crate::parallel::{self, split_columns};
use crate::simd::{Isa, LANES, Op};

/// Rows of x in panels at a time. At one depth block they, the decoded slivers and the tiles are half a megabyte: a
/// second-level cache may be that small, or shared. Decoding again for the next chunk costs 1/64 of its arithmetic.
const CHUNK: usize = 192;

/// Slivers of a task at the most: their decoded rows and their tiles stay in the second-level cache.
const MOST_SLIVERS: usize = 12;

/// Tasks to aim for, so that any small number of threads is evenly loaded.
const TASKS: usize = 8;

pub(super) fn forward<E: Element>(exec: &Exec, problem: &Problem<'_>, x: &[E], y: &mut [E], s: Option<&mut [E]>) {
    let (n, k) = (problem.weight.out_features(), problem.weight.in_features());
    let rank = problem.lora.map_or(0, |lora| lora.rank);
    let threads = exec.threads_for(problem.rows * n * k / 8);
    let mut s = s.unwrap_or_default();
    let mut y = y;
    for first in (0..problem.rows).step_by(CHUNK) {
        let rows = CHUNK.min(problem.rows - first);
        let (y_now, y_after) = y.split_at_mut(rows * n);
        let (s_now, s_after) = s.split_at_mut((rows * rank).min(s.len()));
        (y, s) = (y_after, s_after);
        let x = &x[first * k..][..rows * k];
        exec.isa.run(Chunk { threads, problem, first, rows, x, y: y_now, s: s_now });
    }
}

/// Up to [`CHUNK`] rows from row `first`.
struct Chunk<'a, E> {
    threads: usize,
    problem: &'a Problem<'a>,
    first: usize,
    rows: usize,
    x: &'a [E],
    y: &'a mut [E],
    /// Empty if S is not asked for.
    s: &'a mut [E],
}

impl<E: Element> Op for Chunk<'_, E> {
    type Output = ();

    fn eval<I: Isa>(self, isa: I) {
        let (n, k) = (self.problem.weight.out_features(), self.problem.weight.in_features());
        let room = padded::<I>(self.rows);
        let plain = Source::plain(self.x, k);
        let rank = self.problem.lora.map_or(0, |lora| lora.rank);
        scratch::with(
            room * k,
            #[inline(always)]
            |x_panels| {
                pack(isa, self.threads, &plain, self.rows, x_panels);
                scratch::with(
                    room * rank.next_multiple_of(tile::rank_rows::<I>()),
                    #[inline(always)]
                    |s_panels| {
                        if let Some(lora) = self.problem.lora {
                            if lora.dropout.is_some() {
                                let dropped = Source { first_row: self.first, dropout: lora.dropout, ..plain };
                                scratch::with(
                                    room * k,
                                    #[inline(always)]
                                    |panels| {
                                        pack(isa, self.threads, &dropped, self.rows, panels);
                                        low_rank_input(
                                            isa,
                                            self.threads,
                                            lora,
                                            (self.first, self.rows),
                                            k,
                                            panels,
                                            s_panels,
                                        );
                                    },
                                );
                            } else {
                                low_rank_input(isa, self.threads, lora, (self.first, self.rows), k, x_panels, s_panels);
                            }
                            store_s(isa, s_panels, self.rows, rank, self.s);
                        }
                        let slivers = n.div_ceil(tile::rows::<I>()).div_ceil(TASKS).clamp(1, MOST_SLIVERS);
                        let width = slivers * tile::rows::<I>();
                        let tasks: Vec<_> = split_columns(self.y, n, width).into_iter().enumerate().collect();
                        let (problem, rows) = (self.problem, self.rows);
                        let operands = Operands { problem, rows, x_panels, s_panels };
                        parallel::for_each(self.threads, tasks, |(i, y)| {
                            isa.vectorize(
                                #[inline(always)]
                                || operands.columns(isa, i * width, slivers, y),
                            );
                        });
                    },
                );
            },
        );
    }
}

/// Transposes the source into panels, one depth block after another.
fn pack<I: Isa, E: Element>(isa: I, threads: usize, source: &Source<'_, E>, rows: usize, out: &mut [f32]) {
    let tasks: Vec<_> = out.chunks_mut(padded::<I>(rows) * DEPTH).enumerate().collect();
    parallel::for_each(threads, tasks, |(block, out)| {
        let depth = DEPTH.min(source.cols - block * DEPTH);
        isa.vectorize(
            #[inline(always)]
            || transpose(isa, source, rows, (block * DEPTH, depth), out),
        );
    });
}

/// `Sᵀ = A·xᵀ` as panels: for each panel of x, `rank` rows of its width (then rows that are not used).
fn low_rank_input<I: Isa>(
    isa: I,
    threads: usize,
    lora: &LowRank<'_>,
    (first_row, rows): (usize, usize),
    k: usize,
    x_panels: &[f32],
    s_panels: &mut [f32],
) {
    let (tall, full) = (tile::rank_rows::<I>(), tile::cols::<I>());
    let room = padded::<I>(rows);
    let height = lora.rank.next_multiple_of(tall);
    let a = Source::plain(&lora.a, k);
    let tasks: Vec<_> = s_panels.chunks_mut((full * height).max(1)).enumerate().collect();
    parallel::for_each(threads, tasks, |(panel, out)| {
        let first = panel * full;
        let width = width_for::<I>(rows - first);
        isa.vectorize(
            #[inline(always)]
            || {
                out.fill(0.0);
                scratch::with(
                    tall * DEPTH,
                    #[inline(always)]
                    |sliver| {
                        for col in (0..k).step_by(DEPTH) {
                            let depth = DEPTH.min(k - col);
                            let data = &x_panels[room * col + first * depth..][..depth * width];
                            for (row, acc) in (0..lora.rank).step_by(tall).zip(out.chunks_mut(tall * width)) {
                                row_sliver(isa, &a, (row, lora.rank), (col, depth), 1.0, sliver);
                                let sliver = Sliver { data: sliver, rows: tall };
                                tile::multiply(isa, depth, sliver, Panel { data, stride: width }, width, acc);
                            }
                        }
                    },
                );
                if let Some(row_ranks) = &lora.row_ranks {
                    row_ranks.clear_others_across(
                        (first_row + first, rows - first),
                        width,
                        &mut out[..lora.rank * width],
                    );
                }
            },
        );
    });
}

/// Writes S, row-major, from its panels. Does nothing if it is not asked for.
fn store_s<I: Isa, E: Element>(isa: I, s_panels: &[f32], rows: usize, rank: usize, s: &mut [E]) {
    if s.is_empty() {
        return;
    }
    let height = rank.next_multiple_of(tile::rank_rows::<I>());
    let full = tile::cols::<I>();
    isa.vectorize(
        #[inline(always)]
        || {
            let mut line = vec![0.0_f32; rank];
            for (row, out) in s.chunks_mut(rank).enumerate() {
                let first = row / full * full;
                let width = width_for::<I>(rows - first);
                let panel = &s_panels[first * height..];
                for (j, value) in line.iter_mut().enumerate() {
                    *value = panel[j * width + row - first];
                }
                narrow(isa, &line, out);
            }
        },
    );
}

/// What every task of a chunk reads.
struct Operands<'a> {
    problem: &'a Problem<'a>,
    rows: usize,
    x_panels: &'a [f32],
    s_panels: &'a [f32],
}

impl Operands<'_> {
    /// Output columns from `n0`, `slivers` slivers of them: `y[m]` is row m's part.
    #[inline(always)]
    fn columns<I: Isa, E: Element>(&self, isa: I, n0: usize, slivers: usize, y: Vec<&mut [E]>) {
        let tall = tile::rows::<I>();
        scratch::with(
            slivers * tall * padded::<I>(self.rows),
            #[inline(always)]
            |tiles| {
                tiles.fill(0.0);
                scratch::with(
                    slivers * tall * DEPTH,
                    #[inline(always)]
                    |w| {
                        self.add_weight(isa, n0, w, tiles);
                        self.add_low_rank(isa, n0, w, tiles);
                    },
                );
                self.store(isa, n0, slivers, tiles, y);
            },
        );
    }

    #[inline(always)]
    fn add_weight<I: Isa>(&self, isa: I, n0: usize, w: &mut [f32], tiles: &mut [f32]) {
        let weight = self.problem.weight;
        let (tall, k) = (tile::rows::<I>(), weight.in_features());
        let room = padded::<I>(self.rows);
        for col in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - col);
            for (i, sliver) in w.chunks_mut(tall * DEPTH).enumerate() {
                weight_sliver(isa, weight, n0 + i * tall, (col, depth), sliver);
            }
            self.multiply(isa, (0, depth), w, &self.x_panels[room * col..][..room * depth], depth, tiles);
        }
    }

    #[inline(always)]
    fn add_low_rank<I: Isa>(&self, isa: I, n0: usize, w: &mut [f32], tiles: &mut [f32]) {
        let Some(lora) = self.problem.lora else { return };
        let tall = tile::rows::<I>();
        let n = self.problem.weight.out_features();
        let height = lora.rank.next_multiple_of(tile::rank_rows::<I>());
        let b = Source::plain(&lora.b, lora.rank);
        for col in (0..lora.rank).step_by(DEPTH) {
            let depth = DEPTH.min(lora.rank - col);
            for (i, sliver) in w.chunks_mut(tall * DEPTH).enumerate() {
                row_sliver(isa, &b, (n0 + i * tall, n), (col, depth), lora.scaling, sliver);
            }
            self.multiply(isa, (col, depth), w, self.s_panels, height, tiles);
        }
    }

    /// Every sliver times rows `from .. from + depth` of every panel; panels are `height` rows high.
    #[inline(always)]
    fn multiply<I: Isa>(
        &self,
        isa: I,
        (from, depth): (usize, usize),
        w: &[f32],
        panels: &[f32],
        height: usize,
        tiles: &mut [f32],
    ) {
        let (tall, full) = (tile::rows::<I>(), tile::cols::<I>());
        let room = padded::<I>(self.rows);
        for (data, tiles) in w.chunks(tall * DEPTH).zip(tiles.chunks_mut(tall * room)) {
            let sliver = Sliver { data, rows: tall };
            for first in (0..self.rows).step_by(full) {
                let width = width_for::<I>(self.rows - first);
                let data = &panels[first * height + from * width..][..depth * width];
                let acc = &mut tiles[first * tall..][..tall * width];
                tile::multiply(isa, depth, sliver, Panel { data, stride: width }, width, acc);
            }
        }
    }

    /// Transposes the tiles into the rows of y, adds the bias, and rounds.
    #[inline(always)]
    fn store<I: Isa, E: Element>(&self, isa: I, n0: usize, slivers: usize, tiles: &[f32], mut y: Vec<&mut [E]>) {
        let (tall, full) = (tile::rows::<I>(), tile::cols::<I>());
        let room = padded::<I>(self.rows);
        // A vector is stored whole: what it holds past its sliver is overwritten by the next one.
        let stride = slivers * tall + LANES;
        scratch::with(
            LANES * stride,
            #[inline(always)]
            |lines| {
                for (first, rows) in (0..self.rows).step_by(LANES).zip(y.chunks_mut(LANES)) {
                    let panel = first / full * full;
                    let width = width_for::<I>(self.rows - panel);
                    for (i, tiles) in tiles.chunks(tall * room).enumerate() {
                        let tile = &tiles[panel * tall..][..tall * width];
                        let mut block = [isa.splat(0.0); LANES];
                        for (lanes, sums) in block.iter_mut().zip(tile.chunks(width)) {
                            *lanes = isa.load(sums[first - panel..].first_chunk().expect("a vector of the tile"));
                        }
                        let block = isa.transpose(block);
                        for (lanes, line) in block.into_iter().zip(lines.chunks_mut(stride)) {
                            isa.store(lanes, line[i * tall..].first_chunk_mut().expect("room for a vector"));
                        }
                    }
                    for (line, out) in lines.chunks_mut(stride).zip(rows) {
                        let line = &mut line[..out.len()];
                        if let Some(bias) = self.problem.bias {
                            for (value, b) in line.iter_mut().zip(&bias[n0..]) {
                                *value += b;
                            }
                        }
                        narrow(isa, line, out);
                    }
                }
            },
        );
    }
}
