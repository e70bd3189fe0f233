//! Forward for one or two rows of x, and for up to [`MOST_ROWS`] if the weight's rows are not whole blocks.
//!
//! Rows of the weight are read in the order in which they are stored. Sixteen words of codes are sixteen lanes
//! of eight nibbles each: a shift and a table lookup decode nibble j of all of them, which are columns j,
//! 8 + j, 16 + j, …; x is put into that order once. A group's sums are scaled when they are added to the
//! row's, so decoding costs no multiplication.

use super::forward::Problem;
use super::low_rank_input::low_rank_input;
use super::panel::Source;
use super::row_scales::row_scales;
use super::scratch;
use crate::codec::spec::Packed;
use crate::dtype::{Element, narrow};
use crate::exec::Exec;
use crate::parallel::{self, split_columns};
use crate::simd::{Isa, LANES, Op};

/// Rows of x at the most.
pub(super) const MOST_ROWS: usize = 8;

/// Rows of x up to which a weight of whole blocks is decoded in registers.
pub(super) const IN_REGISTERS: usize = 2;

/// Output columns (weight rows) of a task.
const TASK: usize = 64;

/// Nibbles of a word.
const NIBBLES: usize = 8;

/// Columns of a group: sixteen words.
const GROUP: usize = NIBBLES * LANES;

/// Bytes ahead of those in use that are asked for: about what is used in the latency of memory.
const AHEAD: usize = 1024;

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
        let threads = self.exec.threads_for(self.problem.operations());
        let source = Source::plain(self.x, k);
        let s = self.problem.lora.map(|lora| {
            let mut s = low_rank_input(isa, threads, lora, &source, m, self.s);
            for value in &mut s {
                *value *= lora.scaling;
            }
            s
        });
        let whole = weight.whole_blocks().filter(|_| m <= IN_REGISTERS);
        let stride = if whole.is_some() { k.next_multiple_of(GROUP) } else { k };
        scratch::with(
            m * stride,
            #[inline(always)]
            |x| {
                isa.vectorize(
                    #[inline(always)]
                    || widen_rows(isa, &source, stride, whole.is_some(), x),
                );
                let operands = Operands { problem: self.problem, s: s.as_deref(), x };
                let tasks: Vec<_> = split_columns(self.y, n, TASK).into_iter().enumerate().collect();
                parallel::for_each(threads, tasks, |(i, y)| {
                    operands.columns(isa, whole, i * TASK, y);
                });
            },
        );
    }
}

/// x in float32, rows `stride` apart; if `split`, each [`GROUP`] of columns with nibble 0 of every word first,
/// then nibble 1, and so on, and zero past the last column.
#[inline(always)]
fn widen_rows<I: Isa, E: Element>(isa: I, source: &Source<'_, E>, stride: usize, split: bool, out: &mut [f32]) {
    for (row, line) in out.chunks_mut(stride.max(1)).enumerate() {
        let (values, missing) = line.split_at_mut(source.cols);
        source.read(isa, row, 0, values);
        missing.fill(0.0);
        if split {
            for group in line.as_chunks_mut::<GROUP>().0 {
                let natural = *group;
                for (j, nibble) in group.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                    for (i, value) in nibble.iter_mut().enumerate() {
                        *value = natural[NIBBLES * i + j];
                    }
                }
            }
        }
    }
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

/// What every task reads.
struct Operands<'a> {
    problem: &'a Problem<'a>,
    /// `scaling·S`, `[m, r]`.
    s: Option<&'a [f32]>,
    /// As [`widen_rows`] writes it.
    x: &'a [f32],
}

type Sums = [[f32; TASK]; MOST_ROWS];

impl Operands<'_> {
    /// Output columns from `n0`: `y[m]` is row m's part.
    fn columns<I: Isa, E: Element>(&self, isa: I, whole: Option<&Packed<'_>>, n0: usize, y: Vec<&mut [E]>) {
        let count = y.first().map_or(0, |row| row.len());
        let sums = self.sums(isa, whole, n0, count);
        isa.vectorize(
            #[inline(always)]
            || {
                for (out, sums) in y.into_iter().zip(&sums) {
                    narrow(isa, &sums[..count], out);
                }
            },
        );
    }

    /// `count` columns of y from column `n0`, in float32. Apart from [`Operands::columns`], so that it is not
    /// compiled for every type of activations.
    fn sums<I: Isa>(&self, isa: I, whole: Option<&Packed<'_>>, n0: usize, count: usize) -> Sums {
        let mut sums: Sums = [[0.0; TASK]; MOST_ROWS];
        let m = self.problem.rows;
        isa.vectorize(
            #[inline(always)]
            || {
                match (whole, m, I::WIDE) {
                    (Some(packed), 1, true) => self.whole_blocks::<I, 1, 2>(isa, packed, n0, count, &mut sums),
                    (Some(packed), 1, false) => self.whole_blocks::<I, 1, 1>(isa, packed, n0, count, &mut sums),
                    (Some(packed), _, true) => self.whole_blocks::<I, 2, 2>(isa, packed, n0, count, &mut sums),
                    (Some(packed), _, false) => self.whole_blocks::<I, 2, 1>(isa, packed, n0, count, &mut sums),
                    (None, ..) => self.any_blocks(isa, n0, count, &mut sums),
                }
                for (m, sums) in sums.iter_mut().enumerate().take(m) {
                    for (j, value) in sums[..count].iter_mut().enumerate() {
                        if let (Some(lora), Some(s)) = (self.problem.lora, self.s) {
                            let b = &lora.b[(n0 + j) * lora.rank..][..lora.rank];
                            *value += dot(isa, &s[m * lora.rank..][..lora.rank], b);
                        }
                        *value += self.problem.bias.map_or(0.0, |bias| bias[n0 + j]);
                    }
                }
            },
        );
        sums
    }

    /// Rows of the weight are decoded piece by piece into the first-level cache.
    #[inline(always)]
    fn any_blocks<I: Isa>(&self, isa: I, n0: usize, count: usize, sums: &mut Sums) {
        const PIECE: usize = 512;
        let k = self.problem.weight.in_features();
        let mut piece = [0.0_f32; PIECE];
        for j in 0..count {
            for col in (0..k).step_by(PIECE) {
                let piece = &mut piece[..PIECE.min(k - col)];
                self.problem.weight.decode(isa, n0 + j, col, piece);
                for (m, sums) in sums.iter_mut().enumerate().take(self.problem.rows) {
                    sums[j] += dot(isa, piece, &self.x[m * k + col..][..piece.len()]);
                }
            }
        }
    }

    /// Rows of the weight are decoded in registers, `R` at a time so that they share their loads of x.
    #[inline(always)]
    fn whole_blocks<I: Isa, const M: usize, const R: usize>(
        &self,
        isa: I,
        packed: &Packed<'_>,
        n0: usize,
        count: usize,
        sums: &mut Sums,
    ) {
        let blocks = self.problem.weight.in_features() / packed.spec().block_size();
        // The last group of a row may reach past its blocks, where x is zero.
        let stride = blocks + LANES;
        scratch::with(
            R * stride,
            #[inline(always)]
            |scales| {
                scales.fill(0.0);
                for j in (0..count).step_by(R) {
                    // The last rows may reach past the range: the extra ones repeat the last one.
                    let mut rows = [0; R];
                    for (row, (r, scales)) in rows.iter_mut().zip(scales.chunks_mut(stride).enumerate()) {
                        *row = n0 + (j + r).min(count - 1);
                        row_scales(isa, packed, *row, &mut scales[..blocks]);
                    }
                    let dots = self.dots::<I, M, R>(isa, packed, rows, scales);
                    for m in 0..M {
                        for r in 0..R.min(count - j) {
                            sums[m][j + r] = dots[m][r];
                        }
                    }
                }
            },
        );
    }

    /// `Σ_k W[rows[r], k] · x[m, k]`, with the rows' scales one row after another.
    #[inline(always)]
    fn dots<I: Isa, const M: usize, const R: usize>(
        &self,
        isa: I,
        packed: &Packed<'_>,
        rows: [usize; R],
        scales: &[f32],
    ) -> [[f32; R]; M] {
        let (k, block) = (self.problem.weight.in_features(), packed.spec().block_size());
        let table = isa.table(packed.spec().quant_type().values());
        let lanes = scale_lanes(isa, block);
        let mut codes: [&[u8]; R] = [&[]; R];
        let mut row_scales: [&[f32]; R] = [&[]; R];
        for r in 0..R {
            codes[r] = &packed.codes()[rows[r] * k / 2..][..k / 2];
            row_scales[r] = &scales[r * (scales.len() / R)..][..scales.len() / R];
        }
        let mut x: [&[[[f32; LANES]; NIBBLES]]; M] = [&[]; M];
        for (m, x) in x.iter_mut().enumerate() {
            *x = self.x[m * (self.x.len() / M)..][..self.x.len() / M].as_chunks().0.as_chunks().0;
        }
        let mut sums = [[isa.splat(0.0); R]; M];
        for group in 0..k.div_ceil(GROUP) {
            let from = group * GROUP / 2;
            let mut words = [isa.zero_i(); R];
            let mut scale = [isa.splat(0.0); R];
            for r in 0..R {
                let ahead = rows[r] * k / 2 + from + AHEAD;
                if let Some(group) = packed.codes().get(ahead..).and_then(<[u8]>::first_chunk::<{ GROUP / 2 }>) {
                    isa.prefetch(group);
                }
                words[r] = match codes[r][from..].first_chunk() {
                    Some(words) => isa.load_words(words),
                    None => isa.load_words(&zero_padded(&codes[r][from..])),
                };
                let entries = row_scales[r][group * GROUP / block..].first_chunk();
                scale[r] = isa.lookup(isa.table(entries.expect("sixteen more than the blocks")), lanes);
            }
            let mut columns = [&x[0][group]; M];
            for m in 1..M {
                columns[m] = &x[m][group];
            }
            let parts = group_sums(isa, table, words, columns);
            for m in 0..M {
                for r in 0..R {
                    sums[m][r] = isa.fma(parts[m][r], scale[r], sums[m][r]);
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
}

/// The last, partial group of a row, whose missing columns of x are zero.
fn zero_padded(codes: &[u8]) -> [u8; GROUP / 2] {
    let mut words = [0; GROUP / 2];
    words[..codes.len()].copy_from_slice(codes);
    words
}

/// Index of each lane's scale, from that of the group's first lane.
#[inline(always)]
fn scale_lanes<I: Isa>(isa: I, block: usize) -> I::I {
    let mut lanes = [0_u8; LANES];
    for (i, lane) in lanes.iter_mut().enumerate() {
        *lane = (i * NIBBLES / block) as u8;
    }
    isa.nibbles_split(&lanes).1
}

/// `Σ_j table[nibble j] · x[j]` of each lane, for `R` groups of codes and `M` of x.
#[inline(always)]
fn group_sums<I: Isa, const M: usize, const R: usize>(
    isa: I,
    table: I::Table,
    words: [I::I; R],
    x: [&[[f32; LANES]; NIBBLES]; M],
) -> [[I::F; R]; M] {
    let mut nibbles = [[isa.zero_i(); NIBBLES]; R];
    for r in 0..R {
        nibbles[r] = isa.word_nibbles(words[r]);
    }
    // Plain loops, not closures over the arrays: so the sums stay in registers.
    let mut sums = [[isa.splat(0.0); R]; M];
    for j in 0..NIBBLES {
        let mut w = [isa.splat(0.0); R];
        for r in 0..R {
            w[r] = isa.lookup(table, nibbles[r][j]);
        }
        for m in 0..M {
            let x = isa.load(&x[m][j]);
            for r in 0..R {
                sums[m][r] = isa.fma(w[r], x, sums[m][r]);
            }
        }
    }
    sums
}
