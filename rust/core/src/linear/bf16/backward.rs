//! Backward: `dS = scaling · dY·B` and `dX = Σ dY·deq(W) + mask ⊙ (dS·A)`, the sum over the members of a group.
//!
//! dY is the left operand of both, and dS is more depth beside it. The weight is decoded along its rows, and two
//! of them make a row of a panel, whose columns are columns of dX.

use half::bf16;

use super::gradients::compute;
use super::low_rank_output::{LowRankOutput, pack_b};
use super::operand::{DEPTH, SLIVER, STRIDE, Source, blocks, multiply, padded, parts, row_panels, sliver, width_for};
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

/// One of the linears of a call.
pub(in crate::linear) struct Member<'a> {
    pub(in crate::linear) dy: &'a [bf16],
    pub(in crate::linear) weight: &'a Weight<'a>,
    pub(in crate::linear) branch: Option<TypedGradients<'a, bf16>>,
}

impl Member<'_> {
    fn lora(&self) -> Option<&LowRank<'_>> {
        self.branch.as_ref().map(TypedGradients::lora)
    }

    fn rank(&self) -> usize {
        self.lora().map_or(0, LowRank::rank)
    }
}

/// A backward call: the members have the same `rows` and columns of x.
pub(in crate::linear) struct Backward<'a> {
    pub(in crate::linear) exec: &'a Exec,
    pub(in crate::linear) rows: usize,
    pub(in crate::linear) cols: usize,
    pub(in crate::linear) members: Vec<Member<'a>>,
    /// Empty if not asked for.
    pub(in crate::linear) dx: &'a mut [bf16],
}

impl DotsOp for Backward<'_> {
    fn eval<D: Dots>(self, dots: D) {
        let k = self.cols;
        let outputs: usize = self.members.iter().map(|member| member.weight.out_features()).sum();
        let threads = self.exec.threads_for((self.rows + SIDE) * outputs * k / 16);
        let mut ds: Vec<_> = self.members.iter().map(|member| vec![0.0_f32; self.rows * member.rank()]).collect();
        let sizes: Vec<_> = self
            .members
            .iter()
            .map(|member| padded(2 * member.rank()) * member.weight.out_features().next_multiple_of(STEP))
            .collect();
        scratch::with_bf16(
            sizes.iter().sum(),
            #[inline(always)]
            |b_panels| {
                let mut b_panels = parts(b_panels, sizes.into_iter());
                for (member, out) in self.members.iter().zip(&mut b_panels) {
                    if let Some(lora) = member.lora() {
                        pack_b(dots.base(), threads, lora, member.weight.out_features(), out);
                    }
                }
                let mut dx = self.dx;
                for first in (0..self.rows).step_by(CHUNK) {
                    let rows = CHUNK.min(self.rows - first);
                    let (dx_now, dx_after) = dx.split_at_mut((rows * k).min(dx.len()));
                    dx = dx_after;
                    let members = self.members.iter().zip(&mut ds).zip(&b_panels).map(|((member, ds), b_panels)| {
                        let (n, rank) = (member.weight.out_features(), member.rank());
                        let dy = Source::plain(&member.dy[first * n..][..rows * n], n);
                        let ds = &mut ds[first * rank..][..rows * rank];
                        Part { weight: member.weight, lora: member.lora(), dy, b_panels, ds }
                    });
                    Chunk { threads, first, rows, k }.eval(dots, members.collect(), dx_now);
                }
            },
        );
        for (member, ds) in self.members.into_iter().zip(ds) {
            if let Some(branch) = member.branch {
                let dy = Source::plain(member.dy, member.weight.out_features());
                compute(dots, threads, self.rows, branch, &dy, &ds, k);
            }
        }
    }
}

/// Up to [`CHUNK`] rows from row `first`.
struct Chunk {
    threads: usize,
    first: usize,
    rows: usize,
    k: usize,
}

/// A member's part of a chunk.
struct Part<'a> {
    weight: &'a Weight<'a>,
    lora: Option<&'a LowRank<'a>>,
    dy: Source<'a>,
    b_panels: &'a [bf16],
    ds: &'a mut [f32],
}

impl Part<'_> {
    /// Blocks of depth of dY, and of dS as pairs.
    fn blocks(&self) -> (usize, usize) {
        let depth = self.lora.map_or(0, |lora| split::depth(lora.rank));
        (self.weight.out_features().div_ceil(DEPTH), depth.div_ceil(DEPTH))
    }
}

/// A member whose left operands are ready: slivers of dY, block after block, and of dS.
struct Ready<'a> {
    weight: &'a Weight<'a>,
    lora: Option<&'a LowRank<'a>>,
    dy_slivers: &'a [bf16],
    ds_slivers: &'a [bf16],
}

impl Chunk {
    fn eval<D: Dots>(&self, dots: D, members: Vec<Part<'_>>, dx: &mut [bf16]) {
        let block = self.block();
        let sizes: Vec<_> = members.iter().map(|part| (part.blocks().0 + part.blocks().1) * block).collect();
        scratch::with_bf16(
            sizes.iter().sum(),
            #[inline(always)]
            |slivers| {
                let mut ready = Vec::new();
                for (part, slivers) in members.into_iter().zip(parts(slivers, sizes.into_iter())) {
                    let (dy_slivers, ds_slivers) = slivers.split_at_mut(part.blocks().0 * block);
                    self.pack_dy(dots.base(), &part.dy, dy_slivers);
                    if let Some(lora) = part.lora {
                        let output = LowRankOutput {
                            threads: self.threads,
                            first: self.first,
                            lora,
                            block,
                            b_panels: part.b_panels,
                        };
                        output.compute(dots, dy_slivers, part.ds, ds_slivers);
                    }
                    ready.push(Ready { weight: part.weight, lora: part.lora, dy_slivers, ds_slivers });
                }
                if dx.is_empty() {
                    return;
                }
                let width = columns_per_task(self.k);
                let tasks: Vec<_> = split_columns(dx, self.k, width).into_iter().enumerate().collect();
                parallel::for_each(self.threads, tasks, |(i, dx)| {
                    dots.base().vectorize(
                        #[inline(always)]
                        || {
                            dots.prepared(
                                #[inline(always)]
                                || self.columns(dots, i * width, &ready, dx),
                            );
                        },
                    );
                });
            },
        );
    }

    /// Elements of one block of depth in slivers.
    fn block(&self) -> usize {
        self.rows.next_multiple_of(SIDE) * STRIDE
    }

    fn pack_dy<I: Isa>(&self, isa: I, dy: &Source<'_>, out: &mut [bf16]) {
        let tasks: Vec<_> = blocks(dy.cols).zip(out.chunks_mut(self.block())).collect();
        parallel::for_each(self.threads, tasks, |((col, depth), out)| {
            isa.vectorize(
                #[inline(always)]
                || {
                    sliver(
                        self.rows,
                        depth,
                        out,
                        #[inline(always)]
                        |row, line| dy.read(row, col, line),
                    );
                },
            );
        });
    }

    /// Columns of dX from `k0`: `dx[m]` is row m's part.
    #[inline(always)]
    fn columns<D: Dots>(&self, dots: D, k0: usize, members: &[Ready<'_>], mut dx: Vec<&mut [bf16]>) {
        let cols = dx.first().map_or(0, |row| row.len());
        let room = padded(cols);
        scratch::with(
            self.rows.next_multiple_of(SIDE) * room,
            #[inline(always)]
            |tiles| {
                scratch::with_bf16(
                    DEPTH * COLUMNS,
                    #[inline(always)]
                    |panels| self.sum_of_products(dots, (k0, cols), members, panels, tiles),
                );
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

    /// `Σ dY·deq(W) + mask ⊙ (dS·A)` over the members.
    #[inline(always)]
    fn sum_of_products<D: Dots>(
        &self,
        dots: D,
        (k0, cols): (usize, usize),
        members: &[Ready<'_>],
        panels: &mut [bf16],
        tiles: &mut [f32],
    ) {
        let (isa, room) = (dots.base(), padded(cols));
        let mut add = false;
        for member in members {
            let n = member.weight.out_features();
            for ((row, depth), slivers) in blocks(n).zip(member.dy_slivers.chunks(self.block())) {
                row_panels(
                    isa,
                    (n - row, depth),
                    cols,
                    panels,
                    #[inline(always)]
                    |i, line| member.weight.decode(isa, row + i, k0, line),
                );
                for (left, tiles) in slivers.chunks(SLIVER).zip(tiles.chunks_mut(SIDE * room)) {
                    multiply(dots, (0, depth, depth), left, panels, cols, tiles, add);
                }
                add = true;
            }
        }
        if !add {
            tiles.fill(0.0);
        }
        for member in members {
            if let Some(lora) = member.lora.filter(|lora| lora.rank > 0) {
                self.add_low_rank(dots, lora, (k0, cols), member.ds_slivers, tiles);
            }
        }
    }

    /// Adds `mask ⊙ (dS·A)` to the tiles. Without dropout it is more depth of the same sums.
    #[inline(always)]
    fn add_low_rank<D: Dots>(
        &self,
        dots: D,
        lora: &LowRank<'_>,
        (k0, cols): (usize, usize),
        ds_slivers: &[bf16],
        tiles: &mut [f32],
    ) {
        let room = padded(cols);
        let height = split::depth(lora.rank);
        scratch::with_bf16(
            height * room,
            #[inline(always)]
            |panels| {
                pack_a_pairs(dots.base(), lora, self.k, (k0, cols), panels);
                scratch::with(
                    SIDE * room,
                    #[inline(always)]
                    |branch| {
                        for (i, tiles) in tiles.chunks_mut(SIDE * room).enumerate() {
                            let target: &mut [f32] = if lora.dropout.is_some() { branch } else { tiles };
                            for ((from, depth), slivers) in blocks(height).zip(ds_slivers.chunks(self.block())) {
                                let left = &slivers[i * SLIVER..][..SLIVER];
                                let add = lora.dropout.is_none() || from > 0;
                                multiply(dots, (from, depth, height), left, panels, cols, target, add);
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
