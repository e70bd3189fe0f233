//! Forward for few rows of x, a weight whose rows are whole blocks.
//!
//! A strip of the weight's rows lies along the vector lanes: a step along K multiplies one vector of decoded
//! values with one broadcast element of each row of x, so no sum is ever taken across lanes. The strip is
//! decoded a few columns at a time into the first-level cache, without its scales: a block's sums are
//! scaled once when they are added to the totals. The low-rank branch is one more "block": columns of B
//! times S, scaled by `scaling`.

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

/// Columns that are decoded at a time: the common block. A strip of them is at most 8 KB.
const DEPTH: usize = 64;

/// Columns that [`decode`] reads at a time: four words of nibbles a row.
const STEP: usize = 32;

/// Bytes of codes that [`decode`] reads.
const SQUARE: usize = LANES * STEP / 2;

/// Strips of a task at the most. The last strip of a task fetches codes that another thread may use.
const MOST_STRIPS: usize = 8;

/// Tasks a thread to aim for, so that threads end together.
const TASKS: usize = 8;

/// Vectors across a strip. Two share each broadcast, where the registers suffice.
const fn vectors<I: Isa>() -> usize {
    if I::WIDE { 2 } else { 1 }
}

/// Rows of the weight in a strip.
const fn strip<I: Isa>() -> usize {
    vectors::<I>() * LANES
}

/// Rows of x that are multiplied at a time at the most: their sums fill the registers.
const fn tallest<I: Isa>() -> usize {
    if I::WIDE { 14 } else { 6 }
}

/// x's rows, in passes of equally many.
#[derive(Clone, Copy)]
struct Passes {
    count: usize,
    rows: usize,
}

impl Passes {
    fn new<I: Isa>(m: usize) -> Self {
        let count = m.div_ceil(tallest::<I>());
        Self { count, rows: m.div_ceil(count) }
    }

    /// Rows with those that pad the last pass.
    fn padded(self) -> usize {
        self.count * self.rows
    }
}

pub(super) fn forward<E: Element>(
    exec: &Exec,
    problem: &Problem<'_>,
    packed: &Packed<'_>,
    x: &[E],
    y: &mut [E],
    s: Option<&mut [E]>,
) {
    exec.isa.run(Forward { exec, problem, packed, x, y, s: s.unwrap_or_default() });
}

struct Forward<'a, E> {
    exec: &'a Exec,
    problem: &'a Problem<'a>,
    packed: &'a Packed<'a>,
    x: &'a [E],
    y: &'a mut [E],
    /// Empty if S is not asked for.
    s: &'a mut [E],
}

impl<E: Element> Op for Forward<'_, E> {
    type Output = ();

    fn eval<I: Isa>(self, isa: I) {
        let Self { problem, packed, .. } = self;
        let m = problem.rows;
        let (n, k) = (problem.weight.out_features(), problem.weight.in_features());
        let threads = self.exec.threads_for(self.problem.operations());
        let passes = Passes::new::<I>(m);
        let source = Source::plain(self.x, k);
        let s = problem.lora.map(|lora| low_rank_input(isa, threads, lora, &source, m, self.s)).unwrap_or_default();
        let rank = problem.lora.map_or(0, |lora| lora.rank);
        scratch::with(
            passes.padded() * (k + rank.next_multiple_of(LANES)),
            #[inline(always)]
            |panels| {
                let (x, s_panels) = panels.split_at_mut(passes.padded() * k);
                isa.vectorize(
                    #[inline(always)]
                    || {
                        pack(isa, &source, passes, m, x);
                        pack(isa, &Source::plain(&s, rank), passes, m, s_panels);
                    },
                );
                let strips = Strips { problem, packed, passes, x, s: s_panels };
                let strip = strip::<I>();
                let width = strip * n.div_ceil(strip).div_ceil(TASKS * threads).clamp(1, MOST_STRIPS);
                let tasks: Vec<_> = split_columns(self.y, n, width).into_iter().enumerate().collect();
                parallel::for_each(threads, tasks, |(i, y)| {
                    strips.columns(isa, i * width, y);
                });
            },
        );
    }
}

/// Copies the source's rows into panels, one a pass: `[cols / 16, rows, 16]`, so that what a step reads is
/// close together. Missing rows and columns are zero.
#[inline(always)]
fn pack<I: Isa, E: Element>(isa: I, source: &Source<'_, E>, passes: Passes, m: usize, out: &mut [f32]) {
    let Source { cols, .. } = *source;
    let panel = passes.rows * cols.next_multiple_of(LANES);
    for row in 0..passes.padded() {
        let (pass, i) = (row / passes.rows, row % passes.rows);
        for col in (0..cols).step_by(LANES) {
            let part = &mut out[pass * panel + col * passes.rows + i * LANES..][..LANES];
            let (values, missing) = part.split_at_mut(if row < m { LANES.min(cols - col) } else { 0 });
            source.read(isa, row.min(m - 1), col, values);
            missing.fill(0.0);
        }
    }
}

/// What every task reads.
struct Strips<'a> {
    problem: &'a Problem<'a>,
    packed: &'a Packed<'a>,
    passes: Passes,
    /// Panels of x.
    x: &'a [f32],
    /// Panels of S, not yet scaled.
    s: &'a [f32],
}

/// Columns of a strip, decoded: one row of `V` vectors a column.
#[repr(align(64))]
struct Decoded<const V: usize>([[[f32; LANES]; V]; DEPTH]);

// What does not depend on the type of the activations is outside the functions that do, in a `vectorize` of
// its own: it is large, and would be compiled for every type.
impl Strips<'_> {
    /// Output columns from `n0`: `y[m]` is row m's part.
    fn columns<I: Isa, E: Element>(&self, isa: I, n0: usize, mut y: Vec<&mut [E]>) {
        let (strip, count) = (strip::<I>(), y.first().map_or(0, |row| row.len()));
        scratch::with(strip * self.passes.padded(), |totals| {
            for first in (0..count).step_by(strip) {
                let rows = (n0 + first, strip.min(count - first));
                if I::WIDE {
                    self.strip::<I, 2>(isa, rows, totals);
                } else {
                    self.strip::<I, 1>(isa, rows, totals);
                }
                isa.vectorize(
                    #[inline(always)]
                    || {
                        for (sums, out) in totals.chunks(strip).zip(&mut y) {
                            narrow(isa, &sums[..rows.1], &mut out[first..][..rows.1]);
                        }
                    },
                );
            }
        });
    }

    /// `rows.1` columns of y from column `rows.0`, `[m, strip]`, in float32.
    fn strip<I: Isa, const V: usize>(&self, isa: I, rows: (usize, usize), totals: &mut [f32]) {
        let (strip, k) = (V * LANES, self.problem.weight.in_features());
        let blocks = (k / self.packed.spec().block_size()).next_multiple_of(LANES);
        let mut decoded = Decoded([[[0.0; LANES]; V]; DEPTH]);
        scratch::with(strip * (blocks + blocks.max(DEPTH)), |buffer| {
            isa.vectorize(
                #[inline(always)]
                || {
                    let (scales, lines) = buffer.split_at_mut(strip * blocks);
                    totals.fill(0.0);
                    self.transpose_scales::<I, V>(isa, rows, blocks, lines, scales);
                    self.add_weight::<I, V>(isa, rows, scales, &mut decoded, totals);
                    self.add_low_rank::<I, V>(isa, rows, lines, &mut decoded, totals);
                    let Some(bias) = self.problem.bias else { return };
                    for sums in totals.chunks_mut(strip) {
                        for (value, b) in sums.iter_mut().zip(&bias[rows.0..][..rows.1]) {
                            *value += b;
                        }
                    }
                },
            );
        });
    }

    /// The scales of the strip's rows, `[blocks, V]` vectors; those of rows that are not there are 0.
    #[inline(always)]
    fn transpose_scales<I: Isa, const V: usize>(
        &self,
        isa: I,
        (row, rows): (usize, usize),
        stride: usize,
        lines: &mut [f32],
        scales: &mut [f32],
    ) {
        let blocks = self.problem.weight.in_features() / self.packed.spec().block_size();
        for (i, line) in lines.chunks_mut(stride.max(1)).take(V * LANES).enumerate() {
            if i < rows {
                row_scales(isa, self.packed, row + i, &mut line[..blocks]);
            } else {
                line.fill(0.0);
            }
        }
        transpose(isa, lines, stride, scales.as_chunks_mut().0.as_chunks_mut::<V>().0);
    }

    #[inline(always)]
    fn add_weight<I: Isa, const V: usize>(
        &self,
        isa: I,
        (row, rows): (usize, usize),
        scales: &[f32],
        decoded: &mut Decoded<V>,
        totals: &mut [f32],
    ) {
        let (k, block) = (self.problem.weight.in_features(), self.packed.spec().block_size());
        let bytes = k / 2;
        let table = isa.table(self.packed.spec().quant_type().values());
        let scales: &[[[f32; LANES]; V]] = scales.as_chunks().0.as_chunks().0;
        let codes = &self.packed.codes()[row * bytes..];
        // Rows that are not there are zero bytes, whose sums are not read.
        let mut filled = Vec::new();
        let codes = if rows == V * LANES {
            codes
        } else {
            filled.extend_from_slice(codes);
            filled.resize(V * LANES * bytes, 0);
            &filled
        };
        let depth = DEPTH.min(block);
        for col in (0..k).step_by(depth) {
            for (i, decoded) in decoded.0.as_chunks_mut::<STEP>().0[..depth / STEP].iter_mut().enumerate() {
                let col = col + i * STEP;
                for v in 0..V {
                    // Strips are one after another: as much of the next one is asked for meanwhile.
                    let ahead = V * LANES * (bytes + col / 2) + v * SQUARE;
                    if let Some(square) = codes.get(ahead..).and_then(<[u8]>::first_chunk::<SQUARE>) {
                        isa.prefetch(square);
                    }
                    decode(isa, table, &codes[v * LANES * bytes + col / 2..], bytes, decoded, v);
                }
            }
            let x = Panels { data: self.x, cols: k, col };
            self.multiply(isa, &decoded.0[..depth], x, &scales[col / block], totals);
        }
    }

    #[inline(always)]
    fn add_low_rank<I: Isa, const V: usize>(
        &self,
        isa: I,
        (row, rows): (usize, usize),
        lines: &mut [f32],
        decoded: &mut Decoded<V>,
        totals: &mut [f32],
    ) {
        let Some(lora) = self.problem.lora else { return };
        let cols = lora.rank.next_multiple_of(LANES);
        for col in (0..lora.rank).step_by(DEPTH) {
            let (depth, there) = (DEPTH.min(cols - col), DEPTH.min(lora.rank - col));
            for (i, line) in lines.chunks_mut(depth).take(V * LANES).enumerate() {
                line.fill(0.0);
                if i < rows {
                    line[..there].copy_from_slice(&lora.b[(row + i) * lora.rank + col..][..there]);
                }
            }
            transpose(isa, lines, depth, &mut decoded.0[..depth]);
            let s = Panels { data: self.s, cols, col };
            self.multiply(isa, &decoded.0[..depth], s, &[[lora.scaling; LANES]; V], totals);
        }
    }

    /// `totals += scale · (decoded columns · panels)` for every pass.
    fn multiply<I: Isa, const V: usize>(
        &self,
        isa: I,
        w: &[[[f32; LANES]; V]],
        panels: Panels<'_>,
        scale: &[[f32; LANES]; V],
        totals: &mut [f32],
    ) {
        let rows = self.passes.rows;
        for (pass, totals) in totals.chunks_mut(rows * V * LANES).enumerate() {
            let x = &panels.data[rows * (pass * panels.cols + panels.col)..][..rows * w.len()];
            macro_rules! sized {
                ($($size:literal)*) => {
                    match rows {
                        $($size => isa.vectorize(
                            #[inline(always)]
                            || multiply_sized::<I, $size, V>(isa, w, x, scale, totals),
                        ),)*
                        rows => unreachable!("a pass of {rows} rows"),
                    }
                };
            }
            if I::WIDE {
                sized!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
            } else {
                sized!(1 2 3 4 5 6);
            }
        }
    }
}

/// Panels of rows of `cols` columns, from column `col`.
#[derive(Clone, Copy)]
struct Panels<'a> {
    data: &'a [f32],
    cols: usize,
    col: usize,
}

/// Transposes `V · 16` lines of `stride` floats, a multiple of sixteen, into a strip's columns.
#[inline(always)]
fn transpose<I: Isa, const V: usize>(isa: I, lines: &[f32], stride: usize, out: &mut [[[f32; LANES]; V]]) {
    for (block, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        for v in 0..V {
            let columns = isa.transpose(std::array::from_fn(
                #[inline(always)]
                |i| {
                    let line = &lines[(v * LANES + i) * stride + block * LANES..];
                    isa.load(line.first_chunk().expect("whole vectors"))
                },
            ));
            for (column, out) in columns.into_iter().zip(&mut *out) {
                isa.store(column, &mut out[v]);
            }
        }
    }
}

/// Decodes [`STEP`] columns of sixteen rows `stride` bytes apart into vector `v` of each decoded row.
#[inline(always)]
fn decode<I: Isa, const V: usize>(
    isa: I,
    table: I::Table,
    codes: &[u8],
    stride: usize,
    out: &mut [[[f32; LANES]; V]; STEP],
    v: usize,
) {
    let words = isa.load_word_columns(codes, stride);
    for (word, out) in words.into_iter().zip(out.as_chunks_mut::<8>().0) {
        for (index, out) in isa.word_nibbles(word).into_iter().zip(out) {
            isa.store(isa.lookup(table, index), &mut out[v]);
        }
    }
}

/// One pass: `totals [M, V] += scale · Σ_k w[k, V] · x[k, m]`, each total one chain in ascending k a block.
#[inline(always)]
fn multiply_sized<I: Isa, const M: usize, const V: usize>(
    isa: I,
    w: &[[[f32; LANES]; V]],
    x: &[f32],
    scale: &[[f32; LANES]; V],
    totals: &mut [f32],
) {
    let x: &[[[f32; LANES]; M]] = x.as_chunks().0.as_chunks().0;
    let totals: &mut [[[f32; LANES]; V]; M] =
        totals.as_chunks_mut().0.as_chunks_mut().0.first_chunk_mut().expect("one total a row and lane");
    let mut sums = [[isa.splat(0.0); V]; M];
    for (w, x) in w.as_chunks::<LANES>().0.iter().zip(x) {
        for (i, w) in w.iter().enumerate() {
            let mut values = [isa.splat(0.0); V];
            for v in 0..V {
                values[v] = isa.load(&w[v]);
            }
            for m in 0..M {
                let x = isa.splat(x[m][i]);
                for v in 0..V {
                    sums[m][v] = isa.fma(values[v], x, sums[m][v]);
                }
            }
        }
    }
    for m in 0..M {
        for v in 0..V {
            let total = isa.fma(sums[m][v], isa.load(&scale[v]), isa.load(&totals[m][v]));
            isa.store(total, &mut totals[m][v]);
        }
    }
}
