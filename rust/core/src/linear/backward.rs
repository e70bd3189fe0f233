//! The backward pass: checks, and the choice of the kernel.
//!
//! ```text
//! dS = scaling · dY·B          dX = dY·deq(W) + mask ⊙ (dS·A)
//! dB = scaling · dYᵀ·S         dA = dSᵀ·(mask ⊙ x)
//! ```
//!
//! A group of linears that share x has one dX, the sum of theirs.

use super::bf16;
use super::input_gradient::{Backward, Member};
use super::low_rank_gradients::{LoraGradients, TypedGradients};
use super::weight::Weight;
use crate::Result;
use crate::dtype::{Element, Floats, FloatsMut, like, like_mut, with_floats};
use crate::error::{check_len, check_matrix};
use crate::exec::Exec;

/// What backward writes; what is `None` is not computed.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// dX `[M, K]`, in the type of dY.
    pub dx: Option<FloatsMut<'a>>,
    /// The low-rank branch's.
    pub lora: Option<LoraGradients<'a>>,
}

/// Computes what `gradients` asks for from `dy [rows, N]`.
///
/// # Errors
/// [`crate::Error::Length`] naming the buffer that does not fit, [`crate::Error::Type`] if x, S or dX has another type
/// than dY.
pub fn backward(exec: &Exec, rows: usize, dy: Floats<'_>, weight: &Weight<'_>, gradients: Gradients<'_>) -> Result<()> {
    let Gradients { dx, lora } = gradients;
    backward_group(exec, rows, vec![OutputGradient { dy, weight, lora }], dx)
}

/// The gradient of one output of a group.
#[derive(Debug)]
pub struct OutputGradient<'a> {
    /// dY `[M, N]`.
    pub dy: Floats<'a>,
    /// W `[N, K]`.
    pub weight: &'a Weight<'a>,
    /// What is asked for of the low-rank branch; it takes part in dX.
    pub lora: Option<LoraGradients<'a>>,
}

/// [`backward`] of [`super::forward_group`]: dX is the sum over the outputs, summed in float32 and rounded once.
///
/// # Errors
/// Those of [`backward`]; the dY of all have one type.
pub fn backward_group(
    exec: &Exec,
    rows: usize,
    outputs: Vec<OutputGradient<'_>>,
    dx: Option<FloatsMut<'_>>,
) -> Result<()> {
    let Some(first) = outputs.first() else { return Ok(()) };
    let (lead, cols) = (first.dy, first.weight.in_features());
    if let Some(dx) = &dx {
        check_matrix("dx", (rows, cols), dx.len())?;
    }
    for OutputGradient { dy, weight, lora } in &outputs {
        check_matrix("dy", (rows, weight.out_features()), dy.len())?;
        check_len("in_features of a group", cols, weight.in_features())?;
        if let Some(branch) = lora {
            branch.check(rows, weight)?;
        }
    }
    if let (Floats::Bf16(lead), true) = (lead, exec.isa.has_dots()) {
        let dx = dx.map(|dx| like_mut(lead, "dy", "dx", dx)).transpose()?.unwrap_or_default();
        let mut members = Vec::with_capacity(outputs.len());
        for OutputGradient { dy, weight, lora } in outputs {
            let (dy, branch) = typed(lead, dy, lora)?;
            members.push(bf16::BackwardMember { dy, weight, branch });
        }
        exec.isa.run_dots(bf16::Backward { exec, rows, cols, members, dx });
        return Ok(());
    }
    with_floats!(Floats, lead, lead => {
        let dx = dx.map(|dx| like_mut(lead, "dy", "dx", dx)).transpose()?.unwrap_or_default();
        let mut members = Vec::with_capacity(outputs.len());
        for OutputGradient { dy, weight, lora } in outputs {
            let (dy, branch) = typed(lead, dy, lora)?;
            members.push(Member { dy, weight, branch });
        }
        exec.isa.run(Backward { exec, rows, cols, members, dx });
    });
    Ok(())
}

/// dY and the branch's buffers in the type of `lead`, the group's first dY.
fn typed<'a, E: Element>(
    lead: &[E],
    dy: Floats<'a>,
    lora: Option<LoraGradients<'a>>,
) -> Result<(&'a [E], Option<TypedGradients<'a, E>>)> {
    Ok((like(lead, "dy", "dy of another output", dy)?, lora.map(|branch| branch.typed(lead)).transpose()?))
}
