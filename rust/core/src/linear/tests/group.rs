//! Linears that share x, in one call.

use super::case::{Case, Codec, NF4, Outputs, Shape, Typed, compare, floats};
use crate::dtype::{DType, Floats, FloatsMut, bf16, f16};
use crate::linear::bf16::tests::SPLIT;
use crate::linear::{LoraGradients, OutputGradient, Sibling, backward_group, forward_group};
use crate::reference::Matrix;
use crate::simd::IsaKind;
use crate::{Error, Exec};

const K: usize = 192;

/// Siblings of different sizes: with and without a branch, 4-bit and int8.
fn cases<E: Typed>(m: usize, dropout_p: f32) -> Vec<Case<E>> {
    let shape = |n, r| Shape { m, n, k: K, r };
    vec![
        Case::new(shape(70, 4), NF4, dropout_p),
        Case::new(shape(33, 0), Codec::Int8, dropout_p),
        Case::new(shape(600, 17), Codec::Double(64), dropout_p),
    ]
}

/// What the siblings give together: what each has of its own, and dX.
fn run<E: Typed>(exec: &Exec, m: usize, cases: &[Case<E>]) -> (Vec<Outputs<E>>, Vec<E>) {
    let nan = E::from_f32(f32::NAN);
    let mut dx = vec![nan; m * K];
    // dX is the group's, and NaN does not equal itself.
    let mut outs: Vec<_> = cases.iter().map(|case| Outputs { dx: vec![], ..case.unwritten() }).collect();
    let weights: Vec<_> = cases.iter().map(|case| case.stored.weight(case.shape.n, K)).collect();
    let loras: Vec<_> = cases.iter().map(Case::lora).collect();
    let siblings = cases.iter().zip(&mut outs).zip(weights.iter().zip(&loras)).map(|((case, out), (weight, lora))| {
        let s = lora.is_some().then(|| E::wrap_mut(&mut out.s));
        let bias = Some(Floats::F32(&case.bias));
        Sibling { weight, bias, lora: lora.as_ref(), y: E::wrap_mut(&mut out.y), s }
    });
    forward_group(exec, m, E::wrap(&cases[0].x), siblings.collect()).expect("fits");
    let outputs = cases.iter().zip(&mut outs).zip(weights.iter().zip(&loras)).map(|((case, out), (weight, lora))| {
        let lora = lora.as_ref().map(|lora| LoraGradients {
            lora,
            x: Some(E::wrap(&case.x)),
            s: Some(E::wrap(&out.s)),
            da: Some(FloatsMut::F32(&mut out.da)),
            db: Some(FloatsMut::F32(&mut out.db)),
        });
        OutputGradient { dy: E::wrap(&case.dy), weight, lora }
    });
    backward_group(exec, m, outputs.collect(), Some(E::wrap_mut(&mut dx))).expect("fits");
    (outs, dx)
}

/// Everything but dX has the bits of the calls one by one; dX is the float64 sum to one rounding.
fn check<E: Typed>(m: usize, dropout_p: f32) {
    for isa in IsaKind::all() {
        let mut cases = cases::<E>(m, dropout_p);
        let alone = Exec { isa, threads: 1 };
        let (outs, dx) = run(&alone, m, &cases);
        assert!(run(&Exec { isa, threads: 2 }, m, &cases) == (outs.clone(), dx.clone()), "{} {m}", isa.name());
        for (case, out) in cases.iter().zip(&outs) {
            let one = case.run(&alone);
            let (of_group, by_itself) = ((&out.y, &out.s, &out.da, &out.db), (&one.y, &one.s, &one.da, &one.db));
            assert!(of_group == by_itself, "{} {m} {:?}", isa.name(), case.shape);
        }
        let dots = isa.has_dots() && E::DTYPE == DType::Bf16;
        let (mut sum, mut bound) = (vec![0.0; m * K], 0.0);
        for case in &mut cases {
            if dots {
                case.round_weight_to_bf16();
            }
            let (dx, error) = case.input_gradient(if dots { SPLIT } else { 0.0 });
            for (total, value) in sum.iter_mut().zip(&dx.data) {
                *total += value;
            }
            bound += error;
        }
        // One chain of all the members' terms: the square of a sum of three is at most three times that of the squares.
        compare("dx", &floats(&dx), &Matrix { data: sum, cols: K }, 3.0 * bound, E::ROUNDING);
    }
}

#[test]
fn siblings_of_many_rows_give_what_they_give_alone() {
    check::<f32>(260, 0.0);
    check::<bf16>(530, 0.0);
}

#[test]
fn siblings_of_few_rows_give_what_they_give_alone() {
    for m in [1, 9] {
        check::<f32>(m, 0.0);
        check::<bf16>(m, 0.0);
        check::<f16>(m, 0.0);
    }
}

#[test]
fn siblings_drop_each_by_its_own_mask() {
    check::<f32>(20, 0.5);
    check::<bf16>(20, 0.5);
}

#[test]
fn no_sibling_is_no_work() {
    let exec = Exec { isa: IsaKind::available()[0], threads: 1 };
    assert_eq!(forward_group(&exec, 3, Floats::F32(&[1.0; 6]), vec![]), Ok(()));
    assert_eq!(backward_group(&exec, 3, vec![], None), Ok(()));
}

#[test]
fn siblings_of_different_columns_are_refused() {
    let exec = Exec { isa: IsaKind::available()[0], threads: 1 };
    let of = |k| Case::<f32>::new(Shape { m: 2, n: 3, k, r: 0 }, NF4, 0.0);
    let (one, other) = (of(8), of(4));
    let weights = (one.stored.weight(3, 8), other.stored.weight(3, 4));
    let output = |weight| OutputGradient { dy: Floats::F32(&one.dy), weight, lora: None };
    let refused = backward_group(&exec, 2, vec![output(&weights.0), output(&weights.1)], None);
    assert_eq!(refused, Err(Error::Length { what: "in_features of a group", expected: 8, got: 4 }));
}

#[test]
fn a_type_that_does_not_fit_is_refused_before_anything_is_written() {
    let case = Case::<f32>::new(Shape { m: 2, n: 3, k: 8, r: 0 }, NF4, 0.0);
    let weight = case.stored.weight(3, 8);
    for isa in IsaKind::all() {
        let (mut y, mut wrong) = ([f32::NAN; 6], [f16::ZERO; 6]);
        let sibling = |y| Sibling { weight: &weight, bias: None, lora: None, y, s: None };
        let siblings = vec![sibling(FloatsMut::F32(&mut y)), sibling(FloatsMut::F16(&mut wrong))];
        let refused = forward_group(&Exec { isa, threads: 1 }, 2, Floats::F32(&case.x), siblings);
        assert_eq!(refused, Err(Error::Type { what: "y", of: "x", expected: DType::F32, got: DType::F16 }));
        assert!(y.iter().all(|value| value.is_nan()));
    }
}
