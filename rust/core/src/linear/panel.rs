//! Filling slivers and panels: copying, widening, transposing, and decoding the weight on the way.

use super::lora::Dropout;
use super::tile::{DEPTH, width_for};
use super::weight::Weight;
use super::{dropout, scratch};
use crate::dtype::{Element, widen};
use crate::simd::{Isa, LANES};

/// A row-major matrix that panels are filled from.
#[derive(Clone, Copy)]
pub(super) struct Source<'a, E> {
    pub(super) data: &'a [E],
    pub(super) cols: usize,
    /// Row number of the first row, as the dropout mask counts them.
    pub(super) first_row: usize,
    pub(super) dropout: Option<Dropout>,
}

impl<'a, E: Element> Source<'a, E> {
    /// All of `data`, nothing dropped.
    pub(super) fn plain(data: &'a [E], cols: usize) -> Self {
        Self { data, cols, first_row: 0, dropout: None }
    }

    /// Row `row` from column `col`, widened and masked.
    #[inline(always)]
    pub(super) fn read<I: Isa>(&self, isa: I, row: usize, col: usize, out: &mut [f32]) {
        widen(isa, &self.data[row * self.cols + col..][..out.len()], out);
        if let Some(dropout) = self.dropout {
            dropout::apply(dropout, self.first_row + row, col, out);
        }
    }
}

/// Floats of room for the panels of `rows` rows at one unit of depth.
pub(super) fn padded<I: Isa>(rows: usize) -> usize {
    let tile = super::tile::cols::<I>();
    rows / tile * tile + if rows.is_multiple_of(tile) { 0 } else { width_for::<I>(rows % tile) }
}

/// Transposes columns `col .. col + depth` of the source's `rows` rows into panels `[depth, width]`, one
/// after another; missing rows of the last are zero.
#[inline(always)]
pub(super) fn transpose<I: Isa, E: Element>(
    isa: I,
    source: &Source<'_, E>,
    rows: usize,
    (col, depth): (usize, usize),
    out: &mut [f32],
) {
    /// Row stride of the staging buffer: not a power of two, so that a column does not fall into one
    /// cache set.
    const STRIDE: usize = DEPTH + LANES;
    let tile = super::tile::cols::<I>();
    scratch::with(
        tile * STRIDE,
        #[inline(always)]
        |staging| {
            let mut rest = out;
            for first in (0..rows).step_by(tile) {
                let width = width_for::<I>(rows - first);
                let (panel, after) = rest.split_at_mut(depth * width);
                for (j, staged) in staging.chunks_mut(STRIDE).take(width).enumerate() {
                    if first + j < rows {
                        source.read(isa, first + j, col, &mut staged[..depth]);
                    } else {
                        staged[..depth].fill(0.0);
                    }
                }
                for first in (0..width).step_by(LANES) {
                    transpose_lines(isa, &staging[first * STRIDE..], STRIDE, width, &mut panel[first..]);
                }
                rest = after;
            }
        },
    );
}

/// `out[k, j] = lines[j, k]` for sixteen j, where the rows of `lines` are `stride` apart and those of `out`
/// `width`. `lines` may be read up to fifteen columns past the last.
#[inline(always)]
fn transpose_lines<I: Isa>(isa: I, lines: &[f32], stride: usize, width: usize, out: &mut [f32]) {
    for (i, out) in out.chunks_mut(LANES * width).enumerate() {
        let mut block = [isa.splat(0.0); LANES];
        for (lanes, line) in block.iter_mut().zip(lines.chunks(stride)) {
            *lanes = isa.load(line[i * LANES..].first_chunk().expect("a padded row"));
        }
        let block = isa.transpose(block);
        for (lanes, out) in block.into_iter().zip(out.chunks_mut(width)) {
            isa.store(lanes, out.first_chunk_mut().expect("a panel row has whole vectors"));
        }
    }
}

/// Decodes rows `row ..` of the weight, columns `col .. col + depth`, into a sliver; rows past the last
/// are zero.
#[inline(always)]
pub(super) fn weight_sliver<I: Isa>(
    isa: I,
    weight: &Weight<'_>,
    row: usize,
    (col, depth): (usize, usize),
    out: &mut [f32],
) {
    for (i, line) in out.chunks_mut(DEPTH).enumerate() {
        if row + i < weight.out_features() {
            weight.decode(isa, row + i, col, &mut line[..depth]);
        } else {
            line[..depth].fill(0.0);
        }
    }
}

/// Copies rows `row ..` of the source, columns `col .. col + depth`, into a sliver, times `scale`; rows
/// past `rows` are zero.
#[inline(always)]
pub(super) fn row_sliver<I: Isa, E: Element>(
    isa: I,
    source: &Source<'_, E>,
    (row, rows): (usize, usize),
    (col, depth): (usize, usize),
    scale: f32,
    out: &mut [f32],
) {
    for (i, line) in out.chunks_mut(DEPTH).enumerate() {
        let line = &mut line[..depth];
        if row + i < rows {
            source.read(isa, row + i, col, line);
            for value in line {
                *value *= scale;
            }
        } else {
            line.fill(0.0);
        }
    }
}

/// Transposes columns `col ..` of the float32 matrix `source [.., cols]`, rows `row .. row + depth`, into a
/// sliver; columns past the last are zero.
#[inline(always)]
pub(super) fn column_sliver(source: &[f32], cols: usize, col: usize, (row, depth): (usize, usize), out: &mut [f32]) {
    for (i, line) in out.chunks_mut(DEPTH).enumerate() {
        for (k, value) in line[..depth].iter_mut().enumerate() {
            *value = if col + i < cols { source[(row + k) * cols + col + i] } else { 0.0 };
        }
    }
}

/// Copies columns `col .. col + width` of rows `row .. row + depth` into a panel of row stride `stride`;
/// columns up to `padded` are zero.
#[inline(always)]
pub(super) fn column_panel<I: Isa, E: Element>(
    isa: I,
    source: &Source<'_, E>,
    (row, depth): (usize, usize),
    (col, width, padded): (usize, usize, usize),
    stride: usize,
    out: &mut [f32],
) {
    for (k, line) in out.chunks_mut(stride).take(depth).enumerate() {
        source.read(isa, row + k, col, &mut line[..width]);
        line[width..padded].fill(0.0);
    }
}
