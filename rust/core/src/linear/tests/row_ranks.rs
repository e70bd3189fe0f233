//! Stacked branches of which each row uses its own.

use std::ops::Range;

use super::case::{Case, Codec, NF4, Outputs, Shape, Typed, floats};
use crate::dtype::{DType, Floats, bf16, f16};
use crate::linear::bf16::tests::SPLIT;
use crate::linear::{Dropout, LowRank, RowRanks, forward};
use crate::simd::IsaKind;
use crate::{Error, Exec};

const RANK: usize = 23;

/// Branches of different ranks, not in the order of the rows, and rows without any.
fn spans() -> Vec<Range<usize>> {
    vec![5..22, 0..5, 0..0, 22..23]
}

fn columns<T: Copy>(data: &[T], width: usize, span: &Range<usize>) -> Vec<T> {
    data.chunks(width.max(1)).flat_map(|line| &line[span.clone()]).copied().collect()
}

/// The rows of one span as a problem of their own, and what `out` has for it.
fn part<E: Typed>(case: &Case<E>, out: &Outputs<E>, rows: &Range<usize>, span: &Range<usize>) -> (Case<E>, Outputs<E>) {
    let Shape { n, k, r, .. } = case.shape;
    let rows_of = |data: &[E], width: usize| data[rows.start * width..rows.end * width].to_vec();
    let shape = Shape { m: rows.len(), n, k, r: span.len() };
    let mut alone = Case::new(shape, case.stored.codec(), case.dropout.p());
    (alone.x, alone.dy) = (rows_of(&case.x, k), rows_of(&case.dy, n));
    (alone.a, alone.b) = (case.a[span.start * k..span.end * k].to_vec(), columns(&case.b, r, span));
    let s = columns(&rows_of(&out.s, r), r, span);
    let da = out.da[span.start * k..span.end * k].to_vec();
    let got = Outputs { y: rows_of(&out.y, n), s, dx: rows_of(&out.dx, k), da, db: columns(&out.db, r, span) };
    (alone, got)
}

/// Each span's rows have what its branch alone gives them.
fn check<E: Typed>(each: usize, (n, k): (usize, usize), codec: Codec, dropout_p: f32) {
    let m = each * spans().len();
    let mut case = Case::<E>::new(Shape { m, n, k, r: RANK }, codec, dropout_p);
    case.row_ranks = Some(RowRanks::new(spans(), m, RANK).expect("ranges"));
    for isa in IsaKind::all() {
        let out = case.run(&Exec { isa, threads: 1 });
        assert!(out == case.run(&Exec { isa, threads: 2 }), "{} {each}", isa.name());
        let dots = isa.has_dots() && E::DTYPE == DType::Bf16;
        // The mask of a part that does not begin at row 0 is not that of its rows in the whole.
        let comparable = if dropout_p > 0.0 { 1 } else { spans().len() };
        for (i, span) in spans().iter().enumerate() {
            let rows = i * each..(i + 1) * each;
            for (row, line) in floats(&out.s).chunks(RANK).enumerate().skip(rows.start).take(each) {
                let others = line.iter().enumerate().filter(|(j, _)| !span.contains(j));
                assert!(others.into_iter().all(|(_, value)| *value == 0.0), "{} row {row}", isa.name());
            }
            if i < comparable {
                let (mut alone, got) = part(&case, &out, &rows, span);
                if dots {
                    alone.round_weight_to_bf16();
                }
                alone.check_split(&got, if dots { SPLIT } else { 0.0 });
            }
        }
    }
}

#[test]
fn each_row_has_its_own_branch() {
    for each in [1, 3, 40, 150] {
        check::<f32>(each, (70, 192), NF4, 0.0);
        check::<bf16>(each, (33, 128), Codec::Double(64), 0.0);
    }
    check::<f32>(5, (33, 65), NF4, 0.0); // no whole blocks
    check::<f16>(20, (17, 64), Codec::Int8, 0.0);
}

#[test]
fn dropout_and_own_branches_go_together() {
    for each in [2, 100] {
        check::<f32>(each, (33, 128), NF4, 0.5);
        check::<bf16>(each, (33, 128), NF4, 0.5);
    }
}

#[test]
#[allow(clippy::reversed_empty_ranges, clippy::single_range_in_vec_init)] // both are what is tested
fn ranges_that_do_not_fit_are_refused() {
    let range = |expected, got: &str| Error::Range { what: "row_ranks", expected, got: got.to_owned() };
    let of_ranks = "ranges of the branch's ranks";
    assert_eq!(RowRanks::new(vec![0..2, 1..5], 4, 4).unwrap_err(), range(of_ranks, "1..5 of 4"));
    assert_eq!(RowRanks::new(vec![3..2], 4, 4).unwrap_err(), range(of_ranks, "3..2 of 4"));
    let dividing = "as many ranges as divide the rows";
    assert_eq!(RowRanks::new(vec![0..2, 0..2], 5, 4).unwrap_err(), range(dividing, "2 for 5 rows"));
    assert_eq!(RowRanks::new(vec![], 4, 4).unwrap_err(), range(dividing, "0 for 4 rows"));

    let mut case = Case::<f32>::new(Shape { m: 4, n: 3, k: 8, r: 2 }, NF4, 0.0);
    case.row_ranks = Some(RowRanks::new(vec![0..1, 1..2], 2, 2).expect("ranges"));
    let (weight, exec) = (case.stored.weight(3, 8), Exec { isa: IsaKind::available()[0], threads: 1 });
    let mut y = [0.0; 12];
    let refused =
        forward(&exec, 4, Floats::F32(&case.x), &weight, None, case.lora().as_ref(), f32::wrap_mut(&mut y), None);
    assert_eq!(refused, Err(Error::Length { what: "rows of row_ranks", expected: 4, got: 2 }));
}

#[test]
fn an_adapter_that_diverged_is_refused_beside_others() {
    let none = Dropout::new(0.0, 0).expect("valid");
    let branch = LowRank::new((Floats::F32(&[1.0, f32::NAN]), Floats::F32(&[1.0, 1.0])), 2, (1, 1), 1.0, none);
    let refused = branch.expect("fits").of_rows(RowRanks::new(vec![0..1, 1..2], 2, 2).expect("ranges")).unwrap_err();
    assert_eq!(refused.to_string(), "lora_A of an adapter in a mixed batch must be finite, got NaN at index 1");
}
