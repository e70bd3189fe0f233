//! The operands of bfloat16 products.
//!
//! A left operand is cut into slivers: [`SIDE`] rows of [`STRIDE`], of which one block of depth counts. A
//! right operand is cut into panels `[depth / 2, width, 2]`. Both are zero past the edges of the matrix.

use half::bf16;

use crate::linear::dropout;
use crate::linear::lora::Dropout;
use crate::linear::scratch;
use crate::simd::dots::{Dots, SIDE, STEP};
use crate::simd::{Isa, LANES};

/// Depth of a block: a sliver of it stays in the first-level cache beside the panel that streams past.
pub(super) const DEPTH: usize = 512;

/// Row stride of a sliver: not a power of two, so that a column does not fall into one cache set.
pub(super) const STRIDE: usize = DEPTH + STEP;

/// Elements of a sliver.
pub(super) const SLIVER: usize = SIDE * STRIDE;

/// Columns of a panel when `rest` columns remain.
pub(super) fn width_for(rest: usize) -> usize {
    if rest <= LANES { LANES } else { SIDE }
}

/// Columns of all panels of `cols` columns.
pub(super) fn padded(cols: usize) -> usize {
    cols / SIDE * SIDE + if cols.is_multiple_of(SIDE) { 0 } else { width_for(cols % SIDE) }
}

/// Blocks of `depth`: the first element of each, and its depth in whole steps.
pub(super) fn blocks(depth: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..depth).step_by(DEPTH).map(move |first| (first, DEPTH.min(depth - first).next_multiple_of(STEP)))
}

/// A row-major matrix of activations.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) data: &'a [bf16],
    pub(super) cols: usize,
    /// Number of the first row, as the dropout mask counts them.
    pub(super) first_row: usize,
    /// What it drops counts as zero; the rest is not scaled.
    pub(super) dropout: Option<Dropout>,
}

impl<'a> Source<'a> {
    /// All of `data`, nothing dropped.
    pub(super) fn plain(data: &'a [bf16], cols: usize) -> Self {
        Self { data, cols, first_row: 0, dropout: None }
    }

    /// Row `row` from column `col`; zero past the last column.
    #[inline(always)]
    pub(super) fn read(&self, row: usize, col: usize, out: &mut [bf16]) {
        let count = out.len().min(self.cols.saturating_sub(col));
        let (inside, outside) = out.split_at_mut(count);
        outside.fill(bf16::ZERO);
        inside.copy_from_slice(&self.data[row * self.cols + col..][..count]);
        if let Some(dropout) = self.dropout {
            scratch::with(
                count,
                #[inline(always)]
                |mask| {
                    mask.fill(1.0);
                    dropout::apply(dropout, self.first_row + row, col, mask);
                    for (value, mask) in inside.iter_mut().zip(mask) {
                        *value = if *mask == 0.0 { bf16::ZERO } else { *value };
                    }
                },
            );
        }
    }
}

/// Fills a sliver: `fill` gets the number of a row below `rows` and `depth` elements to write.
#[inline(always)]
pub(super) fn sliver(rows: usize, depth: usize, out: &mut [bf16], mut fill: impl FnMut(usize, &mut [bf16])) {
    for (i, line) in out.chunks_mut(STRIDE).enumerate() {
        if i < rows {
            fill(i, &mut line[..depth]);
        } else {
            line[..depth].fill(bf16::ZERO);
        }
    }
}

/// Panels whose columns are the source's `rows` rows, and whose depth is its columns `col .. col + depth`.
#[inline(always)]
pub(super) fn transposed_panels<I: Isa>(
    isa: I,
    source: &Source<'_>,
    rows: usize,
    (col, depth): (usize, usize),
    out: &mut [bf16],
) {
    let mut rest = out;
    for first in (0..rows).step_by(SIDE) {
        let width = width_for(rows - first);
        let (panel, after) = rest.split_at_mut(depth * width);
        for half in (0..width).step_by(LANES) {
            for (i, step) in panel.chunks_mut(STEP * width).enumerate() {
                let from = col + i * STEP;
                let whole = source.dropout.is_none() && from + STEP <= source.cols;
                let mut lines = [isa.splat(0.0); LANES];
                for (j, line) in lines.iter_mut().enumerate() {
                    let row = first + half + j;
                    if row >= rows {
                        break;
                    }
                    let mut staged = [bf16::ZERO; STEP];
                    *line = if whole {
                        let start = row * source.cols + from;
                        isa.load_pairs(source.data[start..].first_chunk().expect("a whole step"))
                    } else {
                        source.read(row, from, &mut staged);
                        isa.load_pairs(&staged)
                    };
                }
                let lines = isa.transpose(lines);
                for (pair, line) in step.chunks_mut(2 * width).zip(lines) {
                    isa.store_pairs(line, pair[2 * half..].first_chunk_mut().expect("a half of the width"));
                }
            }
        }
        rest = after;
    }
}

/// Panels of `cols` columns and `depth` rows, `depth` being whole steps: `fill` gets the number of a row below
/// `rows` and `cols` elements to write; rows past that are zero. Panel after panel.
#[inline(always)]
pub(super) fn row_panels<I: Isa>(
    isa: I,
    (rows, depth): (usize, usize),
    cols: usize,
    out: &mut [bf16],
    mut fill: impl FnMut(usize, &mut [bf16]),
) {
    let room = padded(cols);
    scratch::with_bf16(
        2 * room,
        #[inline(always)]
        |staged| {
            staged.fill(bf16::ZERO);
            let (even, odd) = staged.split_at_mut(room);
            for pair in 0..depth / 2 {
                for (row, line) in [(2 * pair, &mut *even), (2 * pair + 1, &mut *odd)] {
                    if row < rows {
                        fill(row, &mut line[..cols]);
                    } else {
                        line.fill(bf16::ZERO);
                    }
                }
                let lanes = even.as_chunks::<LANES>().0.iter().zip(odd.as_chunks::<LANES>().0);
                for (i, (a, b)) in lanes.enumerate() {
                    let first = i * LANES / SIDE * SIDE;
                    let width = width_for(cols - first);
                    let at = first * depth + pair * 2 * width + 2 * (i * LANES - first);
                    isa.store_pairs(isa.zip_pairs(a, b), out[at..].first_chunk_mut().expect("a vector"));
                }
            }
        },
    );
}

/// The product of one sliver and all panels of `cols` columns into its tiles, or added to them if `add`: for each
/// panel `[SIDE, width]`, one after another. Panels are `height` rows high; `depth` of them from `from` on count.
#[inline(always)]
pub(super) fn multiply<D: Dots>(
    dots: D,
    (from, depth, height): (usize, usize, usize),
    left: &[bf16],
    panels: &[bf16],
    cols: usize,
    tiles: &mut [f32],
    add: bool,
) {
    for first in (0..cols).step_by(SIDE) {
        let width = width_for(cols - first);
        let panel = &panels[first * height + from * width..][..depth * width];
        dots.multiply(left, STRIDE, panel, width, &mut tiles[first * SIDE..][..SIDE * width], add);
    }
}

/// `buffer` in parts of the given sizes, one after another.
pub(super) fn parts(mut buffer: &mut [bf16], sizes: impl Iterator<Item = usize>) -> Vec<&mut [bf16]> {
    let cut = |size| {
        let (part, rest) = std::mem::take(&mut buffer).split_at_mut(size);
        buffer = rest;
        part
    };
    sizes.map(cut).collect()
}
