//! A problem with its inputs, what the kernels make of it, and what float64 says it must be.

use crate::Exec;
use crate::codec::int8;
use crate::codec::spec::{Packed, QuantSpec, QuantType, Scales};
use crate::dtype::{Element, Floats, FloatsMut, bf16, f16};
use crate::linear::dropout::dropout_mask;
use crate::linear::{Dropout, Gradients, LoraGradients, LowRank, RowRanks, Weight, backward, forward};
use crate::reference::{self, Matrix};
use crate::simd::IsaKind;

/// Unit roundoff of float32.
const UNIT: f64 = f32::EPSILON as f64 / 2.0;

pub(in crate::linear) const NF4: Codec = Codec::FourBit(QuantType::Nf4, 64);

fn values(numel: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..numel)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

fn cast<E: Element>(values: &[f32]) -> Vec<E> {
    values.iter().map(|v| E::from_f32(*v)).collect()
}

pub(in crate::linear) fn floats<E: Element>(values: &[E]) -> Vec<f32> {
    values.iter().map(|v| v.to_f32()).collect()
}

#[derive(Debug, Clone, Copy)]
pub(in crate::linear) enum Codec {
    FourBit(QuantType, usize),
    Double(usize),
    Int8,
}

#[derive(Debug, Clone, Copy)]
pub(in crate::linear) struct Shape {
    pub(in crate::linear) m: usize,
    pub(in crate::linear) n: usize,
    pub(in crate::linear) k: usize,
    pub(in crate::linear) r: usize,
}

/// A quantized weight that owns its bytes, and its dequantized values.
pub(in crate::linear) struct Stored {
    codes: Vec<u8>,
    int8: Vec<i8>,
    absmax: Vec<f32>,
    nested: Option<(Vec<u8>, Vec<f32>, f32)>,
    codec: Codec,
    pub(in crate::linear) dense: Vec<f32>,
}

impl Stored {
    fn new(codec: Codec, n: usize, k: usize) -> Self {
        let exec = Exec { isa: IsaKind::available()[0], threads: 1 };
        let data = values(n * k, 3);
        let mut stored =
            Self { codes: vec![], int8: vec![], absmax: vec![], nested: None, codec, dense: vec![0.0; n * k] };
        match codec {
            Codec::FourBit(quant_type, block) => {
                let spec = QuantSpec::new(quant_type, block).expect("valid");
                (stored.codes, stored.absmax) = reference::quantize_4bit(&data, spec);
            }
            Codec::Double(block) => {
                let spec = QuantSpec::new(QuantType::Nf4, block).expect("valid");
                let (codes, absmax) = reference::quantize_4bit(&data, spec);
                stored.codes = codes;
                stored.nested = Some(reference::double_quantize(&absmax));
            }
            Codec::Int8 => {
                (stored.int8, stored.absmax) = (vec![0; n * k], vec![0.0; n]);
                int8::quantize_int8(&exec, Floats::F32(&data), &mut stored.int8, &mut stored.absmax, "w")
                    .expect("finite");
            }
        }
        let mut dense = vec![0.0; n * k];
        if let Some(packed) = stored.packed(n * k) {
            let absmax: Vec<f32> = (0..packed.spec().blocks(n * k)).map(|i| packed.scales().get(i)).collect();
            dense = reference::dequantize_4bit(&stored.codes, &absmax, packed.spec(), n * k);
        } else {
            let matrix = int8::Int8Matrix::new(&stored.int8, &stored.absmax, n, k).expect("fits");
            int8::dequantize_int8(&exec, &matrix, FloatsMut::F32(&mut dense)).expect("fits");
        }
        stored.dense = dense;
        stored
    }

    fn packed(&self, numel: usize) -> Option<Packed<'_>> {
        let (quant_type, block) = match self.codec {
            Codec::FourBit(quant_type, block) => (quant_type, block),
            Codec::Double(block) => (QuantType::Nf4, block),
            Codec::Int8 => return None,
        };
        let scales = match &self.nested {
            Some((codes, nested_absmax, offset)) => Scales::Double { codes, nested_absmax, offset: *offset },
            None => Scales::Plain(&self.absmax),
        };
        let spec = QuantSpec::new(quant_type, block).expect("valid");
        Some(Packed::new(&self.codes, scales, spec, numel).expect("fits"))
    }

    pub(in crate::linear) fn codec(&self) -> Codec {
        self.codec
    }

    pub(in crate::linear) fn weight(&self, n: usize, k: usize) -> Weight<'_> {
        match self.packed(n * k) {
            Some(packed) => Weight::four_bit(packed, n, k).expect("fits"),
            None => Weight::int8(&self.int8, &self.absmax, n, k).expect("fits"),
        }
    }
}

/// Outputs of one forward and backward call.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::linear) struct Outputs<E> {
    pub(in crate::linear) y: Vec<E>,
    pub(in crate::linear) s: Vec<E>,
    pub(in crate::linear) dx: Vec<E>,
    pub(in crate::linear) da: Vec<f32>,
    pub(in crate::linear) db: Vec<f32>,
}

pub(in crate::linear) struct Case<E> {
    pub(in crate::linear) shape: Shape,
    pub(in crate::linear) stored: Stored,
    pub(in crate::linear) x: Vec<E>,
    pub(in crate::linear) dy: Vec<E>,
    pub(in crate::linear) a: Vec<f32>,
    pub(in crate::linear) b: Vec<f32>,
    pub(in crate::linear) bias: Vec<f32>,
    pub(in crate::linear) scaling: f32,
    pub(in crate::linear) dropout: Dropout,
    pub(in crate::linear) row_ranks: Option<RowRanks>,
}

struct Expected {
    y: Matrix,
    s: Option<Matrix>,
    dx: Matrix,
    branch: Option<(Matrix, Matrix)>,
}

pub(in crate::linear) trait Typed: Element + PartialEq {
    fn wrap(values: &[Self]) -> Floats<'_>;
    fn wrap_mut(values: &mut [Self]) -> FloatsMut<'_>;
    /// Half a unit in the last place at 1, which bounds the one rounding of each output.
    const ROUNDING: f64;
}

macro_rules! typed {
    ($t:ty, $v:ident, $rounding:expr) => {
        impl Typed for $t {
            fn wrap(values: &[Self]) -> Floats<'_> {
                Floats::$v(values)
            }
            fn wrap_mut(values: &mut [Self]) -> FloatsMut<'_> {
                FloatsMut::$v(values)
            }
            const ROUNDING: f64 = $rounding;
        }
    };
}
typed!(f32, F32, 5.97e-8);
typed!(f16, F16, 4.89e-4);
typed!(bf16, Bf16, 3.91e-3);

impl<E: Typed> Case<E> {
    pub(in crate::linear) fn new(shape: Shape, codec: Codec, dropout_p: f32) -> Self {
        let Shape { m, n, k, r } = shape;
        Self {
            shape,
            stored: Stored::new(codec, n, k),
            x: cast(&values(m * k, 5)),
            dy: cast(&values(m * n, 7)),
            a: values(r * k, 11),
            b: values(n * r, 13),
            bias: values(n, 17),
            scaling: 0.75,
            dropout: Dropout::new(dropout_p, 99).expect("valid"),
            row_ranks: None,
        }
    }

    pub(in crate::linear) fn lora(&self) -> Option<LowRank<'_>> {
        let Shape { n, k, r, .. } = self.shape;
        let operands = (Floats::F32(&self.a), Floats::F32(&self.b));
        (r > 0).then(|| {
            let lora = LowRank::new(operands, r, (n, k), self.scaling, self.dropout).expect("fits");
            match &self.row_ranks {
                Some(row_ranks) => lora.of_rows(row_ranks.clone()).expect("finite"),
                None => lora,
            }
        })
    }

    /// From here on, float64 multiplies with the weight that kernels on bfloat16 multiply with.
    pub(in crate::linear) fn round_weight_to_bf16(&mut self) {
        for value in &mut self.stored.dense {
            *value = bf16::from_f32(*value).to_f32();
        }
    }

    /// Outputs whose every element is NaN.
    pub(in crate::linear) fn unwritten(&self) -> Outputs<E> {
        let Shape { m, n, k, r } = self.shape;
        let nan = E::from_f32(f32::NAN);
        Outputs {
            y: vec![nan; m * n],
            s: vec![nan; m * r],
            dx: vec![nan; m * k],
            da: vec![f32::NAN; r * k],
            db: vec![f32::NAN; n * r],
        }
    }

    pub(in crate::linear) fn run(&self, exec: &Exec) -> Outputs<E> {
        let Shape { m, n, k, .. } = self.shape;
        let mut out = self.unwritten();
        let (weight, lora) = (self.stored.weight(n, k), self.lora());
        let s = lora.is_some().then(|| E::wrap_mut(&mut out.s));
        let bias = Some(Floats::F32(&self.bias));
        forward(exec, m, E::wrap(&self.x), &weight, bias, lora.as_ref(), E::wrap_mut(&mut out.y), s).expect("fits");
        let branch = lora.as_ref().map(|lora| LoraGradients {
            lora,
            x: Some(E::wrap(&self.x)),
            s: Some(E::wrap(&out.s)),
            da: Some(FloatsMut::F32(&mut out.da)),
            db: Some(FloatsMut::F32(&mut out.db)),
        });
        let gradients = Gradients { dx: Some(E::wrap_mut(&mut out.dx)), lora: branch };
        backward(exec, m, E::wrap(&self.dy), &weight, gradients).expect("fits");
        out
    }

    /// Compares with float64, element by element. A sum of `terms` products, each of magnitude at most
    /// `size`, accumulated in float32, errs by at most `terms² · size · 2^-24`; the outputs are then
    /// rounded once, and dB is made from an S that was rounded once.
    pub(in crate::linear) fn check(&self, out: &Outputs<E>) {
        self.check_split(out, 0.0);
    }

    /// Forward `(y, S)` and backward `(dX, (dA, dB))` in float64.
    fn expected(&self) -> Expected {
        let Shape { m, n, k, r } = self.shape;
        let mut mask = vec![1.0_f32; m * k];
        if r > 0 && self.dropout.p() > 0.0 {
            let exec = Exec { isa: IsaKind::available()[0], threads: 1 };
            dropout_mask(&exec, self.dropout, (m, k), &mut mask).expect("fits");
        }
        let w = Matrix::new(&self.stored.dense, k);
        let (x, dy) = (Matrix::new(&floats(&self.x), k), Matrix::new(&floats(&self.dy), n));
        let lora = (r > 0).then(|| reference::LowRank {
            a: Matrix::new(&self.a, k),
            b: Matrix::new(&self.b, r),
            scaling: f64::from(self.scaling),
            mask: Matrix::new(&mask, k),
        });
        let (y, s) = reference::linear(&x, &w, Some(&self.bias), lora.as_ref());
        let (dx, branch) = reference::linear_backward(&dy, &x, &w, lora.as_ref());
        Expected { y, s, dx, branch }
    }

    /// dX in float64, and the bound of its error before it is rounded; `split` as in [`Case::check_split`].
    pub(in crate::linear) fn input_gradient(&self, split: f64) -> (Matrix, f64) {
        let Shape { n, r, .. } = self.shape;
        let split_dx = 2.0 * 3.1 * r as f64 * n as f64 * split;
        (self.expected().dx, UNIT * ((n * n) as f64 + (2 * n * r) as f64 * (n + r + 2) as f64) + split_dx)
    }

    /// [`Case::check`] where what the branch holds in float32 is taken with a relative error of `split`.
    pub(in crate::linear) fn check_split(&self, out: &Outputs<E>, split: f64) {
        let Shape { m, n, k, r } = self.shape;
        // A product of two split values errs by twice that, and the inner sum has the error of its own.
        let (split_s, split_ds) = (2.0 * k as f64 * split, n as f64 * split);
        let split_y = 3.1 * r as f64 * split_s;
        let Expected { y, s, dx, branch } = self.expected();
        // Inputs are at most 1 (kept ones 1/(1-p) <= 2); S is at most 2k, its products with B at most 2k·r.
        let forward_sum = UNIT * ((k * k) as f64 + (2 * k * r) as f64 * (2 * k + r + 2) as f64 + (k + 2) as f64);
        compare("y", &floats(&out.y), &y, forward_sum + split_y, E::ROUNDING);
        compare("dx", &floats(&out.dx), &dx, self.input_gradient(split).1, E::ROUNDING);
        if let (Some(s), Some((da, db))) = (s, branch) {
            let s_sum = UNIT * 2.0 * (k * k) as f64 + split_s;
            compare("s", &floats(&out.s), &s, s_sum, E::ROUNDING);
            let ds = n as f64;
            let split_da = 2.0 * 2.1 * m as f64 * split_ds;
            compare("da", &out.da, &da, UNIT * 2.0 * ds * m as f64 * (m + n + 2) as f64 + split_da, 0.0);
            let largest_s = s.data.iter().fold(0.0, |a: f64, v| a.max(v.abs()));
            let rounded_s = m as f64 * (largest_s * E::ROUNDING + s_sum);
            compare("db", &out.db, &db, rounded_s + UNIT * largest_s * m as f64 * (m + 2) as f64, 0.0);
        }
    }
}

pub(in crate::linear) fn compare(what: &str, got: &[f32], expected: &Matrix, absolute: f64, relative: f64) {
    assert_eq!(got.len(), expected.data.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(&expected.data).enumerate() {
        let error = (f64::from(*got) - expected).abs();
        // 6e-8 absolute: the smallest step of float16, whose small outputs are subnormal.
        assert!(error <= absolute + relative * expected.abs() + 6e-8, "{what}[{i}]: {got} {expected} {error:e}");
    }
}
