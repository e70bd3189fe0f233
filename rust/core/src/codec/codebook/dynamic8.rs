//! 8-bit dynamic map (Dettmers 2015, arXiv 1511.04561): 256 sorted float32 values.
//!
//! For i in 0..7: the midpoints of `2^i + 1` points of linspace(0.1, 1), times ±10^(i-6); and 0 and 1.
//! There is no -1.0: the first value is -0.99296874.

use std::sync::LazyLock;

static MAP: LazyLock<Map> = LazyLock::new(Map::derive);

/// The table and the thresholds of the nearest value.
#[derive(Debug)]
pub struct Map {
    /// Value of each code, ascending.
    pub values: [f32; 256],
    /// Largest float32 that is no nearer to `values[i + 1]` than to `values[i]`: the code is the number
    /// of thresholds below the value, so a tie takes the lower code.
    thresholds: [f32; 255],
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
        let thresholds = std::array::from_fn(|i| floor_midpoint(values[i], values[i + 1]));
        Self { values, thresholds }
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
