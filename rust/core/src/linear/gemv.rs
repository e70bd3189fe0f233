//! Forward for up to eight rows: each weight row is decoded once, in registers, and multiplied with all
//! rows of x there.
//!
//! Even and odd columns of x are kept apart, because the high nibbles of sixteen bytes are sixteen even
//! columns and the low ones the odd columns between them: decoded values need no interleaving.

use super::forward::Problem;
use super::lora::LowRank;
use super::panel::Source;
use super::scratch;
use crate::codec::spec::Packed;
use crate::dtype::{Element, narrow};
use crate::exec::Exec;
use crate::parallel::{self, split_columns};
use crate::simd::{Isa, LANES, Op};

/// Output columns (weight rows) of a task.
const TASK: usize = 64;

/// Columns of x that one decode step of [`whole_block_dots`] covers: sixteen bytes.
const GROUP: usize = 2 * LANES;

pub(super) fn forward<E: Element>(exec: &Exec, problem: &Problem<'_>, x: &[E], y: &mut [E], s: Option<&mut [E]>) {
    exec.isa.run(Forward { exec, problem, x, y, s: s.unwrap_or_default() });
}

struct Forward<'a, E> {
    exec: &'a Exec,
    problem: &'a Problem<'a>,
    x: &'a [E],
    y: &'a mut [E],
    /// Empty if S is not asked for.
    s: &'a mut [E],
}

impl<E: Element> Op for Forward<'_, E> {
    type Output = ();

    fn eval<I: Isa>(self, isa: I) {
        let (m, weight) = (self.problem.rows, self.problem.weight);
        let (n, k) = (weight.out_features(), weight.in_features());
        let threads = self.exec.threads_for(m * n * k / 4);
        let source = Source::plain(self.x, k);
        let low_rank = self.problem.lora.map(|lora| {
            isa.vectorize(
                #[inline(always)]
                || low_rank_input(isa, lora, &source, m, self.s),
            )
        });
        scratch::with(
            m * k,
            #[inline(always)]
            |wide| {
                let whole = weight.whole_blocks();
                isa.vectorize(
                    #[inline(always)]
                    || widen_rows(isa, &source, whole.is_some(), wide),
                );
                let tasks: Vec<_> = split_columns(self.y, n, TASK).into_iter().enumerate().collect();
                parallel::for_each(threads, tasks, |(i, y)| {
                    let columns = Columns { problem: self.problem, low_rank: low_rank.as_deref(), n0: i * TASK, y };
                    isa.vectorize(
                        #[inline(always)]
                        || columns.eval(isa, whole, wide),
                    );
                });
            },
        );
    }
}

/// x in float32, row-major; within each [`GROUP`] of columns the even ones first if `split`.
#[inline(always)]
fn widen_rows<I: Isa, E: Element>(isa: I, source: &Source<'_, E>, split: bool, wide: &mut [f32]) {
    if source.cols == 0 {
        return;
    }
    for (row, line) in wide.chunks_mut(source.cols).enumerate() {
        source.read(isa, row, 0, line);
        if split {
            for group in line.as_chunks_mut::<GROUP>().0 {
                let natural = *group;
                for i in 0..LANES {
                    group[i] = natural[2 * i];
                    group[LANES + i] = natural[2 * i + 1];
                }
            }
        }
    }
}

/// `scaling·S`, `[m, r]`; writes S itself if it is asked for.
#[inline(always)]
fn low_rank_input<I: Isa, E: Element>(
    isa: I,
    lora: &LowRank<'_>,
    source: &Source<'_, E>,
    m: usize,
    s: &mut [E],
) -> Vec<f32> {
    let k = source.cols;
    let source = Source { dropout: lora.dropout, ..*source };
    let mut product = vec![0.0_f32; m * lora.rank];
    scratch::with(
        k,
        #[inline(always)]
        |line| {
            for (row, out) in product.chunks_mut(lora.rank.max(1)).enumerate() {
                source.read(isa, row, 0, line);
                for (j, value) in out.iter_mut().enumerate() {
                    *value = dot(isa, line, &lora.a[j * k..][..k]);
                }
            }
        },
    );
    if !s.is_empty() {
        narrow(isa, &product, s);
    }
    for value in &mut product {
        *value *= lora.scaling;
    }
    product
}

/// `Σ a[i]·b[i]` in sixteen lanes; the tail by itself.
#[inline(always)]
fn dot<I: Isa>(isa: I, a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = isa.splat(0.0);
    for (a, b) in a.iter().zip(b) {
        sums = isa.fma(isa.load(a), isa.load(b), sums);
    }
    a_tail.iter().zip(b_tail).fold(isa.reduce_sum(sums), |sum, (a, b)| a.mul_add(*b, sum))
}

/// A range of output columns from `n0`: `y[m]` is row m's part.
struct Columns<'a, E> {
    problem: &'a Problem<'a>,
    low_rank: Option<&'a [f32]>,
    n0: usize,
    y: Vec<&'a mut [E]>,
}

impl<E: Element> Columns<'_, E> {
    #[inline(always)]
    fn eval<I: Isa>(self, isa: I, whole: Option<&Packed<'_>>, x: &[f32]) {
        let count = self.y.first().map_or(0, |row| row.len());
        let mut sums = [[0.0_f32; TASK]; 8];
        match whole {
            Some(packed) => self.whole_blocks(isa, packed, x, count, &mut sums),
            None => self.any_blocks(isa, x, count, &mut sums),
        }
        for (m, (out, sums)) in self.y.into_iter().zip(&mut sums).enumerate() {
            let sums = &mut sums[..count];
            for (j, value) in sums.iter_mut().enumerate() {
                if let (Some(lora), Some(s)) = (self.problem.lora, self.low_rank) {
                    let b = &lora.b[(self.n0 + j) * lora.rank..][..lora.rank];
                    *value += dot(isa, &s[m * lora.rank..][..lora.rank], b);
                }
                *value += self.problem.bias.map_or(0.0, |bias| bias[self.n0 + j]);
            }
            narrow(isa, sums, out);
        }
    }

    /// Rows of the weight are decoded piece by piece into the first-level cache.
    #[inline(always)]
    fn any_blocks<I: Isa>(&self, isa: I, x: &[f32], count: usize, sums: &mut [[f32; TASK]; 8]) {
        const PIECE: usize = 512;
        let k = self.problem.weight.in_features();
        let mut piece = [0.0_f32; PIECE];
        for j in 0..count {
            for col in (0..k).step_by(PIECE) {
                let piece = &mut piece[..PIECE.min(k - col)];
                self.problem.weight.decode(isa, self.n0 + j, col, piece);
                for (m, sums) in sums.iter_mut().enumerate().take(self.problem.rows) {
                    sums[j] += dot(isa, piece, &x[m * k + col..][..piece.len()]);
                }
            }
        }
    }

    /// Rows of the weight are decoded in registers, several at a time so that their chains of
    /// multiply-adds overlap.
    #[inline(always)]
    fn whole_blocks<I: Isa>(&self, isa: I, packed: &Packed<'_>, x: &[f32], count: usize, sums: &mut [[f32; TASK]; 8]) {
        // Rows of the weight at a time: enough chains to hide the latency of a multiply-add, and for more
        // rows of x enough uses of each load of x, which comes from the second-level cache.
        match (self.problem.rows, I::WIDE) {
            (1, true) => self.row_groups::<I, 1, 8>(isa, packed, x, count, sums),
            (2, true) => self.row_groups::<I, 2, 4>(isa, packed, x, count, sums),
            (3, true) => self.row_groups::<I, 3, 4>(isa, packed, x, count, sums),
            (4, true) => self.row_groups::<I, 4, 4>(isa, packed, x, count, sums),
            (5, true) => self.row_groups::<I, 5, 2>(isa, packed, x, count, sums),
            (6, true) => self.row_groups::<I, 6, 2>(isa, packed, x, count, sums),
            (7, true) => self.row_groups::<I, 7, 2>(isa, packed, x, count, sums),
            (_, true) => self.row_groups::<I, 8, 2>(isa, packed, x, count, sums),
            (1, false) => self.row_groups::<I, 1, 2>(isa, packed, x, count, sums),
            (2, false) => self.row_groups::<I, 2, 1>(isa, packed, x, count, sums),
            (3, false) => self.row_groups::<I, 3, 1>(isa, packed, x, count, sums),
            (4, false) => self.row_groups::<I, 4, 1>(isa, packed, x, count, sums),
            (5, false) => self.row_groups::<I, 5, 1>(isa, packed, x, count, sums),
            (6, false) => self.row_groups::<I, 6, 1>(isa, packed, x, count, sums),
            (7, false) => self.row_groups::<I, 7, 1>(isa, packed, x, count, sums),
            (_, false) => self.row_groups::<I, 8, 1>(isa, packed, x, count, sums),
        }
    }

    #[inline(always)]
    fn row_groups<I: Isa, const M: usize, const R: usize>(
        &self,
        isa: I,
        packed: &Packed<'_>,
        x: &[f32],
        count: usize,
        sums: &mut [[f32; TASK]; 8],
    ) {
        let k = self.problem.weight.in_features();
        let blocks = k / packed.spec().block_size();
        scratch::with(
            R * blocks,
            #[inline(always)]
            |scales| {
                for j in (0..count).step_by(R) {
                    // The last group may reach past the range: its extra rows repeat the last one.
                    let mut rows = [0; R];
                    for (r, row) in rows.iter_mut().enumerate() {
                        *row = self.n0 + (j + r).min(count - 1);
                        packed.scales().decode(*row * blocks, &mut scales[r * blocks..][..blocks]);
                    }
                    let dots = whole_block_dots::<I, M, R>(isa, packed, x, k, rows, scales);
                    for m in 0..M {
                        for r in 0..R.min(count - j) {
                            sums[m][j + r] = dots[m][r];
                        }
                    }
                }
            },
        );
    }
}

/// `Σ_k W[rows[r], k] · x[m, k]` for rows that are whole blocks, with their scales one row after another;
/// x as [`widen_rows`] splits it.
#[inline(always)]
fn whole_block_dots<I: Isa, const M: usize, const R: usize>(
    isa: I,
    packed: &Packed<'_>,
    x: &[f32],
    k: usize,
    rows: [usize; R],
    scales: &[f32],
) -> [[f32; R]; M] {
    let groups_per_block = packed.spec().block_size() / GROUP;
    let (groups, blocks) = (k / GROUP, k / packed.spec().block_size());
    let table = isa.table(packed.spec().quant_type().values());
    let mut bytes: [&[[u8; LANES]]; R] = [&[]; R];
    let mut tables = [table; R];
    for r in 0..R {
        bytes[r] = &packed.codes()[rows[r] * k / 2..][..k / 2].as_chunks().0[..groups];
    }
    let mut columns: [&[[[f32; LANES]; 2]]; M] = [&[]; M];
    for m in 0..M {
        columns[m] = &x[m * k..][..k].as_chunks::<LANES>().0.as_chunks().0[..groups];
    }
    // Plain loops, not closures over the arrays: so the sums stay in registers.
    let mut sums = [[isa.splat(0.0); R]; M];
    for group in 0..groups {
        // Blocks are powers of two.
        if group & (groups_per_block - 1) == 0 {
            for r in 0..R {
                tables[r] = isa.scale_table(table, scales[r * blocks + (group >> groups_per_block.trailing_zeros())]);
            }
        }
        let mut w_even = [isa.splat(0.0); R];
        let mut w_odd = [isa.splat(0.0); R];
        for r in 0..R {
            let (high, low) = isa.nibbles_split(&bytes[r][group]);
            (w_even[r], w_odd[r]) = (isa.lookup(tables[r], high), isa.lookup(tables[r], low));
        }
        for m in 0..M {
            let [x_even, x_odd] = &columns[m][group];
            let (x_even, x_odd) = (isa.load(x_even), isa.load(x_odd));
            for r in 0..R {
                sums[m][r] = isa.fma(w_even[r], x_even, sums[m][r]);
                sums[m][r] = isa.fma(w_odd[r], x_odd, sums[m][r]);
            }
        }
    }
    let mut dots = [[0.0; R]; M];
    for m in 0..M {
        for r in 0..R {
            dots[m][r] = isa.reduce_sum(sums[m][r]);
        }
    }
    dots
}
