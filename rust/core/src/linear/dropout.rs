//! The dropout mask: Philox4x32-10 (Salmon et al. 2011), a counter-based generator, so that backward
//! makes the same mask again instead of storing it.
//!
//! Element `(row, col)` takes word `col % 4` of the block with counter `(col / 4, row)` under the key
//! `seed`. It is dropped if that word is below `p · 2³²`.

use super::lora::Dropout;
use crate::Exec;
use crate::error::check_matrix;
use crate::simd::{Isa, Op};

/// Counters computed side by side, so that the compiler can use vector registers.
const WIDTH: usize = 16;

/// Sixteen blocks from counter `(first + i, row)`: word `w` of block `i` at `[w][i]`.
#[inline(always)]
fn blocks(seed: u64, row: u64, first: u64) -> [[u32; WIDTH]; 4] {
    const MULTIPLIERS: [u64; 2] = [0xd251_1f53, 0xcd9e_8d57];
    const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
    let mut key = [seed as u32, (seed >> 32) as u32];
    let counter = |i: usize| first + i as u64;
    let mut c: [[u32; WIDTH]; 4] = [
        std::array::from_fn(
            #[inline(always)]
            |i| counter(i) as u32,
        ),
        std::array::from_fn(
            #[inline(always)]
            |i| (counter(i) >> 32) as u32,
        ),
        [row as u32; WIDTH],
        [(row >> 32) as u32; WIDTH],
    ];
    for _ in 0..10 {
        let [c0, c1, c2, c3] = &mut c;
        for (((c0, c1), c2), c3) in c0.iter_mut().zip(c1).zip(c2).zip(c3) {
            let p0 = MULTIPLIERS[0] * u64::from(*c0);
            let p1 = MULTIPLIERS[1] * u64::from(*c2);
            *c0 = (p1 >> 32) as u32 ^ *c1 ^ key[0];
            *c1 = p1 as u32;
            *c2 = (p0 >> 32) as u32 ^ *c3 ^ key[1];
            *c3 = p0 as u32;
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    c
}

/// `p · 2³²`, rounded down.
#[inline(always)]
#[allow(clippy::cast_sign_loss)] // A `Dropout` has p of at least 0.
fn threshold(p: f32) -> u32 {
    (f64::from(p) * 4_294_967_296.0) as u32
}

/// Multiplies `values`, which are columns `col ..` of row `row`, by their mask: 0 or `1 / (1 - p)`.
#[inline(always)]
pub(super) fn apply(dropout: Dropout, row: usize, col: usize, values: &mut [f32]) {
    let threshold = threshold(dropout.p());
    let keep = 1.0 / (1.0 - dropout.p());
    let mut col = col;
    let mut rest = values;
    while !rest.is_empty() {
        let first = col / 4;
        let skip = col % 4;
        let (now, after) = rest.split_at_mut((4 * WIDTH - skip).min(rest.len()));
        let words = blocks(dropout.seed(), row as u64, first as u64);
        for (j, value) in now.iter_mut().enumerate() {
            let word = words[(j + skip) % 4][(j + skip) / 4];
            *value = if word < threshold { 0.0 } else { *value * keep };
        }
        col += now.len();
        rest = after;
    }
}

/// Writes the mask of a `[rows, cols]` input, row-major: what [`super::forward`] multiplies it by.
///
/// # Errors
/// [`crate::Error::Length`] if `out` is not `rows · cols` long.
pub fn dropout_mask(exec: &Exec, dropout: Dropout, (rows, cols): (usize, usize), out: &mut [f32]) -> crate::Result<()> {
    check_matrix("out", (rows, cols), out.len())?;
    if cols > 0 {
        exec.isa.run(Mask { dropout, cols, out });
    }
    Ok(())
}

struct Mask<'a> {
    dropout: Dropout,
    cols: usize,
    out: &'a mut [f32],
}

impl Op for Mask<'_> {
    type Output = ();

    fn eval<I: Isa>(self, isa: I) {
        isa.vectorize(
            #[inline(always)]
            || {
                self.out.fill(1.0);
                for (row, values) in self.out.chunks_mut(self.cols).enumerate() {
                    apply(self.dropout, row, 0, values);
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::{Dropout, apply, blocks, dropout_mask};
    use crate::Exec;

    #[test]
    fn philox_gives_the_published_test_vectors() {
        // Known answers of Random123 for philox4x32-10.
        let words = |seed, row, first| blocks(seed, row, first).map(|w| w[0]);
        assert_eq!(words(0, 0, 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            words(0x299f_31d0_a409_3822, 0x0370_7344_1319_8a2e, 0x85a3_08d3_243f_6a88),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn a_piece_of_a_row_has_the_mask_of_its_place() {
        let dropout = Dropout::new(0.3, 7).expect("valid");
        let mut whole = vec![1.0; 200];
        apply(dropout, 5, 0, &mut whole);
        for (start, end) in [(0, 200), (1, 3), (63, 65), (64, 128), (130, 199), (7, 7)] {
            let mut piece = vec![1.0; end - start];
            apply(dropout, 5, start, &mut piece);
            assert_eq!(piece, whole[start..end]);
        }
    }

    #[test]
    fn the_share_of_dropped_elements_is_p() {
        let exec = Exec::new(1).expect("an instruction set");
        let (rows, cols, p) = (100, 1001, 0.25_f32);
        let mut mask = vec![0.0; rows * cols];
        dropout_mask(&exec, Dropout::new(p, 42).expect("valid"), (rows, cols), &mut mask).expect("fits");
        let dropped = mask.iter().filter(|v| **v == 0.0).count() as f64;
        let (n, p) = ((rows * cols) as f64, f64::from(p));
        // Five standard deviations of the binomial distribution.
        assert!((dropped - n * p).abs() < 5.0 * (n * p * (1.0 - p)).sqrt(), "{dropped}");
        assert!(mask.iter().all(|v| *v == 0.0 || (*v - 4.0 / 3.0).abs() < 1e-6));
    }
}
