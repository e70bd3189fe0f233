//! 4-bit normal float, NF4 (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
//!
//! Quantiles of N(0, 1) from offset 0.9677083 = 1 - ½(1/32 + 1/30): eight positive, seven negative, and
//! zero, divided by the largest. A test derives them again.

use super::Thresholds;
use super::buckets::Buckets;

/// Value of each code, as float32 bits. Ascending.
const VALUE_BITS: [u32; 16] = [
    0xbf80_0000,
    0xbf32_39b1,
    0xbf06_6b30,
    0xbeca_32a0,
    0xbe91_a24d,
    0xbe3d_353f,
    0xbdba_7871,
    0x0000_0000,
    0x3da2_faff,
    0x3e24_cae3,
    0x3e7c_04dd,
    0x3ead_033a,
    0x3ee1_a4b8,
    0x3f10_07ab,
    0x3f39_13b3,
    0x3f80_0000,
];

/// Midpoints of neighbouring values in float32: the code is the number of thresholds below the value.
const THRESHOLD_BITS: [u32; 15] = [
    0xbf59_1cd8,
    0xbf1c_5270,
    0xbeeb_8480,
    0xbead_ea76,
    0xbe70_3cec,
    0xbe0d_38bc,
    0xbd3a_7871,
    0x3d22_faff,
    0x3df6_4862,
    0x3e50_67e0,
    0x3e95_82d4,
    0x3ec7_53f9,
    0x3f00_6d04,
    0x3f24_8daf,
    0x3f5c_89da,
];

/// Value of each code.
pub const VALUES: [f32; 16] = {
    let mut values = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        values[i] = f32::from_bits(VALUE_BITS[i]);
        i += 1;
    }
    values
};

/// Thresholds between the codes; a value equal to one takes the lower code.
pub const THRESHOLDS: Thresholds = {
    let mut thresholds = [f32::INFINITY; 16];
    let mut i = 0;
    while i < 15 {
        thresholds[i] = f32::from_bits(THRESHOLD_BITS[i]);
        i += 1;
    }
    thresholds
};

/// [`THRESHOLDS`] by bucket.
pub static BUCKETS: Buckets = Buckets::new(&THRESHOLDS);

/// Code of 0.0.
pub const ZERO_CODE: u8 = 7;
