//! `y = x·deq(W)ᵀ + bias + scaling·S·Bᵀ` with `S = drop(x)·Aᵀ`, and its backward, without ever holding
//! the dequantized weight: only a tile of it, per thread, in cache.
//!
//! Shapes: `x [M, K]`, `W [N, K]`, `y [M, N]`, `A [r, K]`, `B [N, r]`, `S [M, r]`; all row-major. Sums are
//! float32 in an order that the shapes alone fix.
//!
//! | file | what |
//! |---|---|
//! | `weight` | the packed weight as a matrix |
//! | `forward` | the checks, and the choice between few rows and many |
//! | `tile` | the register-blocked product of two panels, for every matrix product here |
//! | `panel` | copying and decoding into panels |
//! | `gemm` | forward for many rows |
//! | `few_rows` | forward for few rows of whole blocks |
//! | `gemv` | forward for one or two rows, and few rows of anything else |
//! | `low_rank_input` | `drop(x)·Aᵀ` for both |
//! | `backward` | the checks of backward |
//! | `input_gradient` | dX |
//! | `low_rank_output` | dS |
//! | `bf16` | all of it on bfloat16 activations, where the machine multiplies them directly |
//! | `low_rank_gradients` | dA and dB, by `reduce` |
//! | `reduce` | products that sum over rows |
//! | `row_scales` | the scales of one row, for few rows |
//! | `lora` | the low-rank branch's operands |
//! | `row_ranks` | which of stacked branches each row uses |
//! | `dropout` | the counter-based mask |
//! | `scratch` | buffers that threads keep between calls |

mod backward;
mod bf16;
pub mod dropout;
mod few_rows;
mod forward;
mod gemm;
mod gemv;
mod input_gradient;
mod lora;
mod low_rank_gradients;
mod low_rank_input;
mod low_rank_output;
mod panel;
mod reduce;
mod row_ranks;
mod row_scales;
mod scratch;
mod tile;
mod weight;

pub use backward::{Gradients, OutputGradient, backward, backward_group};
pub use forward::{Sibling, forward, forward_group};
pub use lora::{Dropout, LowRank};
pub use low_rank_gradients::LoraGradients;
pub use row_ranks::RowRanks;
pub use weight::Weight;

#[cfg(test)]
mod tests;
