//! Tiles of `yᵀ` into the rows of y.

use half::bf16;

use super::operand::{padded, width_for};
use crate::simd::dots::SIDE;
use crate::simd::{Isa, LANES};

/// Transposes tiles, sliver after sliver of outputs, into the rows of y, adds the bias, and rounds.
#[inline(always)]
pub(super) fn store<I: Isa>(isa: I, bias: Option<&[f32]>, tiles: &[f32], y: &mut [&mut [bf16]]) {
    let room = padded(y.len());
    for (i, tiles) in tiles.chunks(SIDE * room).enumerate() {
        let col = i * SIDE;
        let mut addends = [0.0; SIDE];
        for (addend, value) in addends.iter_mut().zip(bias.unwrap_or_default().iter().skip(col)) {
            *addend = *value;
        }
        let rows = y.len();
        for first in (0..rows).step_by(SIDE) {
            let width = width_for(rows - first);
            let (tile, y) = (&tiles[first * SIDE..][..SIDE * width], &mut y[first..rows.min(first + SIDE)]);
            if width == SIDE {
                store_tile::<I, SIDE>(isa, &addends, tile, col, y);
            } else {
                store_tile::<I, LANES>(isa, &addends, tile, col, y);
            }
        }
    }
}

/// [`store`] for one tile, `[SIDE, WIDTH]`: columns `col ..` of at most `WIDTH` rows of y.
#[inline(always)]
fn store_tile<I: Isa, const WIDTH: usize>(isa: I, bias: &[f32; SIDE], tile: &[f32], col: usize, y: &mut [&mut [bf16]]) {
    let tile = tile.as_chunks::<WIDTH>().0;
    for (rows, y) in y.chunks_mut(LANES).enumerate() {
        for (half, bias) in bias.as_chunks::<LANES>().0.iter().enumerate() {
            let bias = isa.load(bias);
            let sums: &[_; LANES] = tile[half * LANES..].first_chunk().expect("half a tile");
            let mut lines = [bias; LANES];
            for (line, sums) in lines.iter_mut().zip(sums) {
                *line = isa.load(sums[rows * LANES..].first_chunk().expect("a vector"));
            }
            let lines = isa.transpose(lines);
            for (line, out) in lines.into_iter().zip(&mut *y) {
                let line = isa.add(line, bias);
                let Some(out) = out.get_mut(col + half * LANES..) else { continue };
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
