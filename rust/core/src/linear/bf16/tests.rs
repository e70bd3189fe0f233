//! Products of bfloat16 against float64, with the weight rounded to bfloat16. Nothing runs on a machine
//! without instructions for them, which the tests print.

use crate::Exec;
use crate::dtype::{bf16, f16};
use crate::linear::tests::case::{Case, Codec, NF4, Shape};
use crate::simd::IsaKind;

/// Relative error of a float32 value as a leading and a trailing bfloat16: each keeps eight bits and rounds.
pub(in crate::linear) const SPLIT: f64 = 1.0 / 131_072.0;

fn instruction_sets() -> Vec<IsaKind> {
    let found: Vec<_> = IsaKind::all().into_iter().filter(|isa| isa.has_dots()).collect();
    if found.is_empty() {
        println!("this machine has no instructions for bfloat16 products: nothing was tested");
    }
    found
}

/// Compares with float64, and the bits for several numbers of threads with each other.
fn check(shape: Shape, codec: Codec, dropout_p: f32) {
    for isa in instruction_sets() {
        let mut case = Case::<bf16>::new(shape, codec, dropout_p);
        let alone = case.run(&Exec { isa, threads: 1 });
        for threads in [2, 3] {
            assert!(case.run(&Exec { isa, threads }) == alone, "{threads} {shape:?} {codec:?}");
        }
        case.round_weight_to_bf16();
        case.check_split(&alone, SPLIT);
    }
}

#[test]
fn ragged_shapes_agree_with_float64() {
    for m in [1, 2, 7, 15, 16, 17, 31, 33, 49] {
        for (n, k) in [(1, 1), (5, 64), (70, 129), (17, 320), (33, 65), (40, 30)] {
            check(Shape { m, n, k, r: 0 }, NF4, 0.0);
            check(Shape { m, n, k, r: 3 }, NF4, 0.0);
        }
    }
}

#[test]
fn every_codec_agrees_with_float64() {
    let shape = Shape { m: 10, n: 21, k: 96, r: 4 };
    for codec in [Codec::Double(32), Codec::Double(4096), Codec::Int8] {
        check(shape, codec, 0.0);
    }
}

#[test]
fn every_block_boundary_is_crossed() {
    // More than one chunk of rows (512), block of depth (512) forward and backward, task and sliver.
    check(Shape { m: 530, n: 300, k: 70, r: 9 }, NF4, 0.0);
    check(Shape { m: 20, n: 530, k: 1100, r: 1 }, Codec::Double(64), 0.0);
    check(Shape { m: 530, n: 20, k: 30, r: 2 }, NF4, 0.3);
}

#[test]
fn ranks_beyond_one_block_of_depth_agree_with_float64() {
    for r in [1, 8, 16, 17, 64, 130, 257] {
        check(Shape { m: 12, n: 40, k: 64, r }, NF4, 0.0);
    }
}

#[test]
fn dropout_masks_the_branch_and_only_the_branch() {
    for m in [1, 8, 30, 60] {
        check(Shape { m, n: 30, k: 97, r: 5 }, NF4, 0.5);
    }
}

#[test]
fn empty_sides_are_legal() {
    for isa in instruction_sets() {
        for (m, n, k) in [(0, 5, 70), (1, 0, 5), (20, 0, 5), (1, 5, 0), (20, 5, 0), (20, 0, 0)] {
            let case = Case::<bf16>::new(Shape { m, n, k, r: 2 }, NF4, 0.0);
            let out = case.run(&Exec { isa, threads: 2 });
            let bias_only = out.y.iter().enumerate().all(|(i, y)| *y == bf16::from_f32(case.bias[i % n]));
            assert!(bias_only, "{m} {n} {k}");
            assert!(out.s.iter().all(|v| v.is_finite()), "{m} {n} {k}");
            assert!(out.dx.iter().all(|v| *v == bf16::ZERO), "{m} {n} {k}");
            assert!(out.da.iter().chain(&out.db).all(|v| *v == 0.0), "{m} {n} {k}");
        }
    }
}

#[test]
fn other_types_keep_their_bits() {
    let shape = Shape { m: 20, n: 70, k: 129, r: 3 };
    let plain = IsaKind::available()[0];
    for isa in instruction_sets() {
        let (case, other) = (Case::<f32>::new(shape, NF4, 0.0), Case::<f16>::new(shape, NF4, 0.0));
        let exec = |isa| Exec { isa, threads: 2 };
        assert!(case.run(&exec(isa)) == case.run(&exec(plain)));
        assert!(other.run(&exec(isa)) == other.run(&exec(plain)));
    }
}
