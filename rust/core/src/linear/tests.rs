//! The fused linear against the float64 reference, on ragged shapes, every type, instruction set and
//! thread count.

use super::dropout::dropout_mask;
use super::{Dropout, Gradients, LoraGradients, LowRank, Weight, backward, forward};
use crate::codec::int8;
use crate::codec::spec::{Packed, QuantSpec, QuantType, Scales};
use crate::dtype::{DType, Element, Floats, FloatsMut, bf16, f16};
use crate::reference::{self, Matrix};
use crate::simd::IsaKind;
use crate::{Error, Exec};

mod few_rows;

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

fn floats<E: Element>(values: &[E]) -> Vec<f32> {
    values.iter().map(|v| v.to_f32()).collect()
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Codec {
    FourBit(QuantType, usize),
    Double(usize),
    Int8,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) r: usize,
}

/// A quantized weight that owns its bytes, and its dequantized values.
pub(super) struct Stored {
    codes: Vec<u8>,
    int8: Vec<i8>,
    absmax: Vec<f32>,
    nested: Option<(Vec<u8>, Vec<f32>, f32)>,
    codec: Codec,
    pub(super) dense: Vec<f32>,
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

    fn weight(&self, n: usize, k: usize) -> Weight<'_> {
        match self.packed(n * k) {
            Some(packed) => Weight::four_bit(packed, n, k).expect("fits"),
            None => Weight::int8(&self.int8, &self.absmax, n, k).expect("fits"),
        }
    }
}

/// Outputs of one forward and backward call.
#[derive(Debug, PartialEq)]
pub(super) struct Outputs<E> {
    pub(super) y: Vec<E>,
    pub(super) s: Vec<E>,
    pub(super) dx: Vec<E>,
    pub(super) da: Vec<f32>,
    pub(super) db: Vec<f32>,
}

pub(super) struct Case<E> {
    shape: Shape,
    pub(super) stored: Stored,
    x: Vec<E>,
    dy: Vec<E>,
    a: Vec<f32>,
    b: Vec<f32>,
    pub(super) bias: Vec<f32>,
    scaling: f32,
    dropout: Dropout,
}

pub(super) trait Typed: Element + PartialEq {
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
    pub(super) fn new(shape: Shape, codec: Codec, dropout_p: f32) -> Self {
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
        }
    }

    fn lora(&self) -> Option<LowRank<'_>> {
        let Shape { n, k, r, .. } = self.shape;
        let operands = (Floats::F32(&self.a), Floats::F32(&self.b));
        (r > 0).then(|| LowRank::new(operands, r, (n, k), self.scaling, self.dropout).expect("fits"))
    }

    pub(super) fn run(&self, exec: &Exec) -> Outputs<E> {
        let Shape { m, n, k, r } = self.shape;
        let nan = E::from_f32(f32::NAN);
        let mut out = Outputs {
            y: vec![nan; m * n],
            s: vec![nan; m * r],
            dx: vec![nan; m * k],
            da: vec![f32::NAN; r * k],
            db: vec![f32::NAN; n * r],
        };
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
    fn check(&self, out: &Outputs<E>) {
        self.check_split(out, 0.0);
    }

    /// [`Case::check`] where what the branch holds in float32 is taken with a relative error of `split`.
    pub(super) fn check_split(&self, out: &Outputs<E>, split: f64) {
        let Shape { m, n, k, r } = self.shape;
        // A product of two split values errs by twice that, and the inner sum has the error of its own.
        let (split_s, split_ds) = (2.0 * k as f64 * split, n as f64 * split);
        let (split_y, split_dx) = (3.1 * r as f64 * split_s, 2.0 * 3.1 * r as f64 * split_ds);
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
        let unit = f64::from(f32::EPSILON) / 2.0;
        // Inputs are at most 1 (kept ones 1/(1-p) <= 2); S is at most 2k, its products with B at most 2k·r.
        let forward_sum = unit * ((k * k) as f64 + (2 * k * r) as f64 * (2 * k + r + 2) as f64 + (k + 2) as f64);
        compare("y", &floats(&out.y), &y, forward_sum + split_y, E::ROUNDING);
        let backward_sum = unit * ((n * n) as f64 + (2 * n * r) as f64 * (n + r + 2) as f64);
        compare("dx", &floats(&out.dx), &dx, backward_sum + split_dx, E::ROUNDING);
        if let (Some(s), Some((da, db))) = (s, branch) {
            let s_sum = unit * 2.0 * (k * k) as f64 + split_s;
            compare("s", &floats(&out.s), &s, s_sum, E::ROUNDING);
            let ds = n as f64;
            let split_da = 2.0 * 2.1 * m as f64 * split_ds;
            compare("da", &out.da, &da, unit * 2.0 * ds * m as f64 * (m + n + 2) as f64 + split_da, 0.0);
            let largest_s = s.data.iter().fold(0.0, |a: f64, v| a.max(v.abs()));
            let rounded_s = m as f64 * (largest_s * E::ROUNDING + s_sum);
            compare("db", &out.db, &db, rounded_s + unit * largest_s * m as f64 * (m + 2) as f64, 0.0);
        }
    }
}

fn compare(what: &str, got: &[f32], expected: &Matrix, absolute: f64, relative: f64) {
    assert_eq!(got.len(), expected.data.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(&expected.data).enumerate() {
        let error = (f64::from(*got) - expected).abs();
        // 6e-8 absolute: the smallest step of float16, whose small outputs are subnormal.
        assert!(error <= absolute + relative * expected.abs() + 6e-8, "{what}[{i}]: {got} {expected} {error:e}");
    }
}

/// Runs on every instruction set, checks one and asserts that all give its bits.
fn check<E: Typed>(shape: Shape, codec: Codec, dropout_p: f32) {
    let case = Case::<E>::new(shape, codec, dropout_p);
    let mut first = None;
    for isa in IsaKind::available() {
        for threads in [1, 2] {
            let out = case.run(&Exec { isa, threads });
            match &first {
                None => {
                    case.check(&out);
                    first = Some(out);
                }
                Some(first) => assert!(out == *first, "{} {threads} {shape:?} {codec:?}", isa.name()),
            }
        }
    }
}

pub(super) const NF4: Codec = Codec::FourBit(QuantType::Nf4, 64);

#[test]
fn ragged_shapes_agree_with_float64() {
    for m in [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 33] {
        for (n, k) in [(1, 1), (5, 64), (70, 129), (17, 320), (33, 65)] {
            check::<f32>(Shape { m, n, k, r: 0 }, NF4, 0.0);
            check::<f32>(Shape { m, n, k, r: 3 }, NF4, 0.0);
        }
    }
}

#[test]
fn empty_sides_are_legal() {
    for (n, k) in [(0, 5), (5, 0), (0, 0), (5, 70)] {
        for m in if k == 70 { &[0][..] } else { &[0, 1, 20] } {
            let m = *m;
            let case = Case::<f32>::new(Shape { m, n, k, r: 2 }, NF4, 0.0);
            let out = case.run(&Exec { isa: IsaKind::available()[0], threads: 2 });
            assert!(out.s.iter().all(|v| v.is_finite()), "{n} {k} {m}");
            let bias_only = out.y.iter().enumerate().all(|(i, y)| y.to_bits() == case.bias[i % n].to_bits());
            assert!(bias_only, "{n} {k} {m}");
            assert!(out.dx.iter().chain(&out.da).chain(&out.db).all(|v| *v == 0.0), "{n} {k} {m}");
        }
    }
}

#[test]
fn every_codec_and_block_size_agrees_with_float64() {
    let shape = Shape { m: 10, n: 21, k: 96, r: 4 };
    for block in [32, 64, 128, 4096] {
        for codec in
            [Codec::FourBit(QuantType::Nf4, block), Codec::FourBit(QuantType::Fp4, block), Codec::Double(block)]
        {
            check::<f32>(shape, codec, 0.0);
            check::<f32>(Shape { m: 3, ..shape }, codec, 0.0);
        }
    }
    check::<f32>(shape, Codec::Int8, 0.0);
    check::<f32>(Shape { m: 3, ..shape }, Codec::Int8, 0.0);
}

#[test]
fn sixteen_bit_activations_agree_with_float64_to_one_rounding() {
    for m in [1, 7, 64] {
        for r in [0, 8] {
            let shape = Shape { m, n: 40, k: 192, r };
            check::<f16>(shape, Codec::Double(64), 0.0);
            check::<bf16>(shape, Codec::Double(64), 0.0);
        }
    }
}

#[test]
fn many_rows_columns_and_depths_cross_every_block_boundary() {
    // More than one chunk of rows forward (192) and backward (252), depth block (256), task and sliver.
    check::<f32>(Shape { m: 400, n: 300, k: 70, r: 9 }, NF4, 0.0);
    check::<bf16>(Shape { m: 20, n: 530, k: 600, r: 1 }, NF4, 0.0);
}

#[test]
fn few_rows_cross_every_block_boundary() {
    // More than one task of output columns (64), piece of a row (512) and nested block of scales (256).
    for m in 1..=9 {
        check::<f32>(Shape { m, n: 131, k: 640, r: 3 }, Codec::Double(32), 0.0);
        check::<f32>(Shape { m, n: 70, k: 1100, r: 0 }, NF4, 0.0);
    }
    check::<f32>(Shape { m: 3, n: 70, k: 1100, r: 3 }, Codec::Int8, 0.0);
}

#[test]
fn a_branch_of_rank_zero_adds_nothing() {
    let exec = Exec { isa: IsaKind::available()[0], threads: 1 };
    for m in [1, 20] {
        let case = Case::<f32>::new(Shape { m, n: 30, k: 64, r: 0 }, NF4, 0.0);
        let (expected, weight) = (case.run(&exec), case.stored.weight(30, 64));
        let none = Floats::F32(&[]);
        let lora = LowRank::new((none, none), 0, (30, 64), 1.0, case.dropout).expect("fits");
        let (mut y, mut dx) = (vec![f32::NAN; m * 30], vec![f32::NAN; m * 64]);
        let (x, bias) = (Floats::F32(&case.x), Some(Floats::F32(&case.bias)));
        let (out, s) = (FloatsMut::F32(&mut y), FloatsMut::F32(&mut []));
        forward(&exec, m, x, &weight, bias, Some(&lora), out, Some(s)).expect("fits");
        let branch = LoraGradients {
            lora: &lora,
            x: Some(x),
            s: Some(none),
            da: Some(FloatsMut::F32(&mut [])),
            db: Some(FloatsMut::F32(&mut [])),
        };
        let gradients = Gradients { dx: Some(FloatsMut::F32(&mut dx)), lora: Some(branch) };
        backward(&exec, m, Floats::F32(&case.dy), &weight, gradients).expect("fits");
        assert_eq!((y, dx), (expected.y, expected.dx));
    }
}

#[test]
fn sizes_whose_product_overflows_are_refused() {
    let exec = Exec { isa: IsaKind::available()[0], threads: 1 };
    let n = 1 << (usize::BITS - 1);
    let spec = QuantSpec::new(QuantType::Nf4, 64).expect("valid");
    let packed = Packed::new(&[], Scales::Plain(&[]), spec, 0).expect("fits");
    let refused = Weight::four_bit(packed, n, 2).expect_err("more elements than a usize counts");
    assert_eq!(refused, Error::Length { what: "weight", expected: usize::MAX, got: 0 });
    assert!(Weight::int8(&[], &[0.0; 2], 2, n).is_err());
    let dropout = Dropout::new(0.5, 0).expect("valid");
    assert!(dropout_mask(&exec, dropout, (n, 2), &mut []).is_err());
}

#[test]
fn ranks_beyond_one_depth_block_agree_with_float64() {
    for r in [1, 8, 16, 64, 257, 300] {
        check::<f32>(Shape { m: 12, n: 40, k: 64, r }, NF4, 0.0);
        check::<f32>(Shape { m: 2, n: 40, k: 64, r }, NF4, 0.0);
    }
}

#[test]
fn dropout_masks_the_branch_and_only_the_branch() {
    for m in [1, 8, 30, 390] {
        check::<f32>(Shape { m, n: 30, k: 97, r: 5 }, NF4, 0.5);
    }
    check::<bf16>(Shape { m: 30, n: 30, k: 128, r: 5 }, NF4, 0.25);
}

#[test]
fn gradients_that_are_not_asked_for_are_not_needed() {
    let case = Case::<f32>::new(Shape { m: 20, n: 30, k: 64, r: 4 }, NF4, 0.0);
    let exec = Exec { isa: IsaKind::available()[0], threads: 1 };
    let all = case.run(&exec);
    let (weight, lora) = (case.stored.weight(30, 64), case.lora().expect("r > 0"));
    let mut db = vec![f32::NAN; 120];
    let s = Some(Floats::F32(&all.s));
    let branch = LoraGradients { lora: &lora, x: None, s, da: None, db: Some(FloatsMut::F32(&mut db)) };
    backward(&exec, 20, Floats::F32(&case.dy), &weight, Gradients { dx: None, lora: Some(branch) }).expect("fits");
    assert_eq!(db, all.db);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let case = Case::<f32>::new(Shape { m: 2, n: 3, k: 4, r: 0 }, NF4, 0.0);
    let exec = Exec { isa: IsaKind::available()[0], threads: 1 };
    let weight = case.stored.weight(3, 4);
    let short = forward(&exec, 2, Floats::F32(&case.x[1..]), &weight, None, None, FloatsMut::F32(&mut [0.0; 6]), None);
    assert_eq!(short, Err(Error::Length { what: "x", expected: 8, got: 7 }));
    let mut y = [f16::ZERO; 6];
    let typed = forward(&exec, 2, Floats::F32(&case.x), &weight, None, None, FloatsMut::F16(&mut y), None);
    assert_eq!(typed, Err(Error::Type { what: "y", of: "x", expected: DType::F32, got: DType::F16 }));
    assert!(Dropout::new(1.0, 0).is_err() && Dropout::new(-0.1, 0).is_err() && Dropout::new(f32::NAN, 0).is_err());
}
