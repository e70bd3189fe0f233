//! The fused linear on bfloat16 activations, where the machine multiplies bfloat16 directly.
//!
//! The weight is decoded to bfloat16, as `dequantize` to that type does, and multiplied with float32 sums.
//! What the low-rank branch holds in float32 (A, B, S, dS) is split into a leading and a trailing bfloat16,
//! `v ≈ high + low` with a relative error of 2⁻¹⁷, so the branch loses nothing to the narrow type.
//!
//! | file | what |
//! |---|---|
//! | `operand` | slivers (left operands), panels (right operands), and how they are filled |
//! | `split` | float32 values as pairs of bfloat16 |
//! | `forward` | y and S |
//! | `backward` | dS and dX |
//! | `gradients` | dA and dB |

mod backward;
mod forward;
mod gradients;
mod low_rank_output;
mod operand;
mod split;
mod store;

pub(super) use backward::{Backward, Member as BackwardMember};
pub(super) use forward::{Forward, Member as ForwardMember};

#[cfg(test)]
pub(super) mod tests;
