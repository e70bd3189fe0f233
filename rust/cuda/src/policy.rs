//! Which way wins where: a fused product reads the weight once, in 4 bits; for many rows cuBLAS on a decoded weight is
//! faster although it is read three times.

use crate::device::Device;
use crate::ops::{gemm, gemv, lora};
use crate::problem::{Op, Problem};

/// Architecture and the most rows for which the fused product is taken.
///
/// From crossovers that others measured: H100 16-64, A100 16-128, T4 32-128, A10 16-128, 4090 and `sm_120` 64-256, B200 32.
/// `ferrolora bench --tune` measures them on the card at hand.
const FUSED_ROWS: [(u32, u64); 11] = [
    (75, 64),
    (80, 64),
    (86, 64),
    (87, 64),
    (89, 128),
    (90, 32),
    (100, 32),
    (103, 32),
    (110, 32),
    (120, 128),
    (121, 128),
];

/// The most rows for which plain multiply-adds beat decoding first: above, the weight's bytes no longer bound them.
const FMA_ROWS: u64 = 16;

/// The most rows for which the fused product is taken on a device.
#[must_use]
pub fn fused_rows(device: Device) -> u64 {
    FUSED_ROWS.iter().find(|(sm, _)| *sm == device.sm).map_or(FMA_ROWS, |(_, rows)| *rows)
}

/// Whether a product goes through a decoded weight and cuBLAS.
pub(crate) fn library(problem: &Problem, device: Device) -> bool {
    let fused = problem.fused_rows.unwrap_or_else(|| fused_rows(device));
    match problem.op {
        Op::Linear => {
            let tensor_cores = gemv::takes(problem, device).is_ok() || gemm::takes_forward(problem, device).is_ok();
            problem.m > if tensor_cores { fused } else { FMA_ROWS }
        }
        Op::LinearBackward => {
            let tensor_cores = gemm::takes_backward(problem, device).is_ok();
            problem.m > if tensor_cores { fused } else { FMA_ROWS } && branch_is_separable(problem, device)
        }
        _ => false,
    }
}

/// Whether the branch's part of dX can be added after the product: dropout needs a kernel that draws the mask again.
fn branch_is_separable(problem: &Problem, device: Device) -> bool {
    problem.rank == 0 || problem.dropout_p == 0.0 || lora::takes_add(problem, device).is_ok()
}
