use proptest::prelude::*;

use super::{Argument, Plan, plan};
use crate::device::{ARCHITECTURES, Device};
use crate::problem::{Codec, Op, Problem, Type};
use crate::{Error, policy};

/// A forward product of one row, bfloat16, nf4 in blocks of 64.
pub fn linear() -> Problem {
    Problem {
        op: Op::Linear,
        dtype: Type::Bf16,
        codec: Codec::Nf4,
        block_size: 64,
        nested: false,
        m: 1,
        n: 256,
        k: 256,
        rank: 0,
        lora_dtype: Type::F32,
        bias_dtype: None,
        dropout_p: 0.0,
        exact: false,
        kernel: None,
        fused_rows: None,
    }
}

fn device(sm: u32) -> Device {
    Device::of(sm, None).expect("known")
}

/// Entry of the kernel, or "library".
fn chosen(problem: &Problem, sm: u32) -> &'static str {
    match plan(problem, device(sm)).expect("a plan") {
        Plan::Kernel(launch) => launch.row.entry,
        Plan::Library => "library",
    }
}

fn any_problem() -> impl Strategy<Value = Problem> {
    let float = || prop_oneof![Just(Type::F32), Just(Type::F16), Just(Type::Bf16)];
    let size = || prop_oneof![1..300_u64, (1..400_u64).prop_map(|v| 64 * v), (1..1_u64 << 22)];
    let what = (proptest::sample::select(Op::ALL), float(), float(), proptest::option::of(float()));
    let stored = (proptest::sample::select(Codec::ALL), (5..=12_u32).prop_map(|log| 1_u64 << log), any::<bool>());
    let shape = (size(), size(), size(), 1..600_u64);
    let rest = (prop_oneof![Just(0.0_f32), 0.0_f32..0.99], any::<bool>());
    (what, stored, shape, rest).prop_map(|(what, stored, (m, n, k, rank), (dropout_p, exact))| Problem {
        op: what.0,
        dtype: what.1,
        lora_dtype: what.2,
        bias_dtype: what.3,
        codec: stored.0,
        block_size: stored.1,
        nested: stored.2 && stored.0 != Codec::Int8,
        m,
        n,
        k,
        rank,
        dropout_p,
        exact,
        ..linear()
    })
}

fn any_device() -> impl Strategy<Value = Device> {
    let sm_count = 1..300_u32;
    (0..ARCHITECTURES.len(), sm_count).prop_map(|(i, count)| Device { sm_count: count, ..device(ARCHITECTURES[i].sm) })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn a_plan_fits_the_device_or_is_refused_with_a_reason(problem in any_problem(), device in any_device()) {
        match plan(&problem, device) {
            Ok(Plan::Library) => {}
            Ok(Plan::Kernel(launch)) => {
                let geometry = launch.geometry;
                prop_assert!(geometry.grid.iter().all(|blocks| *blocks > 0));
                prop_assert!(geometry.grid[0] <= i32::MAX.unsigned_abs());
                prop_assert!(geometry.grid[1] <= 65_535 && geometry.grid[2] <= 65_535);
                prop_assert!(geometry.block[0] <= 1024 && geometry.block[0] % 32 == 0);
                prop_assert!(geometry.shared <= device.shared_per_block);
                prop_assert_eq!(launch.arguments.len(), launch.row.parameters.len());
                prop_assert_eq!(launch.constants.len(), launch.row.constants.len());
            }
            Err(Error::Refused { reason, .. }) => prop_assert!(!reason.is_empty()),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    #[test]
    fn the_blocks_of_a_product_cover_its_output(problem in any_problem(), device in any_device()) {
        let problem = Problem { op: Op::Linear, kernel: Some("gemm_4bit".to_owned()), ..problem };
        if let Ok(Plan::Kernel(launch)) = plan(&problem, device) {
            let constant = |wanted: &str| -> u64 {
                let (_, value) = launch.constants.iter().find(|(name, _)| *name == wanted).expect("set");
                value.parse().expect("a number")
            };
            let [across, down, splits] = launch.geometry.grid.map(u64::from);
            prop_assert!(across * constant("FL_TILE_N") >= problem.n && down * constant("FL_TILE_M") >= problem.m);
            prop_assert!((across - 1) * constant("FL_TILE_N") < problem.n);
            prop_assert!(splits <= problem.k / 64, "a part of the depth is empty");
            prop_assert_eq!(constant("FL_TILE_M") / constant("FL_WARPS_M") % 16, 0);
            prop_assert_eq!(constant("FL_TILE_N") / constant("FL_WARPS_N") % 16, 0);
            prop_assert_eq!(u64::from(launch.geometry.block[0]), 32 * constant("FL_WARPS_M") * constant("FL_WARPS_N"));
        }
    }

    #[test]
    fn every_linear_has_a_plan(problem in any_problem(), device in any_device()) {
        for op in [Op::Linear, Op::LinearBackward] {
            let planned = plan(&Problem { op, m: problem.m.min(1 << 20), ..problem.clone() }, device);
            prop_assert!(planned.is_ok(), "{:?}", planned);
        }
    }
}

#[test]
fn few_rows_are_fused_and_many_go_through_the_library() {
    let at = |m, sm| chosen(&Problem { m, n: 4096, k: 4096, ..linear() }, sm);
    for row in ARCHITECTURES.iter().filter(|row| row.sm >= 80) {
        let crossover = policy::fused_rows(device(row.sm));
        assert_eq!(at(1, row.sm), "gemv_4bit");
        assert_eq!(at(8, row.sm), "gemv_4bit");
        assert_eq!(at(9, row.sm), "gemm_4bit");
        assert_eq!(at(crossover, row.sm), "gemm_4bit");
        assert_eq!(at(crossover + 1, row.sm), "library");
    }
}

#[test]
fn a_measured_crossover_replaces_the_tables() {
    let problem = Problem { m: 100, n: 4096, k: 4096, ..linear() };
    assert_eq!(chosen(&problem, 90), "library");
    assert_eq!(chosen(&Problem { fused_rows: Some(100), ..problem }, 90), "gemm_4bit");
}

#[test]
fn what_the_tensor_cores_do_not_take_goes_to_plain_multiply_adds() {
    let small = Problem { m: 4, ..linear() };
    assert_eq!(chosen(&small, 75), "fma_forward"); // no bfloat16 tensor core
    assert_eq!(chosen(&Problem { dtype: Type::F16, ..small.clone() }, 75), "gemv_4bit");
    assert_eq!(chosen(&Problem { dtype: Type::F32, ..small.clone() }, 90), "fma_forward");
    assert_eq!(chosen(&Problem { k: 96, ..small.clone() }, 90), "fma_forward");
    assert_eq!(chosen(&Problem { codec: Codec::Int8, ..small.clone() }, 90), "fma_forward");
    assert_eq!(chosen(&Problem { codec: Codec::Int8, m: 64, ..small }, 90), "library");
}

#[test]
fn a_mask_that_only_plain_multiply_adds_can_draw_keeps_the_backward_fused() {
    let odd = Problem { op: Op::LinearBackward, m: 500, n: 255, rank: 4, dropout_p: 0.1, ..linear() };
    assert_eq!(chosen(&odd, 75), "fma_backward"); // no bfloat16 tensor core
    assert_eq!(chosen(&odd, 90), "library");
    assert_eq!(chosen(&Problem { dropout_p: 0.0, ..odd }, 75), "library");
}

#[test]
fn a_wanted_kernel_is_taken_or_refused_with_its_reason() {
    let wanted = |kernel: &str| Problem { m: 20, kernel: Some(kernel.to_owned()), ..linear() };
    assert_eq!(chosen(&wanted("fma_forward"), 90), "fma_forward");
    assert_eq!(chosen(&wanted("library"), 90), "library");
    let refused = |kernel| plan(&wanted(kernel), device(90)).expect_err("refused").to_string();
    assert!(refused("gemv_4bit").contains("m must be at most 8, not 20"), "{}", refused("gemv_4bit"));
    assert!(refused("absmax_mean").contains("solved by gemv_4bit, gemm_4bit, fma_forward only"));
}

#[test]
fn arguments_that_a_problem_does_not_have_are_null() {
    let problem = Problem { m: 20, n: 4096, k: 4096, ..linear() };
    let Plan::Kernel(launch) = plan(&problem, device(89)).expect("a plan") else { panic!("fused on this card") };
    let get = |wanted: &str| launch.named().find(|(name, _)| *name == wanted).expect("there").1.clone();
    for name in ["nested", "offset", "bias", "s", "b", "scaling"] {
        assert_eq!(get(name), Argument::Fixed(0), "{name}");
    }
    assert_eq!(get("codes"), Argument::Tensor { dtype: Type::U8, numel: 4096 * 4096 / 2 });
    assert_eq!(get("absmax"), Argument::Tensor { dtype: Type::F32, numel: 4096 * 64 });
}

#[test]
fn a_value_outside_its_range_is_named() {
    let message = |problem: Problem| plan(&problem, device(90)).expect_err("refused").to_string();
    assert!(message(Problem { block_size: 48, ..linear() }).contains("block_size must be one of 32, 64"));
    assert!(
        message(Problem { dropout_p: 1.0, ..linear() }).contains("dropout_p must be one of at least 0 and below 1")
    );
    assert!(message(Problem { n: 0, ..linear() }).contains("n must be one of between 1 and 2^40, got 0"));
    assert!(message(Problem { m: 1 << 30, n: 1 << 30, ..linear() }).contains("smaller than 2^48 elements"));
}

#[test]
fn every_kernel_of_the_table_solves_some_operator() {
    for row in &crate::kernels::TABLE {
        let solves = |op: Op| {
            let codec = if row.entry.contains("int8") { Codec::Int8 } else { Codec::Nf4 };
            let problem = Problem { op, codec, rank: 8, kernel: Some(row.entry.to_owned()), ..linear() };
            plan(&problem, device(90)).is_ok()
        };
        assert!(Op::ALL.iter().any(|op| solves(*op)), "{}", row.entry);
    }
}
