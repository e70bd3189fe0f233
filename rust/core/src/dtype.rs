//! The three float types of activations and weights.

use std::borrow::Cow;

use half::slice::HalfFloatSliceExt;
pub use half::{bf16, f16};

use crate::simd::{Isa, LANES};
use crate::{Error, Result};

/// A float type that kernels read and write; arithmetic is always in float32.
pub trait Element: Copy + Default + Send + Sync + std::fmt::Debug + 'static {
    /// Exact widening.
    fn to_f32(self) -> f32;
    /// Round to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// Sixteen values widened to float32 lanes.
    fn load<I: Isa>(isa: I, src: &[Self; LANES]) -> I::F;
    /// Sixteen float32 lanes, each rounded once.
    fn store<I: Isa>(isa: I, value: I::F, dst: &mut [Self; LANES]);
    /// `out[i] = Self(table[nibble i of bytes] · scale)`, each product rounded as [`Element::store`] does, the
    /// high nibble of a byte first.
    fn lookup<I: Isa>(isa: I, table: I::Table, scale: f32, bytes: &[[u8; LANES]], out: &mut [[Self; 2 * LANES]]);
    /// Name of the type.
    const DTYPE: DType;
    /// The slice inside, if it is of this type.
    fn view(buffer: Floats<'_>) -> Option<&[Self]>;
    /// The slice inside, if it is of this type.
    fn view_mut(buffer: FloatsMut<'_>) -> Option<&mut [Self]>;
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn load<I: Isa>(isa: I, src: &[Self; LANES]) -> I::F {
        isa.load(src)
    }
    #[inline(always)]
    fn store<I: Isa>(isa: I, value: I::F, dst: &mut [Self; LANES]) {
        isa.store(value, dst);
    }
    #[inline(always)]
    fn lookup<I: Isa>(isa: I, table: I::Table, scale: f32, bytes: &[[u8; LANES]], out: &mut [[Self; 2 * LANES]]) {
        let table = isa.scale_table(table, scale);
        let (halves, lanes) = (bytes.as_flattened().as_chunks().0, out.as_flattened_mut().as_chunks_mut().0);
        for (eight, lanes) in halves.iter().zip(lanes) {
            isa.store(isa.lookup(table, isa.nibbles(eight)), lanes);
        }
    }
    const DTYPE: DType = DType::F32;
    fn view_mut(buffer: FloatsMut<'_>) -> Option<&mut [Self]> {
        match buffer {
            FloatsMut::F32(slice) => Some(slice),
            _ => None,
        }
    }
    fn view(buffer: Floats<'_>) -> Option<&[Self]> {
        match buffer {
            Floats::F32(slice) => Some(slice),
            _ => None,
        }
    }
}

impl Element for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    #[inline(always)]
    fn load<I: Isa>(isa: I, src: &[Self; LANES]) -> I::F {
        isa.load_f16(src)
    }
    #[inline(always)]
    fn store<I: Isa>(isa: I, value: I::F, dst: &mut [Self; LANES]) {
        isa.store_f16(value, dst);
    }
    #[inline(always)]
    fn lookup<I: Isa>(isa: I, table: I::Table, scale: f32, bytes: &[[u8; LANES]], out: &mut [[Self; 2 * LANES]]) {
        lookup16(isa, isa.table16_f16(table, scale), bytes, out.as_flattened_mut().reinterpret_cast_mut());
    }
    const DTYPE: DType = DType::F16;
    fn view_mut(buffer: FloatsMut<'_>) -> Option<&mut [Self]> {
        match buffer {
            FloatsMut::F16(slice) => Some(slice),
            _ => None,
        }
    }
    fn view(buffer: Floats<'_>) -> Option<&[Self]> {
        match buffer {
            Floats::F16(slice) => Some(slice),
            _ => None,
        }
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    #[inline(always)]
    fn load<I: Isa>(isa: I, src: &[Self; LANES]) -> I::F {
        isa.load_bf16(src)
    }
    #[inline(always)]
    fn store<I: Isa>(isa: I, value: I::F, dst: &mut [Self; LANES]) {
        isa.store_bf16(value, dst);
    }
    #[inline(always)]
    fn lookup<I: Isa>(isa: I, table: I::Table, scale: f32, bytes: &[[u8; LANES]], out: &mut [[Self; 2 * LANES]]) {
        lookup16(isa, isa.table16_bf16(table, scale), bytes, out.as_flattened_mut().reinterpret_cast_mut());
    }
    const DTYPE: DType = DType::Bf16;
    fn view_mut(buffer: FloatsMut<'_>) -> Option<&mut [Self]> {
        match buffer {
            FloatsMut::Bf16(slice) => Some(slice),
            _ => None,
        }
    }
    fn view(buffer: Floats<'_>) -> Option<&[Self]> {
        match buffer {
            Floats::Bf16(slice) => Some(slice),
            _ => None,
        }
    }
}

/// [`Element::lookup`] of the types of 16 bits, on their bits: looking up commutes with rounding, so the
/// table's entries are rounded, not every value.
#[inline(always)]
fn lookup16<I: Isa>(isa: I, table: I::Table16, bytes: &[[u8; LANES]], out: &mut [u16]) {
    for (sixteen, out) in bytes.iter().zip(out.as_chunks_mut().0) {
        isa.lookup32(table, sixteen, out);
    }
}

/// `dst[i] = f32(src[i])`.
///
/// # Panics
/// If the lengths differ.
#[inline(always)]
pub fn widen<I: Isa, E: Element>(isa: I, src: &[E], dst: &mut [f32]) {
    assert_eq!(src.len(), dst.len());
    let (src_body, src_tail) = src.as_chunks::<LANES>();
    let (dst_body, dst_tail) = dst.as_chunks_mut::<LANES>();
    for (s, d) in src_body.iter().zip(dst_body) {
        isa.store(E::load(isa, s), d);
    }
    for (s, d) in src_tail.iter().zip(dst_tail) {
        *d = s.to_f32();
    }
}

/// `dst[i] = E(src[i])`, each value rounded once.
///
/// # Panics
/// If the lengths differ.
#[inline(always)]
pub fn narrow<I: Isa, E: Element>(isa: I, src: &[f32], dst: &mut [E]) {
    assert_eq!(src.len(), dst.len());
    let (src_body, src_tail) = src.as_chunks::<LANES>();
    let (dst_body, dst_tail) = dst.as_chunks_mut::<LANES>();
    for (s, d) in src_body.iter().zip(dst_body) {
        E::store(isa, isa.load(s), d);
    }
    for (s, d) in src_tail.iter().zip(dst_tail) {
        *d = E::from_f32(*s);
    }
}

/// Name of a float type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DType {
    /// float32
    F32,
    /// float16
    F16,
    /// bfloat16
    Bf16,
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        })
    }
}

/// A borrowed float buffer of any of the three types.
#[derive(Debug, Clone, Copy)]
pub enum Floats<'a> {
    /// float32
    F32(&'a [f32]),
    /// float16
    F16(&'a [f16]),
    /// bfloat16
    Bf16(&'a [bf16]),
}

impl Floats<'_> {
    /// The type of the elements.
    #[must_use]
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::Bf16(_) => DType::Bf16,
        }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(s) => s.len(),
            Self::F16(s) => s.len(),
            Self::Bf16(s) => s.len(),
        }
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<'a> Floats<'a> {
    /// All values in float32; a float32 buffer is borrowed, not copied.
    #[must_use]
    pub fn widened(&self) -> Cow<'a, [f32]> {
        match *self {
            Self::F32(s) => Cow::Borrowed(s),
            Self::F16(s) => s.iter().map(|v| v.to_f32()).collect(),
            Self::Bf16(s) => s.iter().map(|v| v.to_f32()).collect(),
        }
    }
}

/// A borrowed, writable float buffer of any of the three types.
#[derive(Debug)]
pub enum FloatsMut<'a> {
    /// float32
    F32(&'a mut [f32]),
    /// float16
    F16(&'a mut [f16]),
    /// bfloat16
    Bf16(&'a mut [bf16]),
}

impl FloatsMut<'_> {
    /// The type of the elements.
    #[must_use]
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::Bf16(_) => DType::Bf16,
        }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(s) => s.len(),
            Self::F16(s) => s.len(),
            Self::Bf16(s) => s.len(),
        }
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The slice inside `buffer`, the argument `what`, which must have the type of `of`, the argument `named`.
///
/// # Errors
/// [`Error::Type`] if it has another.
pub(crate) fn like<'b, E: Element>(
    _of: &[E],
    named: &'static str,
    what: &'static str,
    buffer: Floats<'b>,
) -> Result<&'b [E]> {
    E::view(buffer).ok_or(Error::Type { what, of: named, expected: E::DTYPE, got: buffer.dtype() })
}

/// [`like`], writable.
///
/// # Errors
/// [`Error::Type`] if it has another.
pub(crate) fn like_mut<'b, E: Element>(
    _of: &[E],
    named: &'static str,
    what: &'static str,
    buffer: FloatsMut<'b>,
) -> Result<&'b mut [E]> {
    let got = buffer.dtype();
    E::view_mut(buffer).ok_or(Error::Type { what, of: named, expected: E::DTYPE, got })
}

/// Binds `$slice` to the typed slice inside a [`Floats`] or [`FloatsMut`] and evaluates `$body` for its type.
macro_rules! with_floats {
    ($kind:ident, $value:expr, $slice:ident => $body:expr) => {
        match $value {
            $crate::dtype::$kind::F32($slice) => $body,
            $crate::dtype::$kind::F16($slice) => $body,
            $crate::dtype::$kind::Bf16($slice) => $body,
        }
    };
}
pub(crate) use with_floats;
