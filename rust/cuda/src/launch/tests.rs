use super::{Given, Lent, Tensor, launch, marshal};
use crate::device::Device;
use crate::driver::{Context, Stream};
use crate::mock::{Call, Mock};
use crate::module::Modules;
use crate::plan::tests::linear;
use crate::plan::{Argument, Launch, Plan, plan};
use crate::problem::{Op, Problem, Type};

const CUBIN: &[u8] = b"\x7fELF and the rest";

fn planned(problem: &Problem) -> Launch {
    match plan(problem, Device::of(90, None).expect("known")).expect("a plan") {
        Plan::Kernel(launch) => launch,
        Plan::Library => panic!("{problem} is for the library"),
    }
}

/// What a caller that does everything right gives: the tensor of argument `i` lies at 4096 · (i + 1).
fn right(launch: &Launch, name: &str) -> Option<Given> {
    let (i, (_, argument)) = launch.named().enumerate().find(|(_, (known, _))| *known == name)?;
    match argument {
        Argument::Tensor { dtype, numel } => {
            Some(Given::Tensor(Tensor { address: 4096 * (i as u64 + 1), dtype: *dtype, numel: *numel }))
        }
        Argument::Number => Some(Given::Number(0.5)),
        _ => None,
    }
}

fn lent(launch: &Launch) -> Lent {
    Lent { scratch: (1 << 30, launch.scratch_bytes()), counters: (1 << 31, launch.counters()) }
}

#[test]
fn each_parameter_gets_its_own_bits_in_the_order_of_the_entry() {
    let problem = Problem { m: 1, n: 4096, k: 4096, rank: 16, nested: true, ..linear() };
    let launch = planned(&problem);
    assert_eq!(launch.row.entry, "gemv_4bit");
    assert!(launch.geometry.grid[2] > 1, "a split sum");
    let parameters = marshal(&launch, lent(&launch), |name| right(&launch, name)).expect("right");
    let at = |i: u64| 4096 * (i + 1);
    let (bias, half) = (0, u64::from(0.5_f32.to_bits()));
    let tensors = [at(0), at(1), at(2), at(3), at(4), bias, at(6), at(7), at(8)];
    assert_eq!(parameters[..9], tensors);
    assert_eq!(parameters[9..], [1 << 30, 1 << 31, 1, 4096, 4096, half]);
}

#[test]
fn scratch_parts_follow_each_other_at_multiples_of_16_bytes() {
    let problem = Problem { op: Op::LoraOutputGradients, m: 65, n: 72, k: 64, rank: 3, ..linear() };
    let launch = planned(&problem);
    let parameters = marshal(&launch, lent(&launch), |name| right(&launch, name)).expect("right");
    let [x, y, _] = launch.geometry.grid.map(u64::from);
    let first = (x * 65 * 3 * 4).next_multiple_of(16);
    assert_eq!(parameters[5..7], [1 << 30, (1 << 30) + first]);
    assert_eq!(launch.scratch_bytes(), first + (y * 72 * 3 * 4).next_multiple_of(16));
}

#[test]
fn a_tensor_that_is_not_what_the_plan_says_is_refused_by_name() {
    let launch = planned(&Problem { m: 1, n: 256, k: 256, ..linear() });
    let spoil = |change: fn(&mut Tensor)| {
        let given = |name: &str| match right(&launch, name) {
            Some(Given::Tensor(mut tensor)) if name == "codes" => {
                change(&mut tensor);
                Some(Given::Tensor(tensor))
            }
            other => other,
        };
        marshal(&launch, lent(&launch), given).expect_err("spoiled").to_string()
    };
    for message in [
        spoil(|tensor| tensor.numel -= 1),
        spoil(|tensor| tensor.dtype = Type::I8),
        spoil(|tensor| tensor.address += 8),
        spoil(|tensor| tensor.address = 0),
    ] {
        assert!(message.contains("gemv_4bit: codes must be a contiguous tensor of 32768 uint8"), "{message}");
    }
    let without = |name: &str| if name == "x" { None } else { right(&launch, name) };
    let missing = marshal(&launch, lent(&launch), without).expect_err("x is missing").to_string();
    assert!(missing.contains("x must be a contiguous tensor of 256 bfloat16") && missing.contains("None"), "{missing}");
}

#[test]
fn too_little_lent_memory_is_refused() {
    let launch = planned(&Problem { m: 1, n: 256, k: 4096, ..linear() });
    let whole = lent(&launch);
    for short in [
        Lent { scratch: (1 << 30, whole.scratch.1 - 1), ..whole },
        Lent { counters: (1 << 31, whole.counters.1 - 1), ..whole },
        Lent { scratch: (0, whole.scratch.1), ..whole },
    ] {
        assert!(marshal(&launch, short, |name| right(&launch, name)).is_err(), "{short:?}");
    }
}

#[test]
fn a_kernel_is_loaded_once_for_each_device_and_launched_in_its_context() {
    let launch_plan = planned(&Problem { m: 1, n: 4096, k: 4096, ..linear() });
    let (driver, modules) = (Mock::new(90, 132), Modules::default());
    let loaded = modules.load(&driver, 1, &launch_plan, CUBIN).expect("loads");
    assert_eq!(modules.load(&driver, 1, &launch_plan, CUBIN), Ok(loaded));
    assert_eq!(modules.find(1, &launch_plan), Some(loaded));
    assert_eq!(modules.find(0, &launch_plan), None);
    let calls = driver.take();
    assert_eq!(calls.iter().filter(|call| matches!(call, Call::Load(_))).count(), 1);
    assert_eq!((&calls[0], calls.last()), (&Call::Push(Context(101)), Some(&Call::Pop)));

    let parameters = marshal(&launch_plan, lent(&launch_plan), |name| right(&launch_plan, name)).expect("right");
    let given = |name: &str| right(&launch_plan, name);
    launch(&driver, loaded, &launch_plan, Stream(7), lent(&launch_plan), given).expect("launches");
    let noted = Call::Launch(loaded.kernel, launch_plan.geometry, Stream(7), parameters);
    assert_eq!(driver.take(), [Call::Push(Context(101)), noted, Call::Pop]);
}

#[test]
fn a_thread_that_is_in_the_right_context_stays_there() {
    use crate::driver::Driver;
    let launch_plan = planned(&Problem { m: 1, n: 256, k: 256, ..linear() });
    let (driver, modules) = (Mock::new(90, 132), Modules::default());
    driver.push_context(Context(100)).expect("enters");
    driver.take();
    modules.load(&driver, 0, &launch_plan, CUBIN).expect("loads");
    assert!(!driver.take().contains(&Call::Push(Context(100))));
}

#[test]
fn a_failed_launch_leaves_the_context_and_says_what_failed() {
    let launch_plan = planned(&Problem { m: 1, n: 256, k: 256, ..linear() });
    let (driver, modules) = (Mock::failing(90, 132), Modules::default());
    let loaded = modules.load(&driver, 0, &launch_plan, CUBIN).expect("loads");
    driver.take();
    let given = |name: &str| right(&launch_plan, name);
    let refused = launch(&driver, loaded, &launch_plan, Stream(0), lent(&launch_plan), given);
    let error = refused.expect_err("refused").to_string();
    assert!(error.contains("cuLaunchKernel failed with CUDA_ERROR_INVALID_VALUE (1)"), "{error}");
    assert_eq!(driver.take(), [Call::Push(Context(100)), Call::Pop]);
}

#[test]
fn what_is_no_cubin_is_not_handed_to_the_driver() {
    let launch_plan = planned(&Problem { m: 1, n: 256, k: 256, ..linear() });
    let driver = Mock::new(90, 132);
    assert!(Modules::default().load(&driver, 0, &launch_plan, b".version 8.0").is_err());
    assert_eq!(driver.take(), []);
}
