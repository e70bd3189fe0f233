//! The tables are recomputed from their derivation.

use super::buckets::{Buckets, OFFSET, PER_UNIT};
use super::{Thresholds, dynamic8, fp4, nf4};
use crate::simd::{Isa, IsaKind, LANES, Op};

/// Inverse of the normal distribution function, by bisection of its integral (Simpson's rule).
fn normal_quantile(p: f64) -> f64 {
    let density = |x: f64| (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let distribution = |x: f64| {
        let steps = 2000;
        let h = x / f64::from(steps);
        let weight = |i: i32| {
            if i == 0 || i == steps {
                1.0
            } else if i % 2 == 1 {
                4.0
            } else {
                2.0
            }
        };
        0.5 + (0..=steps).map(|i| weight(i) * density(f64::from(i) * h)).sum::<f64>() * h / 3.0
    };
    let (mut low, mut high) = (0.0, 4.0);
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if distribution(middle) < p { low = middle } else { high = middle }
    }
    f64::midpoint(low, high)
}

#[test]
fn nf4_is_the_normal_quantiles_divided_by_the_largest() {
    let offset = 0.967_708_3_f64;
    let point = |i: u32, n: u32| offset + (0.5 - offset) * f64::from(i) / f64::from(n);
    let positive = (0..8).map(|i| normal_quantile(point(i, 8)));
    let negative = (0..7).map(|i| -normal_quantile(point(i, 7)));
    let mut values: Vec<f64> = positive.chain(negative).chain([0.0]).collect();
    values.sort_by(f64::total_cmp);
    let largest = values[15];
    for (derived, published) in values.into_iter().zip(nf4::VALUES) {
        // The published table was made from float32 quantiles: half a unit in the last place of the
        // quantile and of the quotient, so 2 · 2^-24 relative.
        let error = (derived / largest - f64::from(published)).abs();
        assert!(error <= 1.2e-7, "{derived} {published} {error}");
    }
}

#[test]
fn nf4_thresholds_are_the_float32_midpoints() {
    for (i, pair) in nf4::VALUES.windows(2).enumerate() {
        assert_eq!(nf4::THRESHOLDS[i].to_bits(), f32::midpoint(pair[0], pair[1]).to_bits(), "threshold {i}");
    }
    assert!(nf4::THRESHOLDS[15].is_infinite());
    assert_eq!(nf4::VALUES[nf4::ZERO_CODE as usize].to_bits(), 0);
}

#[test]
fn fp4_values_are_twelfths_of_a_four_bit_float() {
    // Exponent 0 is subnormal: 0 and 1/16 of the unit; exponents 1-3 are 2^(e+1) · (1 + m/2).
    let raw = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0_f32];
    for (code, value) in raw.into_iter().enumerate() {
        assert_eq!(fp4::VALUES[code].to_bits(), (value / 12.0).to_bits(), "code {code}");
        assert_eq!(fp4::VALUES[code + 8].to_bits(), (-value / 12.0).to_bits(), "code {}", code + 8);
    }
}

#[test]
fn fp4_ranks_are_in_order_of_magnitude_and_thresholds_near_the_midpoints() {
    let ordered = fp4::CODE_OF_RANK.map(|code| fp4::VALUES[code as usize]);
    assert!(ordered.is_sorted());
    for (i, pair) in ordered.windows(2).enumerate() {
        // The rule writes its constants with at least six decimals.
        assert!((f64::from(fp4::THRESHOLDS[i]) - f64::midpoint(pair[0].into(), pair[1].into())).abs() < 1e-6);
    }
}

#[test]
fn dynamic8_has_the_published_landmarks() {
    let map = dynamic8::map();
    assert!(map.values.is_sorted());
    assert_eq!(map.values[0].to_bits(), (-0.992_968_74_f32).to_bits());
    assert_eq!(map.values[127].to_bits(), 0);
    assert_eq!(map.values[255].to_bits(), 1.0_f32.to_bits());
    let smallest = map.values.into_iter().filter(|v| *v > 0.0).fold(f32::INFINITY, f32::min);
    assert!((smallest - 5.5e-7).abs() < 1e-13, "{smallest}");
}

#[test]
fn dynamic8_encodes_to_the_nearest_value_and_ties_to_the_lower() {
    let map = dynamic8::map();
    let nearest = |x: f32| {
        let distance = |v: f32| (f64::from(v) - f64::from(x)).abs();
        (0..256).min_by(|a, b| distance(map.values[*a]).total_cmp(&distance(map.values[*b]))).expect("256 values")
    };
    let midpoints = map.values.windows(2).map(|pair| f32::midpoint(pair[0], pair[1]));
    let around = midpoints.flat_map(|m| [m.next_down(), m, m.next_up()]);
    let grid = (-1100..=1100).map(|i| i as f32 / 1000.0);
    for x in around.chain(grid).chain(map.values) {
        assert_eq!(usize::from(map.encode(x)), nearest(x), "{x:e}");
    }
}

#[test]
fn ranks_by_bucket_are_the_counts_of_the_thresholds_below() {
    let rank = |buckets: &Buckets, x: f32| {
        let bucket = x.mul_add(PER_UNIT, OFFSET).to_bits() as usize % 32;
        let (bucket_rank, threshold) =
            (buckets.ranks.as_flattened()[bucket], buckets.thresholds.as_flattened()[bucket]);
        bucket_rank.to_bits() as usize + usize::from(x > threshold)
    };
    let check = |thresholds: &Thresholds, buckets: &Buckets, x: f32| {
        assert_eq!(rank(buckets, x), thresholds.iter().filter(|t| x > **t).count(), "{x:e}");
    };
    // From -1 to 1, and the roundings of a quotient beyond.
    let grid = (-100_000..=100_000).map(|i| i as f32 / 100_000.0).chain([1.0_f32.next_up(), (-1.0_f32).next_down()]);
    let thresholds = nf4::THRESHOLDS.into_iter().chain(fp4::THRESHOLDS).filter(|t| t.is_finite());
    for x in thresholds.flat_map(|t| [t.next_down(), t, t.next_up()]).chain(grid) {
        check(&nf4::THRESHOLDS, &nf4::BUCKETS, x);
        check(&fp4::THRESHOLDS, &fp4::BUCKETS, x.abs());
    }
}

struct EncodeLanes<'a>(&'a [f32; LANES]);

impl Op for EncodeLanes<'_> {
    type Output = [u8; LANES];
    fn eval<I: Isa>(self, isa: I) -> [u8; LANES] {
        isa.vectorize(
            #[inline(always)]
            || isa.low_bytes(dynamic8::map().encode_lanes(isa, isa.load(self.0))),
        )
    }
}

#[test]
fn dynamic8_encodes_sixteen_values_as_it_encodes_each() {
    let map = dynamic8::map();
    let midpoints = map.values.windows(2).map(|pair| f32::midpoint(pair[0], pair[1]));
    let around = midpoints.flat_map(|m| [m.next_down().next_down(), m.next_down(), m, m.next_up()]);
    let powers = (0..150).map(|i| 0.5_f32.powi(i)).flat_map(|v| [v, -v, 1.3 * v, -1.3 * v]);
    let edges = [0.0, -0.0, 1.0_f32.next_up(), (-1.0_f32).next_down(), f32::MIN_POSITIVE];
    let mut all: Vec<f32> = around.chain(powers).chain(map.values).chain(edges).collect();
    all.resize(all.len().next_multiple_of(LANES), 0.5);
    for values in all.as_chunks().0 {
        for isa in IsaKind::available() {
            assert_eq!(isa.run(EncodeLanes(values)), values.map(|v| map.encode(v)), "{} {values:?}", isa.name());
        }
    }
}
