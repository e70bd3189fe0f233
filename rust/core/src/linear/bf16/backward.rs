//! Backward: `dS = scaling · dY·B` and `dX = dY·deq(W) + mask ⊙ (dS·A)`.
//!
//! dY is the left operand of both. The weight is decoded along its rows, and two of them make a row of a
//! panel, whose columns are columns of dX.

use half::bf16;

use super::gradients::compute;
use super::operand::{DEPTH, SLIVER, STRIDE, Source, blocks, multiply, padded, row_panels, sliver, width_for};
use super::split;
use crate::dtype::narrow;
use crate::exec::Exec;
use crate::linear::dropout;
use crate::linear::lora::{Dropout, LowRank};
use crate::linear::low_rank_gradients::TypedGradients;
use crate::linear::reduce::{COLUMNS, columns_per_task};
use crate::linear::scratch;
use crate::linear::weight::Weight;
use crate::parallel::{self, split_columns};
use crate::simd::dots::{Dots, SIDE, STEP};
use crate::simd::{DotsOp, Isa};

/// Rows of dY in slivers at a time.
const CHUNK: usize = 512;

/// A backward call.
pub(in crate::linear) struct Backward<'a> {
    pub(in crate::linear) exec: &'a Exec,
    pub(in crate::linear) rows: usize,
    pub(in crate::linear) dy: &'a [bf16],
    pub(in crate::linear) weight: &'a Weight<'a>,
    /// Empty if not asked for.
    pub(in crate::linear) dx: &'a mut [bf16],
    pub(in crate::linear) branch: Option<TypedGradients<'a, bf16>>,
}

impl DotsOp for Backward<'_> {
    fn eval<D: Dots>(self, dots: D) {
        let (n, k) = (self.weight.out_features(), self.weight.in_features());
        let threads = self.exec.threads_for((self.rows + SIDE) * n * k / 64);
        let lora = self.branch.as_ref().map(TypedGradients::lora);
        let rank = lora.map_or(0, LowRank::rank);
        let mut ds = vec![0.0_f32; self.rows * rank];
        scratch::with_bf16(
            padded(2 * rank) * n.next_multiple_of(STEP),
            #[inline(always)]
            |b_panels| {
                if let Some(lora) = lora {
                    pack_b(dots.base(), threads, lora, n, b_panels);
                }
                let mut dx = self.dx;
                for first in (0..self.rows).step_by(CHUNK) {
                    let rows = CHUNK.min(self.rows - first);
                    let (dx_now, dx_after) = dx.split_at_mut((rows * k).min(dx.len()));
                    dx = dx_after;
                    let ds = &mut ds[first * rank..][..rows * rank];
                    let dy = Source::plain(&self.dy[first * n..][..rows * n], n);
                    Chunk { threads, weight: self.weight, lora, first, rows, dy, b_panels }.eval(dots, ds, dx_now);
                }
            },
        );
        if let Some(branch) = self.branch {
            compute(dots, threads, self.rows, branch, &Source::plain(self.dy, n), &ds, k);
        }
    }
}

/// B in panels, block after block of depth: columns of its leading parts, then of its trailing ones.
fn pack_b<I: Isa>(isa: I, threads: usize, lora: &LowRank<'_>, n: usize, out: &mut [bf16]) {
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

/// Up to [`CHUNK`] rows from row `first`.
struct Chunk<'a> {
    threads: usize,
    weight: &'a Weight<'a>,
    lora: Option<&'a LowRank<'a>>,
    first: usize,
    rows: usize,
    dy: Source<'a>,
    b_panels: &'a [bf16],
}

impl Chunk<'_> {
    fn eval<D: Dots>(&self, dots: D, ds: &mut [f32], dx: &mut [bf16]) {
        let isa = dots.base();
        let (n, k) = (self.weight.out_features(), self.weight.in_features());
        let height = self.rows.next_multiple_of(SIDE);
        scratch::with_bf16(
            n.div_ceil(DEPTH) * height * STRIDE,
            #[inline(always)]
            |dy_slivers| {
                let tasks: Vec<_> = blocks(n).zip(dy_slivers.chunks_mut(height * STRIDE)).collect();
                parallel::for_each(self.threads, tasks, |((col, depth), out)| {
                    isa.vectorize(
                        #[inline(always)]
                        || {
                            sliver(
                                self.rows,
                                depth,
                                out,
                                #[inline(always)]
                                |row, line| self.dy.read(row, col, line),
                            );
                        },
                    );
                });
                if let Some(lora) = self.lora {
                    self.low_rank_output(dots, lora, dy_slivers, ds);
                }
                if dx.is_empty() {
                    return;
                }
                let width = columns_per_task(k);
                let tasks: Vec<_> = split_columns(dx, k, width).into_iter().enumerate().collect();
                let ds = &*ds;
                parallel::for_each(self.threads, tasks, |(i, dx)| {
                    isa.vectorize(
                        #[inline(always)]
                        || {
                            dots.prepared(
                                #[inline(always)]
                                || self.columns(dots, i * width, dy_slivers, ds, dx),
                            );
                        },
                    );
                });
            },
        );
    }

    /// `dS = scaling · dY·B`, `[rows, r]`.
    fn low_rank_output<D: Dots>(&self, dots: D, lora: &LowRank<'_>, dy_slivers: &[bf16], ds: &mut [f32]) {
        let (rank, n) = (lora.rank, self.weight.out_features());
        let height = self.rows.next_multiple_of(SIDE);
        let room = padded(2 * rank);
        let tasks: Vec<_> = ds.chunks_mut((SIDE * rank).max(1)).enumerate().collect();
        parallel::for_each(self.threads, tasks, |(i, ds)| {
            dots.base().vectorize(
                #[inline(always)]
                || {
                    scratch::with(
                        SIDE * room,
                        #[inline(always)]
                        |tiles| {
                            tiles.fill(0.0);
                            dots.prepared(
                                #[inline(always)]
                                || {
                                    for (block, (row, depth)) in blocks(n).enumerate() {
                                        let left = &dy_slivers[block * height * STRIDE + i * SLIVER..][..SLIVER];
                                        let panels = &self.b_panels[row * room..][..depth * room];
                                        multiply(dots, (0, depth, depth), left, panels, 2 * rank, tiles);
                                    }
                                },
                            );
                            for (row, line) in ds.chunks_mut(rank).enumerate() {
                                for (j, value) in line.iter_mut().enumerate() {
                                    let part = |col| tiles[place(row, col, 2 * rank)];
                                    *value = lora.scaling * (part(j) + part(rank + j));
                                }
                            }
                        },
                    );
                },
            );
        });
    }

    /// Columns of dX from `k0`: `dx[m]` is row m's part.
    #[inline(always)]
    fn columns<D: Dots>(&self, dots: D, k0: usize, dy_slivers: &[bf16], ds: &[f32], mut dx: Vec<&mut [bf16]>) {
        let n = self.weight.out_features();
        let height = self.rows.next_multiple_of(SIDE);
        let cols = dx.first().map_or(0, |row| row.len());
        let room = padded(cols);
        scratch::with(
            height * room,
            #[inline(always)]
            |tiles| {
                tiles.fill(0.0);
                scratch::with_bf16(
                    DEPTH * COLUMNS,
                    #[inline(always)]
                    |panels| {
                        for ((row, depth), slivers) in blocks(n).zip(dy_slivers.chunks(height * STRIDE)) {
                            row_panels(
                                dots.base(),
                                (n - row, depth),
                                cols,
                                panels,
                                #[inline(always)]
                                |i, line| self.weight.decode(dots.base(), row + i, k0, line),
                            );
                            for (left, tiles) in slivers.chunks(SLIVER).zip(tiles.chunks_mut(SIDE * room)) {
                                multiply(dots, (0, depth, depth), left, panels, cols, tiles);
                            }
                        }
                    },
                );
                if let Some(lora) = self.lora {
                    self.add_low_rank(dots, lora, (k0, cols), ds, tiles);
                }
                for (row, line) in dx.iter_mut().enumerate() {
                    for first in (0..cols).step_by(SIDE) {
                        let count = SIDE.min(cols - first);
                        let sums = &tiles[row / SIDE * SIDE * room + place(row % SIDE, first, cols)..][..count];
                        narrow(dots.base(), sums, &mut line[first..][..count]);
                    }
                }
            },
        );
    }

    /// Adds `mask ⊙ (dS·A)` to the tiles. Without dropout it is more depth of the same sums.
    #[inline(always)]
    fn add_low_rank<D: Dots>(
        &self,
        dots: D,
        lora: &LowRank<'_>,
        (k0, cols): (usize, usize),
        ds: &[f32],
        tiles: &mut [f32],
    ) {
        let (isa, rank, room) = (dots.base(), lora.rank, padded(cols));
        let height = split::depth(rank);
        scratch::with_bf16(
            height * room + SLIVER + height,
            #[inline(always)]
            |buffer| {
                let (panels, rest) = buffer.split_at_mut(height * room);
                let (left, line) = rest.split_at_mut(SLIVER);
                pack_a_pairs(isa, lora, self.weight.in_features(), (k0, cols), panels);
                scratch::with(
                    SIDE * room,
                    #[inline(always)]
                    |branch| {
                        for (i, tiles) in tiles.chunks_mut(SIDE * room).enumerate() {
                            branch.fill(0.0);
                            let target: &mut [f32] = if lora.dropout.is_some() { branch } else { tiles };
                            for (from, depth) in blocks(height) {
                                sliver(
                                    self.rows - i * SIDE,
                                    depth,
                                    left,
                                    #[inline(always)]
                                    |row, out| {
                                        split::doubled(isa, &ds[(i * SIDE + row) * rank..][..rank], line);
                                        out.copy_from_slice(&line[from..][..depth]);
                                    },
                                );
                                multiply(dots, (from, depth, height), left, panels, cols, target);
                            }
                            if let Some(dropout) = lora.dropout {
                                mask(dropout, (self.first + i * SIDE, k0), cols, branch);
                                for (sum, b) in tiles.iter_mut().zip(&*branch) {
                                    *sum += b;
                                }
                            }
                        }
                    },
                );
            },
        );
    }
}

/// Place of element `(row, col)` in the tiles of one sliver and panels of `cols` columns.
#[inline(always)]
pub(super) fn place(row: usize, col: usize, cols: usize) -> usize {
    let first = col / SIDE * SIDE;
    first * SIDE + row * width_for(cols - first) + col - first
}

/// Columns `k0 ..` of A as panels of split pairs, twice.
#[inline(always)]
fn pack_a_pairs<I: Isa>(isa: I, lora: &LowRank<'_>, k: usize, (k0, cols): (usize, usize), panels: &mut [bf16]) {
    let height = split::depth(lora.rank);
    panels.fill(bf16::ZERO);
    for first in (0..cols).step_by(SIDE) {
        let width = width_for(cols - first);
        let count = width.min(cols - first);
        let panel = &mut panels[first * height..][..height * width];
        let (once, again) = panel.split_at_mut(2 * lora.rank * width);
        for (j, pairs) in once.chunks_mut(2 * width).enumerate() {
            split::pairs(isa, &lora.a[j * k + k0 + first..][..count], 1.0, &mut pairs[..2 * count]);
        }
        again[..once.len()].copy_from_slice(once);
    }
}

/// Multiplies the tiles of one sliver, whose first element is `(row, col)` of the input, by the dropout mask.
#[inline(always)]
fn mask(dropout: Dropout, (row, col): (usize, usize), cols: usize, tiles: &mut [f32]) {
    for first in (0..cols).step_by(SIDE) {
        let width = width_for(cols - first);
        for (i, values) in tiles[first * SIDE..][..SIDE * width].chunks_mut(width).enumerate() {
            dropout::apply(dropout, row + i, col + first, values);
        }
    }
}
