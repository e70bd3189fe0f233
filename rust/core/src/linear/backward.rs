//! The backward pass.
//!
//! ```text
//! dS = scaling · dY·B          dX = dY·deq(W) + mask ⊙ (dS·A)
//! dB = scaling · dYᵀ·S         dA = dSᵀ·(mask ⊙ x)
//! ```
//!
//! dX needs no transposition: the weight is decoded along its rows into panels whose columns are the
//! columns of dX. A task owns a range of those columns.

use super::lora::LowRank;
use super::low_rank_gradients::{LoraGradients, TypedGradients};
use super::panel::{Source, column_panel, padded, row_sliver};
use super::reduce::{COLUMNS, columns_per_task};
use super::tile::{self, DEPTH, Panel, Sliver, width_for};
use super::weight::Weight;
use super::{bf16, dropout, scratch};
use crate::Result;
use crate::dtype::{Element, Floats, FloatsMut, like_mut, narrow, with_floats};
use crate::error::check_matrix;
use crate::exec::Exec;
use crate::parallel::{self, split_columns};
use crate::simd::{Isa, LANES, Op};

/// Rows of dY in slivers at a time.
const CHUNK: usize = 252;

/// Row stride of decoded panels: not a power of two, so that a column does not fall into one cache set.
const STRIDE: usize = COLUMNS + LANES;

/// What backward writes; what is `None` is not computed.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// dX `[M, K]`, in the type of dY.
    pub dx: Option<FloatsMut<'a>>,
    /// The low-rank branch's.
    pub lora: Option<LoraGradients<'a>>,
}

/// Computes what `gradients` asks for from `dy [rows, N]`.
///
/// # Errors
/// [`crate::Error::Length`] naming the buffer that does not fit, [`crate::Error::Type`] if x, S or dX has another type
/// than dY.
pub fn backward(exec: &Exec, rows: usize, dy: Floats<'_>, weight: &Weight<'_>, gradients: Gradients<'_>) -> Result<()> {
    let (n, k) = (weight.out_features(), weight.in_features());
    check_matrix("dy", (rows, n), dy.len())?;
    if let Some(dx) = &gradients.dx {
        check_matrix("dx", (rows, k), dx.len())?;
    }
    if let Some(branch) = &gradients.lora {
        branch.check(rows, weight)?;
    }
    if let (Floats::Bf16(dy), true) = (dy, exec.isa.has_dots()) {
        let (dx, branch) = like_dy(dy, gradients)?;
        exec.isa.run_dots(bf16::Backward { exec, rows, dy, weight, dx, branch });
        return Ok(());
    }
    with_floats!(Floats, dy, dy => {
        let (dx, branch) = like_dy(dy, gradients)?;
        exec.isa.run(Backward { exec, rows, dy, weight, dx, branch });
    });
    Ok(())
}

/// dX, empty if it is not asked for, and the branch's gradients, in the type of `dy`.
fn like_dy<'a, E: Element>(dy: &[E], gradients: Gradients<'a>) -> Result<(&'a mut [E], Option<TypedGradients<'a, E>>)> {
    let dx = gradients.dx.map(|dx| like_mut(dy, "dy", "dx", dx)).transpose()?.unwrap_or_default();
    Ok((dx, gradients.lora.map(|branch| branch.typed(dy)).transpose()?))
}

struct Backward<'a, E> {
    exec: &'a Exec,
    rows: usize,
    dy: &'a [E],
    weight: &'a Weight<'a>,
    /// Empty if not asked for.
    dx: &'a mut [E],
    branch: Option<TypedGradients<'a, E>>,
}

impl<E: Element> Op for Backward<'_, E> {
    type Output = ();

    fn eval<I: Isa>(self, isa: I) {
        let (n, k) = (self.weight.out_features(), self.weight.in_features());
        let threads = self.exec.threads_for(self.rows * n * k / 16);
        let lora = self.branch.as_ref().map(TypedGradients::lora);
        let rank = lora.map_or(0, LowRank::rank);
        let mut ds = vec![0.0_f32; self.rows * rank];
        let mut dx = self.dx;
        for first in (0..self.rows).step_by(CHUNK) {
            let rows = CHUNK.min(self.rows - first);
            let (dx_now, dx_after) = dx.split_at_mut((rows * k).min(dx.len()));
            dx = dx_after;
            let ds = &mut ds[first * rank..][..rows * rank];
            let chunk = Chunk { threads, weight: self.weight, lora, first, rows };
            chunk.eval(isa, &Source::plain(&self.dy[first * n..][..rows * n], n), ds, dx_now);
        }
        if let Some(branch) = self.branch {
            let dy = Source::plain(self.dy, n);
            branch.compute(isa, threads, self.rows, &dy, &ds, k);
        }
    }
}

/// Up to [`CHUNK`] rows from row `first`.
struct Chunk<'a> {
    threads: usize,
    weight: &'a Weight<'a>,
    lora: Option<&'a LowRank<'a>>,
    first: usize,
    rows: usize,
}

impl Chunk<'_> {
    fn eval<I: Isa, E: Element>(&self, isa: I, dy: &Source<'_, E>, ds: &mut [f32], dx: &mut [E]) {
        let tall = tile::rows::<I>();
        let height = self.rows.next_multiple_of(tall);
        let (n, k) = (self.weight.out_features(), self.weight.in_features());
        scratch::with(
            n.div_ceil(DEPTH) * height * DEPTH,
            #[inline(always)]
            |dy_slivers| {
                let tasks: Vec<_> = dy_slivers.chunks_mut((height * DEPTH).max(1)).enumerate().collect();
                parallel::for_each(self.threads, tasks, |(block, out)| {
                    let span = (block * DEPTH, DEPTH.min(n - block * DEPTH));
                    for (i, sliver) in out.chunks_mut(tall * DEPTH).enumerate() {
                        isa.vectorize(
                            #[inline(always)]
                            || row_sliver(isa, dy, (i * tall, self.rows), span, 1.0, sliver),
                        );
                    }
                });
                if let Some(lora) = self.lora {
                    self.low_rank_output(isa, lora, dy_slivers, ds);
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
                        || self.columns(isa, i * width, dy_slivers, ds, dx),
                    );
                });
            },
        );
    }

    /// `dS = scaling · dY·B`, `[rows, r]`.
    fn low_rank_output<I: Isa>(&self, isa: I, lora: &LowRank<'_>, dy_slivers: &[f32], ds: &mut [f32]) {
        let (tall, n) = (tile::rows::<I>(), self.weight.out_features());
        let height = self.rows.next_multiple_of(tall);
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
                parallel::for_each(self.threads, tasks, |(i, out)| {
                    isa.vectorize(
                        #[inline(always)]
                        || {
                            scratch::with(
                                tall * room,
                                #[inline(always)]
                                |tiles| {
                                    tiles.fill(0.0);
                                    for (block, slivers) in dy_slivers.chunks(height * DEPTH).enumerate() {
                                        let depth = DEPTH.min(n - block * DEPTH);
                                        let data = &slivers[i * tall * DEPTH..][..tall * DEPTH];
                                        let panel = &panel[block * DEPTH * room..][..depth * room];
                                        multiply_row(
                                            isa,
                                            depth,
                                            Sliver { data, rows: tall },
                                            panel,
                                            room,
                                            lora.rank,
                                            tiles,
                                        );
                                    }
                                    store_rows::<I>(
                                        tiles,
                                        tall,
                                        lora.rank,
                                        #[inline(always)]
                                        |row, col, values| {
                                            let Some(line) = out.chunks_mut(lora.rank).nth(row) else { return };
                                            let line = &mut line[col..];
                                            for (d, v) in line.iter_mut().zip(values) {
                                                *d = v * lora.scaling;
                                            }
                                        },
                                    );
                                },
                            );
                        },
                    );
                });
            },
        );
    }

    /// Columns of dX from `k0`: `dx[m]` is row m's part.
    #[inline(always)]
    fn columns<I: Isa, E: Element>(&self, isa: I, k0: usize, dy_slivers: &[f32], ds: &[f32], mut dx: Vec<&mut [E]>) {
        let tall = tile::rows::<I>();
        let height = self.rows.next_multiple_of(tall);
        let n = self.weight.out_features();
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
                        for (block, slivers) in dy_slivers.chunks(height * DEPTH).enumerate() {
                            let depth = DEPTH.min(n - block * DEPTH);
                            for (i, line) in panel.chunks_mut(STRIDE).take(depth).enumerate() {
                                self.weight.decode(isa, block * DEPTH + i, k0, &mut line[..cols]);
                                line[cols..room].fill(0.0);
                            }
                            for (data, tiles) in slivers.chunks(tall * DEPTH).zip(tiles.chunks_mut(tall * room)) {
                                multiply_row(isa, depth, Sliver { data, rows: tall }, panel, STRIDE, cols, tiles);
                            }
                        }
                        if let Some(lora) = self.lora {
                            self.add_low_rank(isa, lora, (k0, cols), ds, panel, tiles);
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
        let k = self.weight.in_features();
        let room = padded::<I>(cols);
        let (a, ds) = (Source::plain(&lora.a, k), Source::plain(ds, lora.rank));
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
fn multiply_row<I: Isa>(
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
fn store_rows<I: Isa>(tiles: &[f32], tall: usize, cols: usize, mut store: impl FnMut(usize, usize, &[f32])) {
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
