//! Thresholds by bucket: the rank of a value by one comparison.
//!
//! The values from -1 to 1 are cut into buckets so narrow that none holds two thresholds. The number of
//! thresholds below a value is then the number in earlier buckets, and one more if the value is above the
//! threshold in its own.

use super::Thresholds;

/// Buckets in a unit. All fifteen thresholds of NF4 are further apart than one, and the buckets of -1 and 1 are
/// still numbers of five bits.
pub const PER_UNIT: f32 = 15.4;

/// The bucket of x is the low five bits of `PER_UNIT · x + OFFSET` in float32: numbers from 2^23 on are
/// integers, so the sum rounds to one, and its lowest bits are those of the integer.
pub const OFFSET: f32 = 8_388_624.0;

/// What `PER_UNIT · x + OFFSET` adds to the number of the bucket of 0.
const BUCKET_OF_ZERO: f64 = 16.0;

/// The bucket of a value from -1 to 1 that is not on the edge of one.
#[allow(clippy::cast_sign_loss)] // -1 has bucket 1
const fn bucket(value: f32) -> usize {
    (value as f64 * PER_UNIT as f64 + BUCKET_OF_ZERO + 0.5) as usize
}

/// Thirty-two buckets, in two tables of sixteen.
#[derive(Debug)]
pub struct Buckets {
    /// The threshold in each bucket; infinity if there is none.
    pub thresholds: [[f32; 16]; 2],
    /// Number of thresholds in earlier buckets, as the bits of a float32.
    pub ranks: [[f32; 16]; 2],
}

impl Buckets {
    /// Of ascending thresholds between -1 and 1, padded with infinity.
    ///
    /// # Panics
    /// If a bucket holds two: this is checked when the crate is compiled.
    #[must_use]
    pub const fn new(thresholds: &Thresholds) -> Self {
        let mut buckets = Self { thresholds: [[f32::INFINITY; 16]; 2], ranks: [[0.0; 16]; 2] };
        let mut i = 0;
        while i < 16 && thresholds[i].is_finite() {
            let bucket = bucket(thresholds[i]);
            let own = &mut buckets.thresholds[bucket / 16][bucket % 16];
            assert!(own.is_infinite(), "two thresholds in one bucket");
            *own = thresholds[i];
            i += 1;
        }
        let (mut bucket, mut rank) = (0, 0);
        while bucket < 32 {
            buckets.ranks[bucket / 16][bucket % 16] = f32::from_bits(rank);
            rank += buckets.thresholds[bucket / 16][bucket % 16].is_finite() as u32;
            bucket += 1;
        }
        buckets
    }
}
