//! Products of bfloat16 matrices with float32 sums, by instructions made for them.
//!
//! Such an instruction multiplies pairs of neighbours in depth, so operands lie in pairs: the left one is
//! row-major, and the right one, a panel, has one row a pair of depth, `[depth / 2, width, 2]`.

use half::bf16;

use super::Isa;

/// Rows of the left operand at a time, and columns of a full panel.
pub const SIDE: usize = 32;

/// Depth that one instruction takes; both operands are padded to it with zeros.
pub const STEP: usize = 32;

/// Pairs in a step.
pub const PAIRS: usize = STEP / 2;

/// Instructions that multiply bfloat16 and sum in float32. Products are exact, sums are rounded in an order
/// that the shapes alone fix; subnormal numbers count as zero.
pub trait Dots: Copy + Send + Sync + 'static {
    /// The instruction set for everything else.
    type Base: Isa;

    /// The instruction set for everything else.
    fn base(self) -> Self::Base;

    /// Runs `work` with the registers of [`Dots::multiply`] set up on this thread.
    fn prepared<R>(self, work: impl FnOnce() -> R) -> R;

    /// `left · panel` into `acc`, `[SIDE, width]` row-major, or added to it if `add`; `width` is [`SIDE`] or half
    /// of it.
    ///
    /// `left` has [`SIDE`] rows of stride `stride`, of which the leading part of the panel's depth counts.
    /// Only inside [`Dots::prepared`].
    fn multiply(self, left: &[bf16], stride: usize, panel: &[bf16], width: usize, acc: &mut [f32], add: bool);
}
