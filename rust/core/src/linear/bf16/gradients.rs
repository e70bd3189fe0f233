//! dA and dB of the low-rank branch, which sum over rows: `dA = dSᵀ·(mask ⊙ x)`, `dB = scaling · dYᵀ·S`.

use half::bf16;

use super::backward::place;
use super::operand::{DEPTH, SLIVER, STRIDE, Source, blocks, multiply, padded, row_panels};
use super::split;
use crate::linear::low_rank_gradients::{TypedGradients, in_float32};
use crate::linear::reduce::{COLUMNS, columns_per_task};
use crate::linear::scratch;
use crate::parallel::{self, split_columns};
use crate::simd::Isa;
use crate::simd::dots::{Dots, SIDE};

/// Computes what `branch` asks for from `dy [rows, N]` and `ds [rows, r]`; `k` is K.
pub(super) fn compute<D: Dots>(
    dots: D,
    threads: usize,
    rows: usize,
    branch: TypedGradients<'_, bf16>,
    dy: &Source<'_>,
    ds: &[f32],
    k: usize,
) {
    let (isa, rank) = (dots.base(), branch.lora().rank);
    if rank == 0 {
        return; // dA and dB have no element
    }
    let TypedGradients { lora, x, s, da, db } = branch;
    if let Some(da) = da {
        let x = Source { dropout: lora.dropout, ..Source::plain(x, k) };
        let keep = lora.dropout.map_or(1.0, |dropout| 1.0 / (1.0 - dropout.p()));
        let width = columns_per_task(k);
        let left = Left { rows, rank, height: 2 * rank };
        in_float32(isa, da, |da| {
            let parts = split_columns(da, k, width);
            let fill = |row: usize, line: &mut [f32]| line.copy_from_slice(&ds[row * rank..][..rank]);
            left.product(dots, threads, fill, &x, width, parts, |tiles, cols, da: Vec<&mut [f32]>| {
                for (i, line) in da.into_iter().enumerate() {
                    for (c, value) in line.iter_mut().enumerate() {
                        *value = keep * (element(tiles, i, c, cols) + element(tiles, rank + i, c, cols));
                    }
                }
            });
        });
    }
    if let Some(db) = db {
        let width = columns_per_task(dy.cols);
        let left = Left { rows, rank, height: rank };
        in_float32(isa, db, |db| {
            let parts: Vec<_> = db.chunks_mut(width * rank).collect();
            let fill = |row: usize, line: &mut [f32]| {
                for (value, s) in line.iter_mut().zip(&s[row * rank..]) {
                    *value = s.to_f32();
                }
            };
            left.product(dots, threads, fill, dy, width, parts, |tiles, cols, db: &mut [f32]| {
                for (c, line) in db.chunks_mut(rank).enumerate() {
                    for (i, value) in line.iter_mut().enumerate() {
                        *value = lora.scaling * element(tiles, i, c, cols);
                    }
                }
            });
        });
    }
}

/// Element `(i, c)` of a task's result.
#[inline(always)]
fn element(tiles: &[f32], i: usize, c: usize, cols: usize) -> f32 {
    tiles[i / SIDE * SIDE * padded(cols) + place(i % SIDE, c, cols)]
}

/// The left operand: the transpose of a `[rows, rank]` matrix, as leading parts and, if `height` is `2·rank`,
/// trailing parts below them.
struct Left {
    rows: usize,
    rank: usize,
    height: usize,
}

impl Left {
    /// Computes the product with the source for each task's columns, and hands it to `store` with the task's
    /// destination. `fill` writes a row of the untransposed matrix; task t owns columns `t·width ..`.
    fn product<D: Dots, T: Send>(
        &self,
        dots: D,
        threads: usize,
        fill: impl Fn(usize, &mut [f32]) + Sync,
        source: &Source<'_>,
        width: usize,
        destinations: Vec<T>,
        store: impl Fn(&[f32], usize, T) + Sync,
    ) {
        let height = self.height.next_multiple_of(SIDE);
        scratch::with_bf16(
            self.rows.div_ceil(DEPTH) * height * STRIDE,
            #[inline(always)]
            |packed| {
                let tasks: Vec<_> = blocks(self.rows).zip(packed.chunks_mut(height * STRIDE)).collect();
                parallel::for_each(threads, tasks, |((row, _), block)| {
                    dots.base().vectorize(
                        #[inline(always)]
                        || self.pack(dots.base(), row, &fill, block),
                    );
                });
                let packed = &*packed;
                let tasks: Vec<_> = destinations.into_iter().enumerate().collect();
                parallel::for_each(threads, tasks, |(task, destination)| {
                    let col = task * width;
                    let cols = width.min(source.cols - col);
                    dots.base().vectorize(
                        #[inline(always)]
                        || {
                            scratch::with(
                                height * padded(cols),
                                #[inline(always)]
                                |tiles| {
                                    dots.prepared(
                                        #[inline(always)]
                                        || self.columns(dots, packed, source, (col, cols), tiles),
                                    );
                                    store(tiles, cols, destination);
                                },
                            );
                        },
                    );
                });
            },
        );
    }

    /// One block of depth, from row `first`, in slivers.
    #[inline(always)]
    fn pack<I: Isa>(&self, isa: I, first: usize, fill: &impl Fn(usize, &mut [f32]), block: &mut [bf16]) {
        block.fill(bf16::ZERO);
        let mut values = vec![0.0; self.rank];
        let mut parts = vec![bf16::ZERO; 2 * self.rank];
        for m in 0..DEPTH.min(self.rows - first) {
            fill(first + m, &mut values);
            let (high, low) = parts.split_at_mut(self.rank);
            split::split(isa, &values, high, low);
            for (j, part) in parts.iter().take(self.height).enumerate() {
                block[j * STRIDE + m] = *part;
            }
        }
    }

    #[inline(always)]
    fn columns<D: Dots>(
        &self,
        dots: D,
        packed: &[bf16],
        source: &Source<'_>,
        (col, cols): (usize, usize),
        tiles: &mut [f32],
    ) {
        let height = self.height.next_multiple_of(SIDE);
        if self.rows == 0 {
            tiles.fill(0.0);
        }
        scratch::with_bf16(
            DEPTH * COLUMNS,
            #[inline(always)]
            |panels| {
                for ((row, depth), slivers) in blocks(self.rows).zip(packed.chunks(height * STRIDE)) {
                    row_panels(
                        dots.base(),
                        (self.rows - row, depth),
                        cols,
                        panels,
                        #[inline(always)]
                        |i, line| source.read(row + i, col, line),
                    );
                    for (left, tiles) in slivers.chunks(SLIVER).zip(tiles.chunks_mut(SIDE * padded(cols))) {
                        multiply(dots, (0, depth, depth), left, panels, cols, tiles, row > 0);
                    }
                }
            },
        );
    }
}
