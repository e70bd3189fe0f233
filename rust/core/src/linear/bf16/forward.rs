//! Forward: `yᵀ = W·xᵀ`, so that the weight is decoded along its rows into slivers and x, which is small, is
//! the operand in panels. The low-rank branch is more depth. Members of a group share the panels of x.

use half::bf16;

use super::operand::{DEPTH, SLIVER, STRIDE, Source};
use super::operand::{blocks, multiply, padded, parts, sliver, transposed_panels, width_for};
use super::split;
use super::store::store;
use crate::exec::Exec;
use crate::linear::forward::Problem;
use crate::linear::lora::LowRank;
use crate::linear::scratch;
use crate::parallel::{self, split_columns};
use crate::simd::dots::{Dots, SIDE, STEP};
use crate::simd::{DotsOp, Isa};

/// Rows of x in panels at a time: at one block of depth they fill part of the second-level cache.
const CHUNK: usize = 512;

/// Slivers of a task at the most: their decoded rows and their tiles stay in the second-level cache.
const MOST_SLIVERS: usize = 8;

/// Tasks of a member to aim for, so that any small number of threads is evenly loaded.
const TASKS: usize = 8;

/// One of the linears of a call.
pub(in crate::linear) struct Member<'a> {
    pub(in crate::linear) problem: Problem<'a>,
    pub(in crate::linear) y: &'a mut [bf16],
    /// Empty if S is not asked for.
    pub(in crate::linear) s: &'a mut [bf16],
}

/// A forward call: the members have the same `rows` and columns of x.
pub(in crate::linear) struct Forward<'a> {
    pub(in crate::linear) exec: &'a Exec,
    pub(in crate::linear) rows: usize,
    pub(in crate::linear) cols: usize,
    pub(in crate::linear) x: &'a [bf16],
    pub(in crate::linear) members: Vec<Member<'a>>,
}

/// Rows of A's slivers: its leading parts, below them its trailing ones.
fn a_rows(lora: Option<&LowRank<'_>>) -> usize {
    lora.map_or(0, |lora| (2 * lora.rank).next_multiple_of(SIDE))
}

impl DotsOp for Forward<'_> {
    fn eval<D: Dots>(self, dots: D) {
        let k = self.cols;
        let outputs: usize = self.members.iter().map(|member| member.problem.weight.out_features()).sum();
        let threads = self.exec.threads_for((self.rows + SIDE) * outputs * k / 16);
        let sizes: Vec<_> =
            self.members.iter().map(|member| k.div_ceil(DEPTH) * a_rows(member.problem.lora) * STRIDE).collect();
        scratch::with_bf16(
            sizes.iter().sum(),
            #[inline(always)]
            |a_slivers| {
                let mut a_slivers = parts(a_slivers, sizes.into_iter());
                let mut members = self.members;
                for (member, a_slivers) in members.iter().zip(&mut a_slivers) {
                    if let Some(lora) = member.problem.lora {
                        pack_a(dots.base(), threads, lora, k, a_slivers);
                    }
                }
                for first in (0..self.rows).step_by(CHUNK) {
                    let rows = CHUNK.min(self.rows - first);
                    let x = Source { first_row: first, ..Source::plain(&self.x[first * k..][..rows * k], k) };
                    let parts = members.iter_mut().zip(&a_slivers).map(|(member, a_slivers)| {
                        let Member { problem, y, s } = member;
                        let rank = problem.lora.map_or(0, LowRank::rank);
                        let y = y.split_off_mut(..rows * problem.weight.out_features()).expect("rows of y");
                        let s = s.split_off_mut(..(rows * rank).min(s.len())).expect("rows of S");
                        Part { problem, a_slivers, y, s }
                    });
                    Chunk { threads, rows, x }.eval(dots, parts.collect());
                }
            },
        );
    }
}

/// A in slivers, block after block of depth.
fn pack_a<I: Isa>(isa: I, threads: usize, lora: &LowRank<'_>, k: usize, out: &mut [bf16]) {
    let (rank, rows) = (lora.rank, a_rows(Some(lora)));
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

/// Up to [`CHUNK`] rows of x.
struct Chunk<'a> {
    threads: usize,
    rows: usize,
    x: Source<'a>,
}

/// A member's part of a chunk.
struct Part<'a> {
    problem: &'a Problem<'a>,
    a_slivers: &'a [bf16],
    y: &'a mut [bf16],
    s: &'a mut [bf16],
}

impl Chunk<'_> {
    fn eval<D: Dots>(&self, dots: D, mut members: Vec<Part<'_>>) {
        let room = padded(self.rows);
        let depths: Vec<_> =
            members.iter().map(|part| room * split::depth(part.problem.lora.map_or(0, LowRank::rank))).collect();
        scratch::with_bf16(
            room * self.x.cols.next_multiple_of(STEP),
            #[inline(always)]
            |x_panels| {
                self.pack(dots.base(), &self.x, x_panels);
                scratch::with_bf16(
                    depths.iter().sum(),
                    #[inline(always)]
                    |s_panels| {
                        let mut s_panels = parts(s_panels, depths.into_iter());
                        for (part, s_panels) in members.iter_mut().zip(&mut s_panels) {
                            if let Some(lora) = part.problem.lora {
                                self.branch(dots, lora, part.a_slivers, x_panels, s_panels, part.s);
                            }
                        }
                        self.outputs(dots, x_panels, &s_panels, members);
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

    /// [`Chunk::low_rank_input`] of x, or of what dropout leaves of it.
    fn branch<D: Dots>(
        &self,
        dots: D,
        lora: &LowRank<'_>,
        a_slivers: &[bf16],
        x_panels: &[bf16],
        s_panels: &mut [bf16],
        s: &mut [bf16],
    ) {
        if lora.dropout.is_none() {
            return self.low_rank_input(dots, lora, a_slivers, x_panels, s_panels, s);
        }
        let dropped = Source { dropout: lora.dropout, ..self.x };
        scratch::with_bf16(
            x_panels.len(),
            #[inline(always)]
            |panels| {
                self.pack(dots.base(), &dropped, panels);
                self.low_rank_input(dots, lora, a_slivers, panels, s_panels, s);
            },
        );
    }

    /// S, and panels of `scaling·Sᵀ` in split pairs.
    fn low_rank_input<D: Dots>(
        &self,
        dots: D,
        lora: &LowRank<'_>,
        a_slivers: &[bf16],
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
                        || self.low_rank_panel(dots, lora, a_slivers, (i * SIDE, x_panels), panel, s),
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
        a_slivers: &[bf16],
        (first, x_panels): (usize, &[bf16]),
        panel: &mut [bf16],
        s: &mut [bf16],
    ) {
        let (isa, rank, k) = (dots.base(), lora.rank, self.x.cols);
        let (room, width) = (padded(self.rows), width_for(self.rows - first));
        let rows = a_rows(Some(lora));
        scratch::with(
            rows * width,
            #[inline(always)]
            |sums| {
                if k == 0 {
                    sums.fill(0.0);
                }
                for ((col, depth), slivers) in blocks(k).zip(a_slivers.chunks(rows * STRIDE)) {
                    let x = &x_panels[room * col + first * depth..][..depth * width];
                    for (left, tile) in slivers.chunks(SLIVER).zip(sums.chunks_mut(SIDE * width)) {
                        dots.multiply(left, STRIDE, x, width, tile, col > 0);
                    }
                }
                let keep = lora.dropout.map_or(1.0, |dropout| 1.0 / (1.0 - dropout.p()));
                let (high, low) = sums.split_at_mut(rank * width);
                for (a, b) in high.iter_mut().zip(&*low) {
                    *a = (*a + b) * keep;
                }
                if let Some(row_ranks) = &lora.row_ranks {
                    row_ranks.clear_others_across((self.x.first_row + first, self.rows - first), width, high);
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

    /// y of every member: a task is a range of one's columns.
    fn outputs<D: Dots>(&self, dots: D, x_panels: &[bf16], s_panels: &[&mut [bf16]], members: Vec<Part<'_>>) {
        let mut tasks = Vec::new();
        for (part, s_panels) in members.into_iter().zip(s_panels) {
            let n = part.problem.weight.out_features();
            let slivers = n.div_ceil(SIDE).div_ceil(TASKS).clamp(1, MOST_SLIVERS);
            for (i, y) in split_columns(part.y, n, slivers * SIDE).into_iter().enumerate() {
                let operands = Operands { problem: part.problem, rows: self.rows, x_panels, s_panels };
                tasks.push((operands, i * slivers * SIDE, slivers, y));
            }
        }
        parallel::for_each(self.threads, tasks, |(operands, n0, slivers, y)| {
            dots.base().vectorize(
                #[inline(always)]
                || {
                    dots.prepared(
                        #[inline(always)]
                        || operands.columns(dots, n0, slivers, y),
                    );
                },
            );
        });
    }
}

/// What a task reads.
struct Operands<'a> {
    problem: &'a Problem<'a>,
    rows: usize,
    x_panels: &'a [bf16],
    s_panels: &'a [bf16],
}

impl Operands<'_> {
    /// Output columns from `n0`, `slivers` slivers of them: `y[m]` is row m's part.
    #[inline(always)]
    fn columns<D: Dots>(&self, dots: D, n0: usize, slivers: usize, mut y: Vec<&mut [bf16]>) {
        scratch::with(
            slivers * SIDE * padded(self.rows),
            #[inline(always)]
            |tiles| {
                if self.problem.weight.in_features() == 0 {
                    tiles.fill(0.0);
                }
                scratch::with_bf16(
                    slivers * SLIVER,
                    #[inline(always)]
                    |w| {
                        self.add_weight(dots, n0, w, tiles);
                        self.add_low_rank(dots, n0, w, tiles);
                    },
                );
                store(dots.base(), self.problem.bias.map(|bias| &bias[n0..]), tiles, &mut y);
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
                multiply(dots, (0, depth, depth), left, panels, self.rows, tiles, col > 0);
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
                        multiply(dots, (from, depth, height), left, self.s_panels, self.rows, tiles, true);
                    }
                }
            },
        );
    }
}
