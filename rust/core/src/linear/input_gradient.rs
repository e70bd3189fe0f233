//! dX, and dS on the way to it.
//!
//! dX needs no transposition: the weight is decoded along its rows into panels whose columns are the
//! columns of dX. A task owns a range of those columns.

use super::lora::LowRank;
use super::low_rank_gradients::TypedGradients;
use super::low_rank_output::low_rank_output;
use super::panel::{Source, column_panel, padded, row_sliver};
use super::reduce::{COLUMNS, columns_per_task};
use super::tile::{self, DEPTH, Panel, Sliver, width_for};
use super::weight::Weight;
use super::{dropout, scratch};
use crate::dtype::{Element, narrow};
use crate::exec::Exec;
use crate::parallel::{self, split_columns};
use crate::simd::{Isa, LANES, Op};

/// Rows of dY in slivers at a time.
const CHUNK: usize = 252;

/// Row stride of decoded panels: not a power of two, so that a column does not fall into one cache set.
const STRIDE: usize = COLUMNS + LANES;

/// One of the linears of a call.
pub(super) struct Member<'a, E> {
    pub(super) dy: &'a [E],
    pub(super) weight: &'a Weight<'a>,
    pub(super) branch: Option<TypedGradients<'a, E>>,
}

impl<E: Element> Member<'_, E> {
    fn lora(&self) -> Option<&LowRank<'_>> {
        self.branch.as_ref().map(TypedGradients::lora)
    }

    fn rank(&self) -> usize {
        self.lora().map_or(0, LowRank::rank)
    }
}

pub(super) struct Backward<'a, E> {
    pub(super) exec: &'a Exec,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) members: Vec<Member<'a, E>>,
    /// Empty if not asked for.
    pub(super) dx: &'a mut [E],
}

impl<E: Element> Op for Backward<'_, E> {
    type Output = ();

    fn eval<I: Isa>(self, isa: I) {
        let k = self.cols;
        let outputs: usize = self.members.iter().map(|member| member.weight.out_features()).sum();
        let threads = self.exec.threads_for(self.rows * outputs * k / 8);
        let mut ds: Vec<_> = self.members.iter().map(|member| vec![0.0_f32; self.rows * member.rank()]).collect();
        let mut dx = self.dx;
        for first in (0..self.rows).step_by(CHUNK) {
            let rows = CHUNK.min(self.rows - first);
            let (dx_now, dx_after) = dx.split_at_mut((rows * k).min(dx.len()));
            dx = dx_after;
            let members = self.members.iter().zip(&mut ds).map(|(member, ds)| {
                let (n, rank) = (member.weight.out_features(), member.rank());
                let dy = Source::plain(&member.dy[first * n..][..rows * n], n);
                let ds = &mut ds[first * rank..][..rows * rank];
                Part { weight: member.weight, lora: member.lora(), dy, ds }
            });
            Chunk { threads, first, rows, k }.eval(isa, members.collect(), dx_now);
        }
        for (member, ds) in self.members.into_iter().zip(&ds) {
            if let Some(branch) = member.branch {
                let dy = Source::plain(member.dy, member.weight.out_features());
                branch.compute(isa, threads, self.rows, &dy, ds, k);
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
struct Part<'a, E> {
    weight: &'a Weight<'a>,
    lora: Option<&'a LowRank<'a>>,
    dy: Source<'a, E>,
    ds: &'a mut [f32],
}

/// A member whose left operands are ready: slivers of dY, block after block of depth, and dS.
struct Ready<'a> {
    weight: &'a Weight<'a>,
    lora: Option<&'a LowRank<'a>>,
    dy_slivers: &'a [f32],
    ds: &'a [f32],
}

impl Chunk {
    fn eval<I: Isa, E: Element>(&self, isa: I, members: Vec<Part<'_, E>>, dx: &mut [E]) {
        let block = self.rows.next_multiple_of(tile::rows::<I>()) * DEPTH;
        let sizes: Vec<_> = members.iter().map(|part| part.weight.out_features().div_ceil(DEPTH) * block).collect();
        scratch::with(
            sizes.iter().sum(),
            #[inline(always)]
            |slivers| {
                let mut rest = slivers;
                let mut ready = Vec::new();
                for (part, size) in members.into_iter().zip(sizes) {
                    let dy_slivers = rest.split_off_mut(..size).expect("a part of each member");
                    self.pack_dy(isa, &part.dy, block, dy_slivers);
                    if let Some(lora) = part.lora {
                        let n = part.weight.out_features();
                        low_rank_output(isa, self.threads, lora, (n, block), dy_slivers, part.ds);
                        if let Some(row_ranks) = &lora.row_ranks {
                            row_ranks.clear_others(self.first, lora.rank, part.ds);
                        }
                    }
                    ready.push(Ready { weight: part.weight, lora: part.lora, dy_slivers, ds: part.ds });
                }
                if dx.is_empty() {
                    return;
                }
                let width = columns_per_task(self.k);
                let tasks: Vec<_> = split_columns(dx, self.k, width).into_iter().enumerate().collect();
                parallel::for_each(self.threads, tasks, |(i, dx)| {
                    isa.vectorize(
                        #[inline(always)]
                        || self.columns(isa, i * width, &ready, dx),
                    );
                });
            },
        );
    }

    fn pack_dy<I: Isa, E: Element>(&self, isa: I, dy: &Source<'_, E>, block: usize, out: &mut [f32]) {
        let tall = tile::rows::<I>();
        let tasks: Vec<_> = out.chunks_mut(block.max(1)).enumerate().collect();
        parallel::for_each(self.threads, tasks, |(block, out)| {
            let span = (block * DEPTH, DEPTH.min(dy.cols - block * DEPTH));
            for (i, sliver) in out.chunks_mut(tall * DEPTH).enumerate() {
                isa.vectorize(
                    #[inline(always)]
                    || row_sliver(isa, dy, (i * tall, self.rows), span, 1.0, sliver),
                );
            }
        });
    }

    /// Columns of dX from `k0`: `dx[m]` is row m's part.
    #[inline(always)]
    fn columns<I: Isa, E: Element>(&self, isa: I, k0: usize, members: &[Ready<'_>], mut dx: Vec<&mut [E]>) {
        let tall = tile::rows::<I>();
        let height = self.rows.next_multiple_of(tall);
        let cols = dx.first().map_or(0, |row| row.len());
        let room = padded::<I>(cols);
        scratch::with(
            height * room,
            #[inline(always)]
            |tiles| {
                tiles.fill(0.0);
                scratch::with(
                    DEPTH * STRIDE,
                    #[inline(always)]
                    |panel| {
                        for member in members {
                            self.add_product(isa, (k0, cols), member, panel, tiles);
                        }
                    },
                );
                for (i, tiles) in tiles.chunks(tall * room).enumerate() {
                    store_rows::<I>(
                        tiles,
                        tall,
                        cols,
                        #[inline(always)]
                        |row, col, values| {
                            if let Some(line) = dx.get_mut(i * tall + row) {
                                let line = &mut line[col..];
                                let count = line.len().min(values.len());
                                narrow(isa, &values[..count], &mut line[..count]);
                            }
                        },
                    );
                }
            },
        );
    }

    /// Adds `dY·deq(W) + mask ⊙ (dS·A)` of one member to the tiles.
    #[inline(always)]
    fn add_product<I: Isa>(
        &self,
        isa: I,
        (k0, cols): (usize, usize),
        member: &Ready<'_>,
        panel: &mut [f32],
        tiles: &mut [f32],
    ) {
        let tall = tile::rows::<I>();
        let height = self.rows.next_multiple_of(tall);
        let room = padded::<I>(cols);
        let n = member.weight.out_features();
        for (block, slivers) in member.dy_slivers.chunks(height * DEPTH).enumerate() {
            let depth = DEPTH.min(n - block * DEPTH);
            for (i, line) in panel.chunks_mut(STRIDE).take(depth).enumerate() {
                member.weight.decode(isa, block * DEPTH + i, k0, &mut line[..cols]);
                line[cols..room].fill(0.0);
            }
            for (data, tiles) in slivers.chunks(tall * DEPTH).zip(tiles.chunks_mut(tall * room)) {
                multiply_row(isa, depth, Sliver { data, rows: tall }, panel, STRIDE, cols, tiles);
            }
        }
        if let Some(lora) = member.lora {
            self.add_low_rank(isa, lora, (k0, cols), member.ds, panel, tiles);
        }
    }

    /// Adds `mask ⊙ (dS·A)` to the tiles. Without dropout it is more depth of the same sums.
    #[inline(always)]
    fn add_low_rank<I: Isa>(
        &self,
        isa: I,
        lora: &LowRank<'_>,
        (k0, cols): (usize, usize),
        ds: &[f32],
        panel: &mut [f32],
        tiles: &mut [f32],
    ) {
        let tall = tile::rows::<I>();
        let room = padded::<I>(cols);
        let (a, ds) = (Source::plain(&lora.a, self.k), Source::plain(ds, lora.rank));
        scratch::with(
            tall * DEPTH,
            #[inline(always)]
            |sliver| {
                scratch::with(
                    tall * room,
                    #[inline(always)]
                    |branch| {
                        for (i, tiles) in tiles.chunks_mut(tall * room).enumerate() {
                            branch.fill(0.0);
                            let target: &mut [f32] = if lora.dropout.is_some() { branch } else { tiles };
                            for j in (0..lora.rank).step_by(DEPTH) {
                                let depth = DEPTH.min(lora.rank - j);
                                if i == 0 || lora.rank > DEPTH {
                                    column_panel(isa, &a, (j, depth), (k0, cols, room), STRIDE, panel);
                                }
                                row_sliver(isa, &ds, (i * tall, self.rows), (j, depth), 1.0, sliver);
                                multiply_row(
                                    isa,
                                    depth,
                                    Sliver { data: sliver, rows: tall },
                                    panel,
                                    STRIDE,
                                    cols,
                                    target,
                                );
                            }
                            if let Some(dropout) = lora.dropout {
                                let first = self.first + i * tall;
                                mask_tiles::<I>(dropout, first, k0, (tall, cols), branch);
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

/// One sliver times every tile-wide part of a panel of `cols` columns.
#[inline(always)]
pub(super) fn multiply_row<I: Isa>(
    isa: I,
    depth: usize,
    sliver: Sliver<'_>,
    panel: &[f32],
    stride: usize,
    cols: usize,
    tiles: &mut [f32],
) {
    for first in (0..cols).step_by(tile::cols::<I>()) {
        let width = width_for::<I>(cols - first);
        let panel = Panel { data: &panel[first..], stride };
        let acc = &mut tiles[first * sliver.rows..][..sliver.rows * width];
        tile::multiply(isa, depth, sliver, panel, width, acc);
    }
}

/// Hands every row of every tile to `store` with its row and first column.
#[inline(always)]
pub(super) fn store_rows<I: Isa>(tiles: &[f32], tall: usize, cols: usize, mut store: impl FnMut(usize, usize, &[f32])) {
    for first in (0..cols).step_by(tile::cols::<I>()) {
        let width = width_for::<I>(cols - first);
        for (row, values) in tiles[first * tall..][..tall * width].chunks(width).enumerate() {
            store(row, first, values);
        }
    }
}

/// Multiplies tiles, whose first element is `(row, col)` of the input, by the dropout mask.
#[inline(always)]
fn mask_tiles<I: Isa>(
    dropout: super::Dropout,
    row: usize,
    col: usize,
    (tall, cols): (usize, usize),
    tiles: &mut [f32],
) {
    for first in (0..cols).step_by(tile::cols::<I>()) {
        let width = width_for::<I>(cols - first);
        for (i, values) in tiles[first * tall..][..tall * width].chunks_mut(width).enumerate() {
            dropout::apply(dropout, row + i, col + first, values);
        }
    }
}
