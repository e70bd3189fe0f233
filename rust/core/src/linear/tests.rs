//! The fused linear against the float64 reference, on ragged shapes, every type, instruction set and
//! thread count.

use super::dropout::dropout_mask;
use super::{Dropout, Gradients, LoraGradients, LowRank, Weight, backward, forward};
use crate::codec::spec::{Packed, QuantSpec, QuantType, Scales};
use crate::dtype::{DType, Floats, FloatsMut, bf16, f16};
use crate::simd::IsaKind;
use crate::{Error, Exec};
use case::{Case, Codec, NF4, Shape, Typed};

pub(super) mod case;
mod few_rows;
mod group;
mod row_ranks;

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
