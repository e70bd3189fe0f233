//! 4-bit float of bitsandbytes: sign, two exponent bits, one mantissa bit; values are twelfths.
//!
//! Code bit 3 is the sign; bits 0-2 index the magnitudes, which are not in ascending order.

use super::Thresholds;
use super::buckets::Buckets;

/// Value of each code. Codes 8-15 are the negatives of 0-7; code 8 is -0.0.
pub const VALUES: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25, //
    -0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

/// Thresholds of the magnitude; a value equal to one takes the smaller magnitude. They are the decimal
/// constants of the CUDA rule of bitsandbytes, which its checkpoints were written with.
pub const THRESHOLDS: Thresholds = {
    let rule = [0.002_604_17, 0.085_937_5, 0.208_333_33, 0.291_666_67, 0.416_666_7, 0.583_333, 0.833_333_3];
    let mut thresholds = [f32::INFINITY; 16];
    let mut i = 0;
    while i < rule.len() {
        thresholds[i] = rule[i];
        i += 1;
    }
    thresholds
};

/// Magnitude code of each rank among the thresholds.
pub const CODE_OF_RANK: [u8; 8] = [0, 1, 6, 7, 4, 5, 2, 3];

/// [`THRESHOLDS`] by bucket.
pub static BUCKETS: Buckets = Buckets::new(&THRESHOLDS);

/// Code of 0.0.
pub const ZERO_CODE: u8 = 0;
