//! The kernels for few rows: every number of rows, and the edges of strips, groups, passes and blocks.

use super::case::{Case, Codec, NF4, Shape};
use super::check;
use crate::codec::spec::QuantType;
use crate::dtype::{bf16, f16};
use crate::simd::IsaKind;
use crate::{Error, Exec};

#[test]
fn every_number_of_rows_agrees_with_float64() {
    for m in 1..=50 {
        check::<f32>(Shape { m, n: 37, k: 192, r: if m % 2 == 0 { 0 } else { 5 } }, NF4, 0.0);
    }
}

#[test]
fn strips_and_groups_of_every_size_agree_with_float64() {
    // Strips are 16 or 32 rows of the weight, groups 128 columns, a task at most 256 columns of y.
    for m in [1, 2, 3, 16] {
        for n in [1, 2, 15, 16, 17, 31, 32, 33, 65] {
            check::<f32>(Shape { m, n, k: 96, r: 2 }, Codec::Double(32), 0.0);
        }
        for k in [32, 64, 128, 160, 288] {
            check::<f32>(Shape { m, n: 19, k, r: 0 }, Codec::FourBit(QuantType::Fp4, 32), 0.0);
        }
        check::<f32>(Shape { m, n: 530, k: 64, r: 1 }, NF4, 0.0);
    }
}

#[test]
fn few_rows_of_every_block_size_agree_with_float64() {
    for block in [32, 64, 128, 256, 512, 1024, 2048, 4096] {
        for m in [1, 2, 5, 18] {
            check::<f32>(Shape { m, n: 18, k: 4096, r: 0 }, Codec::Double(block), 0.0);
        }
    }
}

#[test]
fn low_rank_branches_of_every_size_agree_with_float64() {
    // S is multiplied sixteen columns at a time, B decoded 64 at a time.
    for m in [1, 2, 4, 17] {
        for r in [1, 4, 7, 8, 16, 17, 64, 70] {
            check::<f32>(Shape { m, n: 35, k: 128, r }, NF4, 0.0);
        }
        check::<f32>(Shape { m, n: 35, k: 128, r: 8 }, NF4, 0.5);
        check::<f32>(Shape { m, n: 35, k: 129, r: 8 }, NF4, 0.5);
    }
}

#[test]
fn few_sixteen_bit_rows_agree_with_float64_to_one_rounding() {
    for m in [1, 2, 3, 8, 16, 30] {
        for r in [0, 9] {
            let shape = Shape { m, n: 40, k: 320, r };
            check::<f16>(shape, Codec::Double(64), 0.0);
            check::<bf16>(shape, Codec::Double(64), 0.0);
        }
    }
}

#[test]
fn few_rows_of_unaligned_blocks_and_int8_agree_with_float64() {
    for m in [1, 2, 3, 8, 12] {
        check::<f32>(Shape { m, n: 34, k: 97, r: 3 }, Codec::Double(32), 0.0);
        check::<f32>(Shape { m, n: 34, k: 97, r: 3 }, Codec::Int8, 0.0);
    }
}

/// y of the case's first `m` rows.
fn first_rows(case: &Case<f32>, m: usize, exec: &Exec) -> Result<Vec<f32>, Error> {
    let Shape { n, k, .. } = case.shape;
    let mut y = vec![f32::NAN; m * n];
    let x = crate::dtype::Floats::F32(&case.x[..m * k]);
    let y_out = crate::dtype::FloatsMut::F32(&mut y);
    super::forward(exec, m, x, &case.stored.weight(n, k), None, case.lora().as_ref(), y_out, None)?;
    Ok(y)
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it_or_on_the_threads() -> Result<(), Error> {
    let shape = Shape { m: 30, n: 300, k: 320, r: 6 };
    let case = Case::<f32>::new(shape, NF4, 0.0);
    for isa in IsaKind::available() {
        let all = first_rows(&case, shape.m, &Exec { isa, threads: 1 })?;
        for m in 3..shape.m {
            for threads in [1, 2, 3] {
                let some = first_rows(&case, m, &Exec { isa, threads })?;
                assert!(some == all[..m * shape.n], "{} {m} {threads}", isa.name());
            }
        }
    }
    Ok(())
}

#[test]
fn a_row_that_is_not_finite_spoils_no_other() -> Result<(), Error> {
    let shape = Shape { m: 15, n: 20, k: 96, r: 0 };
    for m in [2, 3, 15] {
        let mut case = Case::<f32>::new(shape, Codec::Double(32), 0.0);
        case.x[shape.k..][..2].copy_from_slice(&[f32::INFINITY, f32::NAN]);
        for isa in IsaKind::available() {
            let y = first_rows(&case, m, &Exec { isa, threads: 1 })?;
            let spoilt: Vec<bool> = y.chunks(shape.n).map(|row| row.iter().any(|v| !v.is_finite())).collect();
            assert!(spoilt.iter().enumerate().all(|(row, spoilt)| *spoilt == (row == 1)), "{} {m}", isa.name());
        }
    }
    Ok(())
}
