//! Slow readable twins of the codec and of the fused linear: the oracles of the tests.
//!
//! One scalar loop each, in the order of the definition, in float32 where the format's bits are at
//! stake and in float64 where only the value is.

use crate::codec::codebook::{dynamic8, fp4, nf4};
use crate::codec::spec::{NESTED_BLOCK_SIZE, QuantSpec, QuantType};

/// Code of one scaled value.
#[must_use]
pub fn encode(quant_type: QuantType, scaled: f32) -> u8 {
    match quant_type {
        QuantType::Nf4 => nf4::THRESHOLDS[..15].iter().filter(|t| scaled > **t).count() as u8,
        QuantType::Fp4 => {
            let rank = fp4::THRESHOLDS[..7].iter().filter(|t| scaled.abs() > **t).count();
            fp4::CODE_OF_RANK[rank] | if scaled < 0.0 { 8 } else { 0 }
        }
    }
}

/// Packed codes and absmax of finite values.
#[must_use]
pub fn quantize_4bit(values: &[f32], spec: QuantSpec) -> (Vec<u8>, Vec<f32>) {
    let absmax: Vec<f32> =
        values.chunks(spec.block_size()).map(|block| block.iter().fold(0.0_f32, |m, v| m.max(v.abs()))).collect();
    let mut codes: Vec<u8> = values
        .iter()
        .enumerate()
        .map(|(i, v)| encode(spec.quant_type(), v * (1.0 / absmax[i / spec.block_size()].max(1e-38))))
        .collect();
    if codes.len() % 2 == 1 {
        codes.push(spec.quant_type().zero_code());
    }
    (codes.chunks(2).map(|pair| (pair[0] << 4) | pair[1]).collect(), absmax)
}

/// `table[code] · absmax`
#[must_use]
pub fn dequantize_4bit(codes: &[u8], absmax: &[f32], spec: QuantSpec, numel: usize) -> Vec<f32> {
    let code = |i: usize| if i.is_multiple_of(2) { codes[i / 2] >> 4 } else { codes[i / 2] & 15 };
    (0..numel).map(|i| spec.quant_type().values()[usize::from(code(i))] * absmax[i / spec.block_size()]).collect()
}

/// Codes, nested absmax and offset of absmax values.
#[must_use]
pub fn double_quantize(absmax: &[f32]) -> (Vec<u8>, Vec<f32>, f32) {
    let offset = (absmax.iter().fold(0.0, |sum, v| sum + f64::from(*v)) / absmax.len().max(1) as f64) as f32;
    let centred: Vec<f32> = absmax.iter().map(|v| v - offset).collect();
    let nested: Vec<f32> =
        centred.chunks(NESTED_BLOCK_SIZE).map(|block| block.iter().fold(0.0_f32, |m, v| m.max(v.abs()))).collect();
    let codes = centred
        .iter()
        .enumerate()
        .map(|(i, v)| nearest_dynamic8(v * (1.0 / nested[i / NESTED_BLOCK_SIZE].max(1e-38))))
        .collect();
    (codes, nested, offset)
}

/// Code of the nearest entry of the dynamic map, the lower of two equally near.
#[must_use]
pub fn nearest_dynamic8(value: f32) -> u8 {
    let distance = |code: u8| (f64::from(dynamic8::map().values[usize::from(code)]) - f64::from(value)).abs();
    (0..=255).min_by(|a, b| distance(*a).total_cmp(&distance(*b))).unwrap_or(0)
}

/// A row-major float64 matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// Elements.
    pub data: Vec<f64>,
    /// Columns.
    pub cols: usize,
}

impl Matrix {
    /// From float32.
    #[must_use]
    pub fn new(data: &[f32], cols: usize) -> Self {
        Self { data: data.iter().map(|v| f64::from(*v)).collect(), cols }
    }

    /// Rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.data.len().checked_div(self.cols).unwrap_or(0)
    }

    /// Transposed.
    #[must_use]
    pub fn t(&self) -> Self {
        let rows = self.rows();
        let data =
            (0..self.cols).flat_map(|c| (0..rows).map(move |r| (r, c))).map(|(r, c)| self.data[r * self.cols + c]);
        Self { data: data.collect(), cols: rows }
    }

    /// Matrix product.
    #[must_use]
    pub fn times(&self, other: &Self) -> Self {
        let entry = |r: usize, c: usize| {
            (0..self.cols).map(|k| self.data[r * self.cols + k] * other.data[k * other.cols + c]).sum()
        };
        let data = (0..self.rows()).flat_map(|r| (0..other.cols).map(move |c| (r, c))).map(|(r, c)| entry(r, c));
        Self { data: data.collect(), cols: other.cols }
    }

    /// Element by element.
    #[must_use]
    pub fn zip(&self, other: &Self, f: impl Fn(f64, f64) -> f64) -> Self {
        Self { data: self.data.iter().zip(&other.data).map(|(a, b)| f(*a, *b)).collect(), cols: self.cols }
    }

    /// Every element times `factor`.
    #[must_use]
    pub fn scaled(&self, factor: f64) -> Self {
        Self { data: self.data.iter().map(|v| v * factor).collect(), cols: self.cols }
    }
}

/// Operands of a low-rank branch; `mask` is all ones without dropout.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[r, K]`
    pub a: Matrix,
    /// `[N, r]`
    pub b: Matrix,
    /// Factor of the branch.
    pub scaling: f64,
    /// `[M, K]`
    pub mask: Matrix,
}

/// `y = x·Wᵀ + bias + scaling·S·Bᵀ` and `S = (mask ⊙ x)·Aᵀ`.
#[must_use]
pub fn linear(x: &Matrix, w: &Matrix, bias: Option<&[f32]>, lora: Option<&LowRank>) -> (Matrix, Option<Matrix>) {
    let mut y = x.times(&w.t());
    let s = lora.map(|lora| x.zip(&lora.mask, |x, m| x * m).times(&lora.a.t()));
    if let (Some(lora), Some(s)) = (lora, &s) {
        y = y.zip(&s.times(&lora.b.t()).scaled(lora.scaling), |a, b| a + b);
    }
    if let Some(bias) = bias {
        for row in y.data.chunks_mut(bias.len().max(1)) {
            row.iter_mut().zip(bias).for_each(|(v, b)| *v += f64::from(*b));
        }
    }
    (y, s)
}

/// dX, and dA and dB of the branch.
#[must_use]
pub fn linear_backward(
    dy: &Matrix,
    x: &Matrix,
    w: &Matrix,
    lora: Option<&LowRank>,
) -> (Matrix, Option<(Matrix, Matrix)>) {
    let dx = dy.times(w);
    let Some(lora) = lora else { return (dx, None) };
    let dropped = x.zip(&lora.mask, |x, m| x * m);
    let ds = dy.times(&lora.b).scaled(lora.scaling);
    let da = ds.t().times(&dropped);
    let db = dy.t().times(&dropped.times(&lora.a.t())).scaled(lora.scaling);
    (dx.zip(&ds.times(&lora.a).zip(&lora.mask, |d, m| d * m), |a, b| a + b), Some((da, db)))
}
