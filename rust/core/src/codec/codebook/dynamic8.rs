//! 8-bit dynamic map (Dettmers 2015, arXiv 1511.04561): 256 sorted float32 values.
//!
//! For i in 0..7: the midpoints of `2^i + 1` points of linspace(0.1, 1), times ±10^(i-6); and 0 and 1.
//! There is no -1.0: the first value is -0.99296874.

use std::sync::LazyLock;

use crate::simd::Isa;

static MAP: LazyLock<Map> = LazyLock::new(Map::derive);

/// Added to a magnitude before its bits are taken: the sums from 0 to 1 lie in 23 binades.
const SHIFT: f32 = 1.0 / 4_194_304.0;

/// Bits of such a sum that do not count: six of the fraction, and the exponent, are the bucket.
const DROPPED_BITS: u32 = 17;

/// The bucket of a negative value lies so far below that of its magnitude.
const NEGATIVE: u16 = 2048;

/// Buckets of values from -1 to 1, of which none holds two thresholds.
const BUCKETS: usize = 2 * NEGATIVE as usize;

/// The table and the thresholds of the nearest value.
#[derive(Debug)]
pub struct Map {
    /// Value of each code, ascending.
    pub values: [f32; 256],
    /// Largest float32 that is no nearer to `values[i + 1]` than to `values[i]`: the code is the number
    /// of thresholds below the value, so a tie takes the lower code. The last is infinity.
    thresholds: [f32; 256],
    /// Number of thresholds in earlier buckets, as the bits of a float32.
    ranks: [f32; BUCKETS],
}

/// The one map.
#[must_use]
pub fn map() -> &'static Map {
    &MAP
}

impl Map {
    fn derive() -> Self {
        let mut values = Vec::with_capacity(256);
        for i in 0..7_i32 {
            let intervals = 1_usize << i;
            // The published table is made of float32 steps: linspace, mean of neighbours, then a
            // float64 power of ten. Any other order of roundings differs in last bits.
            let points = linspace_f32(0.1, 1.0, intervals + 1);
            for pair in points.windows(2) {
                let mean = f32::midpoint(pair[0], pair[1]);
                let value = (10.0_f64.powi(i - 6) as f32) * mean;
                values.extend([value, -value]);
            }
        }
        values.extend([0.0, 1.0]);
        values.sort_by(f32::total_cmp);
        let values: [f32; 256] = values.try_into().unwrap_or_else(|v: Vec<f32>| unreachable!("{} values", v.len()));
        let thresholds: [f32; 256] =
            std::array::from_fn(|i| if i < 255 { floor_midpoint(values[i], values[i + 1]) } else { f32::INFINITY });
        let ranks = std::array::from_fn(|bucket| {
            let rank = thresholds[..255].partition_point(|t| order(bucket_of(*t)) < order(bucket));
            f32::from_bits(rank as u32)
        });
        Self { values, thresholds, ranks }
    }

    /// Code of the nearest value.
    #[must_use]
    #[inline]
    pub fn encode(&self, value: f32) -> u8 {
        let mut code = 0_usize;
        let mut half = 128;
        while half > 0 {
            if value > self.thresholds[code + half - 1] {
                code += half;
            }
            half /= 2;
        }
        code as u8
    }

    /// [`Map::encode`] of sixteen values of which none is greater than 1 by more than a rounding: the rank of
    /// the bucket, and one more above the threshold that follows.
    #[must_use]
    #[inline(always)]
    pub(in crate::codec) fn encode_lanes<I: Isa>(&self, isa: I, values: I::F) -> I::I {
        let key = isa.to_bits(isa.add(isa.abs(values), isa.splat(SHIFT)));
        let below = isa.gt_bit(isa.splat(0.0), values, -i32::from(NEGATIVE));
        let bucket = isa.add_i(isa.shift_right::<DROPPED_BITS>(key), below);
        let rank = isa.to_bits(isa.gather(&self.ranks, bucket));
        isa.add_i(rank, isa.gt_bit(values, isa.gather(&self.thresholds, rank), 1))
    }
}

/// The bucket of a value from -1 to 1, as [`Map::encode_lanes`] finds it.
fn bucket_of(value: f32) -> usize {
    let key = ((value.abs() + SHIFT).to_bits() >> DROPPED_BITS) as usize;
    (if value < 0.0 { key - usize::from(NEGATIVE) } else { key }) % BUCKETS
}

/// Ascends as the values in the buckets do: of the negative ones, the greatest magnitudes come first.
fn order(bucket: usize) -> isize {
    if bucket < usize::from(NEGATIVE) { -bucket.cast_signed() } else { bucket.cast_signed() }
}

/// The points of `torch.linspace(start, end, steps)` in float32: the first half counted from the
/// start, the second from the end.
fn linspace_f32(start: f32, end: f32, steps: usize) -> Vec<f32> {
    let step = (end - start) / (steps - 1) as f32;
    let point = |i: usize| {
        if i < steps / 2 { step.mul_add(i as f32, start) } else { (-step).mul_add((steps - 1 - i) as f32, end) }
    };
    (0..steps).map(point).collect()
}

/// The largest float32 that is not above the exact midpoint of `a < b`.
fn floor_midpoint(a: f32, b: f32) -> f32 {
    // Exact in float64: both have 24 bits and lie within a few binades of each other.
    let exact = f64::midpoint(f64::from(a), f64::from(b));
    let rounded = exact as f32;
    if f64::from(rounded) > exact { rounded.next_down() } else { rounded }
}
