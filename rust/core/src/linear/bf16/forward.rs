//! Forward: `yᵀ = W·xᵀ`, so that the weight is decoded along its rows into slivers and x, which is small, is
//! the operand in panels. The low-rank branch is more depth.

use half::bf16;

use super::operand::{DEPTH, SLIVER, STRIDE, Source, blocks, multiply, padded, sliver, transposed_panels, width_for};
use super::split;
use crate::exec::Exec;
use crate::linear::forward::Problem;
use crate::linear::lora::LowRank;
use crate::linear::scratch;
use crate::parallel::{self, split_columns};
use crate::simd::dots::{Dots, SIDE, STEP};
use crate::simd::{DotsOp, Isa, LANES};

/// Rows of x in panels at a time: at one block of depth they fill part of the second-level cache.
const CHUNK: usize = 512;

/// Slivers of a task at the most: their decoded rows and their tiles stay in the second-level cache.
const MOST_SLIVERS: usize = 8;

/// Tasks to aim for, so that any small number of threads is evenly loaded.
const TASKS: usize = 8;

/// A forward call.
pub(in crate::linear) struct Forward<'a> {
    pub(in crate::linear) exec: &'a Exec,
    pub(in crate::linear) problem: &'a Problem<'a>,
    pub(in crate::linear) x: &'a [bf16],
    pub(in crate::linear) y: &'a mut [bf16],
    /// Empty if S is not asked for.
    pub(in crate::linear) s: &'a mut [bf16],
}

impl DotsOp for Forward<'_> {
    fn eval<D: Dots>(self, dots: D) {
        let (n, k) = (self.problem.weight.out_features(), self.problem.weight.in_features());
        let rank = self.problem.lora.map_or(0, LowRank::rank);
        let threads = self.exec.threads_for((self.problem.rows + SIDE) * n * k / 64);
        let a_rows = (2 * rank).next_multiple_of(SIDE);
        scratch::with_bf16(
            k.div_ceil(DEPTH) * a_rows * STRIDE,
            #[inline(always)]
            |a_slivers| {
                if let Some(lora) = self.problem.lora {
                    pack_a(dots.base(), threads, lora, k, a_slivers);
                }
                let (mut y, mut s) = (self.y, self.s);
                for first in (0..self.problem.rows).step_by(CHUNK) {
                    let rows = CHUNK.min(self.problem.rows - first);
                    let (y_now, y_after) = y.split_at_mut(rows * n);
                    let (s_now, s_after) = s.split_at_mut((rows * rank).min(s.len()));
                    (y, s) = (y_after, s_after);
                    let x = Source { first_row: first, ..Source::plain(&self.x[first * k..][..rows * k], k) };
                    Chunk { threads, problem: self.problem, rows, x, a_slivers }.eval(dots, y_now, s_now);
                }
            },
        );
    }
}

/// A in slivers, block after block of depth: its leading parts, below them its trailing parts.
fn pack_a<I: Isa>(isa: I, threads: usize, lora: &LowRank<'_>, k: usize, out: &mut [bf16]) {
    let rank = lora.rank;
    let rows = (2 * rank).next_multiple_of(SIDE);
    let tasks: Vec<_> = blocks(k).zip(out.chunks_mut((rows * STRIDE).max(1))).collect();
    parallel::for_each(threads, tasks, |((col, _), block)| {
        isa.vectorize(
            #[inline(always)]
            || {
                block.fill(bf16::ZERO);
                let count = DEPTH.min(k - col);
                let (high, rest) = block.split_at_mut(rank * STRIDE);
                for (j, (high, low)) in high.chunks_mut(STRIDE).zip(rest.chunks_mut(STRIDE)).enumerate() {
                    let values = &lora.a[j * k + col..][..count];
                    split::split(isa, values, &mut high[..count], &mut low[..count]);
                }
            },
        );
    });
}

/// Up to [`CHUNK`] rows.
struct Chunk<'a> {
    threads: usize,
    problem: &'a Problem<'a>,
    rows: usize,
    x: Source<'a>,
    a_slivers: &'a [bf16],
}

impl Chunk<'_> {
    fn eval<D: Dots>(&self, dots: D, y: &mut [bf16], s: &mut [bf16]) {
        let isa = dots.base();
        let (n, k) = (self.problem.weight.out_features(), self.problem.weight.in_features());
        let room = padded(self.rows);
        let rank = self.problem.lora.map_or(0, LowRank::rank);
        scratch::with_bf16(
            room * k.next_multiple_of(STEP),
            #[inline(always)]
            |x_panels| {
                self.pack(isa, &self.x, x_panels);
                scratch::with_bf16(
                    room * split::depth(rank),
                    #[inline(always)]
                    |s_panels| {
                        if let Some(lora) = self.problem.lora {
                            if lora.dropout.is_some() {
                                let dropped = Source { dropout: lora.dropout, ..self.x };
                                scratch::with_bf16(
                                    room * k.next_multiple_of(STEP),
                                    #[inline(always)]
                                    |panels| {
                                        self.pack(isa, &dropped, panels);
                                        self.low_rank_input(dots, lora, panels, s_panels, s);
                                    },
                                );
                            } else {
                                self.low_rank_input(dots, lora, x_panels, s_panels, s);
                            }
                        }
                        let slivers = n.div_ceil(SIDE).div_ceil(TASKS).clamp(1, MOST_SLIVERS);
                        let width = slivers * SIDE;
                        let tasks: Vec<_> = split_columns(y, n, width).into_iter().enumerate().collect();
                        let operands = Operands { problem: self.problem, rows: self.rows, x_panels, s_panels };
                        parallel::for_each(self.threads, tasks, |(i, y)| {
                            isa.vectorize(
                                #[inline(always)]
                                || {
                                    dots.prepared(
                                        #[inline(always)]
                                        || operands.columns(dots, i * width, slivers, y),
                                    );
                                },
                            );
                        });
                    },
                );
            },
        );
    }

    /// The source in panels, block after block of depth.
    fn pack<I: Isa>(&self, isa: I, source: &Source<'_>, out: &mut [bf16]) {
        let tasks: Vec<_> = blocks(source.cols).zip(out.chunks_mut(padded(self.rows) * DEPTH)).collect();
        parallel::for_each(self.threads, tasks, |(span, out)| {
            isa.vectorize(
                #[inline(always)]
                || transposed_panels(isa, source, self.rows, span, out),
            );
        });
    }

    /// S, and panels of `scaling·Sᵀ` in split pairs.
    fn low_rank_input<D: Dots>(
        &self,
        dots: D,
        lora: &LowRank<'_>,
        x_panels: &[bf16],
        s_panels: &mut [bf16],
        s: &mut [bf16],
    ) {
        let (isa, rank) = (dots.base(), lora.rank);
        if rank == 0 {
            return;
        }
        let mut s_rows: Vec<_> = s.chunks_mut(SIDE * rank).collect();
        s_rows.resize_with(self.rows.div_ceil(SIDE), Default::default);
        let panels = s_panels.chunks_mut(SIDE * split::depth(rank));
        let tasks: Vec<_> = panels.zip(s_rows).enumerate().collect();
        parallel::for_each(self.threads, tasks, |(i, (panel, s))| {
            isa.vectorize(
                #[inline(always)]
                || {
                    dots.prepared(
                        #[inline(always)]
                        || self.low_rank_panel(dots, lora, i * SIDE, x_panels, panel, s),
                    );
                },
            );
        });
    }

    /// [`Chunk::low_rank_input`] for the rows of one panel, from row `first`.
    #[inline(always)]
    fn low_rank_panel<D: Dots>(
        &self,
        dots: D,
        lora: &LowRank<'_>,
        first: usize,
        x_panels: &[bf16],
        panel: &mut [bf16],
        s: &mut [bf16],
    ) {
        let (isa, rank, k) = (dots.base(), lora.rank, self.x.cols);
        let (room, width) = (padded(self.rows), width_for(self.rows - first));
        let a_rows = (2 * rank).next_multiple_of(SIDE);
        scratch::with(
            a_rows * width,
            #[inline(always)]
            |sums| {
                sums.fill(0.0);
                for ((col, depth), slivers) in blocks(k).zip(self.a_slivers.chunks(a_rows * STRIDE)) {
                    let x = &x_panels[room * col + first * depth..][..depth * width];
                    for (left, tile) in slivers.chunks(SLIVER).zip(sums.chunks_mut(SIDE * width)) {
                        dots.multiply(left, STRIDE, x, width, tile);
                    }
                }
                let keep = lora.dropout.map_or(1.0, |dropout| 1.0 / (1.0 - dropout.p()));
                let (high, low) = sums.split_at_mut(rank * width);
                for (a, b) in high.iter_mut().zip(&*low) {
                    *a = (*a + b) * keep;
                }
                panel.fill(bf16::ZERO);
                let (once, again) = panel.split_at_mut(2 * rank * width);
                for (values, out) in high.chunks(width).zip(once.chunks_mut(2 * width)) {
                    split::pairs(isa, values, lora.scaling, out);
                }
                again[..once.len()].copy_from_slice(once);
                for (row, out) in s.chunks_mut(rank).enumerate() {
                    for (value, sums) in out.iter_mut().zip(high.chunks(width)) {
                        *value = bf16::from_f32(sums[row]);
                    }
                }
            },
        );
    }
}

/// What every task of a chunk reads.
struct Operands<'a> {
    problem: &'a Problem<'a>,
    rows: usize,
    x_panels: &'a [bf16],
    s_panels: &'a [bf16],
}

impl Operands<'_> {
    /// Output columns from `n0`, `slivers` slivers of them: `y[m]` is row m's part.
    #[inline(always)]
    fn columns<D: Dots>(&self, dots: D, n0: usize, slivers: usize, y: Vec<&mut [bf16]>) {
        scratch::with(
            slivers * SIDE * padded(self.rows),
            #[inline(always)]
            |tiles| {
                tiles.fill(0.0);
                scratch::with_bf16(
                    slivers * SLIVER,
                    #[inline(always)]
                    |w| {
                        self.add_weight(dots, n0, w, tiles);
                        self.add_low_rank(dots, n0, w, tiles);
                    },
                );
                self.store(dots.base(), n0, tiles, y);
            },
        );
    }

    #[inline(always)]
    fn add_weight<D: Dots>(&self, dots: D, n0: usize, w: &mut [bf16], tiles: &mut [f32]) {
        let weight = self.problem.weight;
        let (n, k) = (weight.out_features(), weight.in_features());
        let room = padded(self.rows);
        for (col, depth) in blocks(k) {
            let count = depth.min(k - col);
            let panels = &self.x_panels[room * col..][..room * depth];
            for (i, (left, tiles)) in w.chunks_mut(SLIVER).zip(tiles.chunks_mut(SIDE * room)).enumerate() {
                let row = n0 + i * SIDE;
                sliver(
                    n.saturating_sub(row),
                    depth,
                    left,
                    #[inline(always)]
                    |j, out| {
                        let (inside, outside) = out.split_at_mut(count);
                        weight.decode(dots.base(), row + j, col, inside);
                        outside.fill(bf16::ZERO);
                    },
                );
                multiply(dots, (0, depth, depth), left, panels, self.rows, tiles);
            }
        }
    }

    #[inline(always)]
    fn add_low_rank<D: Dots>(&self, dots: D, n0: usize, w: &mut [bf16], tiles: &mut [f32]) {
        let Some(lora) = self.problem.lora else { return };
        let (n, room, height) = (self.problem.weight.out_features(), padded(self.rows), split::depth(lora.rank));
        scratch::with_bf16(
            height,
            #[inline(always)]
            |line| {
                for (from, depth) in blocks(height) {
                    for (i, (left, tiles)) in w.chunks_mut(SLIVER).zip(tiles.chunks_mut(SIDE * room)).enumerate() {
                        let row = n0 + i * SIDE;
                        sliver(
                            n.saturating_sub(row),
                            depth,
                            left,
                            #[inline(always)]
                            |j, out| {
                                split::doubled(dots.base(), &lora.b[(row + j) * lora.rank..][..lora.rank], line);
                                out.copy_from_slice(&line[from..][..depth]);
                            },
                        );
                        multiply(dots, (from, depth, height), left, self.s_panels, self.rows, tiles);
                    }
                }
            },
        );
    }

    /// Transposes the tiles into the rows of y, adds the bias, and rounds.
    #[inline(always)]
    fn store<I: Isa>(&self, isa: I, n0: usize, tiles: &[f32], mut y: Vec<&mut [bf16]>) {
        let room = padded(self.rows);
        for (i, tiles) in tiles.chunks(SIDE * room).enumerate() {
            for half in [0, LANES] {
                let col = i * SIDE + half;
                let mut bias = [0.0; LANES];
                if let Some(values) = self.problem.bias {
                    for (b, value) in bias.iter_mut().zip(values.iter().skip(n0 + col)) {
                        *b = *value;
                    }
                }
                let bias = isa.load(&bias);
                for first in (0..self.rows).step_by(LANES) {
                    let panel = first / SIDE * SIDE;
                    let width = width_for(self.rows - panel);
                    let tile = &tiles[panel * SIDE + half * width + (first - panel)..];
                    let mut lines = [bias; LANES];
                    for (line, sums) in lines.iter_mut().zip(tile.chunks(width)) {
                        *line = isa.load(sums.first_chunk().expect("a vector"));
                    }
                    let lines = isa.transpose(lines);
                    for (line, out) in lines.into_iter().zip(y.iter_mut().skip(first)) {
                        let Some(out) = out.get_mut(col..) else { continue };
                        let line = isa.add(line, bias);
                        if let Some(out) = out.first_chunk_mut() {
                            isa.store_bf16(line, out);
                        } else {
                            let mut whole = [bf16::ZERO; LANES];
                            isa.store_bf16(line, &mut whole);
                            out.copy_from_slice(&whole[..out.len()]);
                        }
                    }
                }
            }
        }
    }
}
