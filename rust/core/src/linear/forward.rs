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
    forward_group(exec, rows, x, vec![Sibling { weight, bias, lora, y, s }])
}

/// One of the linears that [`forward_group`] applies to x.
#[derive(Debug)]
pub struct Sibling<'a> {
    /// W `[N, K]`.
    pub weight: &'a Weight<'a>,
    /// `[N]`
    pub bias: Option<Floats<'a>>,
    /// The low-rank branch.
    pub lora: Option<&'a LowRank<'a>>,
    /// `[rows, N]`, overwritten.
    pub y: FloatsMut<'a>,
    /// `[rows, r]`, overwritten.
    pub s: Option<FloatsMut<'a>>,
}

impl Sibling<'_> {
    fn check(&self, rows: usize, x: Floats<'_>) -> Result<()> {
        check_matrix("x", (rows, self.weight.in_features()), x.len())?;
        check_matrix("y", (rows, self.weight.out_features()), self.y.len())?;
        if let Some(bias) = self.bias {
            check_len("bias", self.weight.out_features(), bias.len())?;
        }
        if let Some(lora) = self.lora {
            lora.check(rows, self.weight)?;
        }
        match &self.s {
            Some(s) => check_matrix("s", (rows, self.lora.map_or(0, LowRank::rank)), s.len()),
            None => Ok(()),
        }
    }
}

/// [`forward`] of several linears of one x, which is packed once where a kernel packs it. The results are those of
/// [`forward`], bit for bit.
///
/// # Errors
/// Those of [`forward`].
pub fn forward_group(exec: &Exec, rows: usize, x: Floats<'_>, siblings: Vec<Sibling<'_>>) -> Result<()> {
    for sibling in &siblings {
        sibling.check(rows, x)?;
    }
    let Some(cols) = siblings.first().map(|sibling| sibling.weight.in_features()) else { return Ok(()) };
    let biases: Vec<_> = siblings.iter().map(|sibling| sibling.bias.map(|bias| bias.widened())).collect();
    if let (Floats::Bf16(x), true) = (x, exec.isa.has_dots()) {
        let mut members = Vec::with_capacity(siblings.len());
        for (sibling, bias) in siblings.into_iter().zip(&biases) {
            let problem = Problem { rows, weight: sibling.weight, bias: bias.as_deref(), lora: sibling.lora };
            let y = like_mut(x, "x", "y", sibling.y)?;
            let s = sibling.s.map(|s| like_mut(x, "x", "s", s)).transpose()?.unwrap_or_default();
            members.push(bf16::ForwardMember { problem, y, s });
        }
        exec.isa.run_dots(bf16::Forward { exec, rows, cols, x, members });
        return Ok(());
    }
    with_floats!(Floats, x, x => {
        // Every type is checked before anything is written.
        let mut members = Vec::with_capacity(siblings.len());
        for (sibling, bias) in siblings.into_iter().zip(&biases) {
            let problem = Problem { rows, weight: sibling.weight, bias: bias.as_deref(), lora: sibling.lora };
            let y = like_mut(x, "x", "y", sibling.y)?;
            members.push((problem, y, sibling.s.map(|s| like_mut(x, "x", "s", s)).transpose()?));
        }
        for (problem, y, s) in members {
            typed(exec, &problem, x, y, s);
        }
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

impl Problem<'_> {
    /// Scalar operations of about the time that few rows take: a decoded value is about two, its multiply-add with a
    /// row of x a half.
    pub(super) fn operations(&self) -> usize {
        self.weight.out_features() * self.weight.in_features() * (2 + self.rows / 2)
    }
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
