//! The forward pass: checks, and the choice between few rows and many.

use super::lora::LowRank;
use super::weight::Weight;
use super::{bf16, few_rows, gemm, gemv};
use crate::Result;
use crate::dtype::{Element, Floats, FloatsMut, like_mut, with_floats};
use crate::error::{check_len, check_matrix};
use crate::exec::Exec;

/// Up to this many rows, a weight of whole blocks is multiplied with its rows along the vector lanes. Measured on a
/// core with AVX-512 and 2 MB of second-level cache, 1024² and 4096²: `gemm` takes 2.5 times as long at 8 rows, 1.6
/// at 16, 1.2 at 64 and 1.08 at 256; at 512 the two are equal.
const FEW_ROWS: usize = 256;

/// `y = x·deq(W)ᵀ + bias + scaling·S·Bᵀ`, `S = drop(x)·Aᵀ`.
///
/// `x [rows, K]`, `y [rows, N]` and `s [rows, r]` have one type; `bias [N]` may have another. `s`, if
/// given, receives S, which [`super::backward`] needs.
///
/// # Errors
/// [`crate::Error::Length`] naming the buffer that does not fit, [`crate::Error::Type`] if `y` or `s` has
/// another type than `x`.
pub fn forward(
    exec: &Exec,
    rows: usize,
    x: Floats<'_>,
    weight: &Weight<'_>,
    bias: Option<Floats<'_>>,
    lora: Option<&LowRank<'_>>,
    y: FloatsMut<'_>,
    s: Option<FloatsMut<'_>>,
) -> Result<()> {
    check_matrix("x", (rows, weight.in_features()), x.len())?;
    check_matrix("y", (rows, weight.out_features()), y.len())?;
    if let Some(bias) = bias {
        check_len("bias", weight.out_features(), bias.len())?;
    }
    if let Some(lora) = lora {
        lora.check(weight)?;
    }
    if let Some(s) = &s {
        check_matrix("s", (rows, lora.map_or(0, LowRank::rank)), s.len())?;
    }
    let bias = bias.map(|b| b.widened());
    let problem = Problem { rows, weight, bias: bias.as_deref(), lora };
    if let (Floats::Bf16(x), true) = (x, exec.isa.has_dots()) {
        let y = like_mut(x, "x", "y", y)?;
        let s = s.map(|s| like_mut(x, "x", "s", s)).transpose()?.unwrap_or_default();
        exec.isa.run_dots(bf16::Forward { exec, problem: &problem, x, y, s });
        return Ok(());
    }
    with_floats!(Floats, x, x => {
        let y = like_mut(x, "x", "y", y)?;
        let s = s.map(|s| like_mut(x, "x", "s", s)).transpose()?;
        typed(exec, &problem, x, y, s);
    });
    Ok(())
}

/// Everything of a forward call but the typed buffers.
pub(super) struct Problem<'a> {
    pub(super) rows: usize,
    pub(super) weight: &'a Weight<'a>,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) lora: Option<&'a LowRank<'a>>,
}

fn typed<E: Element>(exec: &Exec, problem: &Problem<'_>, x: &[E], y: &mut [E], s: Option<&mut [E]>) {
    if problem.rows == 0 {
        return;
    }
    match problem.weight.whole_blocks() {
        Some(packed) if (gemv::IN_REGISTERS + 1..=FEW_ROWS).contains(&problem.rows) => {
            few_rows::forward(exec, problem, packed, x, y, s);
        }
        _ if problem.rows <= gemv::MOST_ROWS => gemv::forward(exec, problem, x, y, s),
        _ => gemm::forward(exec, problem, x, y, s),
    }
}
