//! The register-blocked product of two panels: the one inner loop of every matrix product here.
//!
//! `c[i][j] += Σ_k a[i][k] · b[k][j]`, `a` a sliver of `MR` rows, `b` a panel of `16·NV` columns. Each
//! output element is one chain of fused multiply-adds in ascending k, so tile sizes do not change bits.

use crate::simd::{Isa, LANES};

/// Depth of a sliver, and its row stride. A constant stride makes every address of the inner loop
/// an immediate offset.
pub(super) const DEPTH: usize = 256;

/// Rows of a sliver, `[MR, DEPTH]` row-major: as many as leave registers for the panel's row.
pub(super) const fn rows<I: Isa>() -> usize {
    if I::WIDE { 14 } else { 6 }
}

/// Columns of the widest tile.
pub(super) const fn cols<I: Isa>() -> usize {
    if I::WIDE { 2 * LANES } else { LANES }
}

/// A sliver: `[rows, DEPTH]`, row-major.
#[derive(Clone, Copy)]
pub(super) struct Sliver<'a> {
    pub(super) data: &'a [f32],
    pub(super) rows: usize,
}

/// A panel: rows of `stride` floats, of which the tile reads the leading ones.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
}

/// Rows of a sliver where the rank is the number of rows: ranks are multiples of eight as a rule.
pub(super) const fn rank_rows<I: Isa>() -> usize {
    if I::WIDE { 8 } else { 6 }
}

/// Columns a tile needs for `rest` remaining columns: one vector if that is enough.
pub(super) const fn width_for<I: Isa>(rest: usize) -> usize {
    if rest <= LANES { LANES } else { cols::<I>() }
}

/// Adds `sliver[.., ..depth] · panel` to the tile `acc`, row-major `[rows, width]`. `rows` is that of
/// [`rows`] or [`rank_rows`], `width` one of [`width_for`].
///
/// A function of its own, not inlined into every product: one call is thousands of multiply-adds.
#[inline(never)]
pub(super) fn multiply<I: Isa>(
    isa: I,
    depth: usize,
    sliver: Sliver<'_>,
    panel: Panel<'_>,
    width: usize,
    acc: &mut [f32],
) {
    isa.vectorize(
        #[inline(always)]
        || match (sliver.rows, width == LANES, I::WIDE) {
            (14, true, true) => multiply_sized::<I, 14, 1>(isa, depth, sliver.data, panel, acc),
            (14, false, true) => multiply_sized::<I, 14, 2>(isa, depth, sliver.data, panel, acc),
            (8, true, true) => multiply_sized::<I, 8, 1>(isa, depth, sliver.data, panel, acc),
            (8, false, true) => multiply_sized::<I, 8, 2>(isa, depth, sliver.data, panel, acc),
            _ => multiply_sized::<I, 6, 1>(isa, depth, sliver.data, panel, acc),
        },
    );
}

#[inline(always)]
fn multiply_sized<I: Isa, const MR: usize, const NV: usize>(
    isa: I,
    depth: usize,
    sliver: &[f32],
    panel: Panel<'_>,
    acc: &mut [f32],
) {
    let sliver: &[[f32; DEPTH]; MR] = sliver.as_chunks().0.first_chunk().expect("a sliver has MR rows");
    let acc: &mut [[f32; LANES]] = acc.as_chunks_mut().0;
    let acc = &mut acc[..MR * NV];
    let mut sums = [[isa.splat(0.0); NV]; MR];
    for i in 0..MR {
        for j in 0..NV {
            sums[i][j] = isa.load(&acc[i * NV + j]);
        }
    }
    for (k, row) in panel.data.chunks(panel.stride).take(depth.min(DEPTH)).enumerate() {
        let row: &[[f32; LANES]] = row.as_chunks().0;
        let row: &[[f32; LANES]; NV] = row.first_chunk().expect("a panel row has the tile's columns");
        let b: [I::F; NV] = std::array::from_fn(
            #[inline(always)]
            |j| isa.load(&row[j]),
        );
        for i in 0..MR {
            let a = isa.splat(sliver[i][k]);
            for j in 0..NV {
                sums[i][j] = isa.fma(a, b[j], sums[i][j]);
            }
        }
    }
    for i in 0..MR {
        for j in 0..NV {
            isa.store(sums[i][j], &mut acc[i * NV + j]);
        }
    }
}
