//! The instruction sets behind one trait of primitives.
//!
//! Algorithms are written once over [`Isa`], with sixteen logical float32 lanes on every machine:
//! one AVX-512 register, two AVX2 registers, or an array. Because the lane structure is the same
//! everywhere and every multiply-add is fused everywhere, all instruction sets give the same bits.
//!
//! A value of a type that implements [`Isa`] is the proof that this machine has the instructions:
//! only the type's `detect` makes one.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod dots;
mod scalar;
mod stream;

use std::fmt::Debug;
use std::sync::OnceLock;

use half::{bf16, f16};

pub(crate) use stream::{exceeds_caches, fill};

use self::dots::Dots;
use crate::{Error, Result};

/// Logical float32 lanes of [`Isa::F`], on every instruction set.
pub const LANES: usize = 16;

/// Primitives on sixteen lanes. Every method is inlined into the closure given to [`Isa::vectorize`].
pub trait Isa: Copy + Send + Sync + Debug + 'static {
    /// Sixteen float32.
    type F: Copy;
    /// Sixteen int32.
    type I: Copy;
    /// A table of sixteen 32-bit entries, held in registers.
    type Table: Copy;
    /// A table of sixteen 16-bit entries, held in registers.
    type Table16: Copy;

    /// Whether there are 32 vector registers of 16 lanes, which decides the size of the GEMM tile.
    const WIDE: bool;

    /// Runs `work` with the instruction set enabled in the code generator.
    fn vectorize<R>(self, work: impl FnOnce() -> R) -> R;

    /// All lanes `value`.
    fn splat(self, value: f32) -> Self::F;
    /// Sixteen float32.
    fn load(self, src: &[f32; LANES]) -> Self::F;
    /// Sixteen float32.
    fn store(self, value: Self::F, dst: &mut [f32; LANES]);
    /// Sixteen float16, widened.
    fn load_f16(self, src: &[f16; LANES]) -> Self::F;
    /// Rounded to nearest, ties to even.
    fn store_f16(self, value: Self::F, dst: &mut [f16; LANES]);
    /// Sixteen bfloat16, widened.
    fn load_bf16(self, src: &[bf16; LANES]) -> Self::F;
    /// Rounded to nearest, ties to even; NaN stays NaN.
    fn store_bf16(self, value: Self::F, dst: &mut [bf16; LANES]);
    /// Sixteen int8, as float32.
    fn load_i8(self, src: &[i8; LANES]) -> Self::F;

    /// `a + b`
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a · b`
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `|a|`
    fn abs(self, a: Self::F) -> Self::F;
    /// Sum of the lanes, by halving: lane i with lane i+8, then i+4, i+2, i+1.
    fn reduce_sum(self, a: Self::F) -> f32;

    /// All lanes 0.
    fn zero_i(self) -> Self::I;
    /// `a | b`
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    /// The lanes' bits.
    fn to_bits(self, a: Self::F) -> Self::I;
    /// `bit` in lanes where `a > b`, else 0.
    fn gt_bit(self, a: Self::F, b: Self::F, bit: i32) -> Self::I;
    /// Lane-wise maximum of `acc` and the bits of `|a|`. Bits of magnitudes order as the magnitudes
    /// do, infinity above every finite number and NaN above infinity.
    fn max_abs_bits(self, acc: Self::I, a: Self::F) -> Self::I;
    /// The largest lane.
    fn reduce_max(self, a: Self::I) -> i32;

    /// Loads a table.
    fn table(self, entries: &[f32; LANES]) -> Self::Table;
    /// Every entry times `scale`.
    fn scale_table(self, table: Self::Table, scale: f32) -> Self::Table;
    /// `table[index mod 16]` per lane.
    fn lookup(self, table: Self::Table, index: Self::I) -> Self::F;
    /// The sixteen nibbles of eight bytes in storage order (high nibble first). Bits above the lowest
    /// four of a lane are undefined.
    fn nibbles(self, src: &[u8; 8]) -> Self::I;
    /// The high nibbles of sixteen bytes, and the low ones. Bits above the lowest four are undefined.
    fn nibbles_split(self, src: &[u8; LANES]) -> (Self::I, Self::I);

    /// All lanes `value`.
    fn splat_i(self, value: i32) -> Self::I;

    /// Asks for the cache lines of `src`, which will be read soon.
    fn prefetch<T>(self, src: &[T]);
    /// Sixteen little-endian 32-bit words.
    fn load_words(self, src: &[u8; 4 * LANES]) -> Self::I;
    /// Four words of each of sixteen rows that begin `stride` bytes apart: word j of row i becomes lane i of
    /// vector j.
    ///
    /// # Panics
    /// If `src` ends before the sixteenth row's four words.
    fn load_word_columns(self, src: &[u8], stride: usize) -> [Self::I; 4];
    /// The eight nibbles of each word in storage order (high nibble of the first byte first). Bits above the
    /// lowest four of a lane are undefined.
    fn word_nibbles(self, words: Self::I) -> [Self::I; 8];

    /// Sixteen pairs of bfloat16, each pair the bits of a lane: the first of it the low half.
    fn load_pairs(self, src: &[bf16; 2 * LANES]) -> Self::F;
    /// The inverse of [`Isa::load_pairs`].
    fn store_pairs(self, value: Self::F, dst: &mut [bf16; 2 * LANES]);
    /// The pairs `(a[i], b[i])`.
    fn zip_pairs(self, a: &[bf16; LANES], b: &[bf16; LANES]) -> Self::F;
    /// Lane j of row i becomes lane i of row j.
    fn transpose(self, rows: [Self::F; LANES]) -> [Self::F; LANES];

    /// Every entry times `scale`, rounded as [`Isa::store_bf16`] does.
    fn table16_bf16(self, table: Self::Table, scale: f32) -> Self::Table16;
    /// Every entry times `scale`, rounded as [`Isa::store_f16`] does.
    fn table16_f16(self, table: Self::Table, scale: f32) -> Self::Table16;
    /// `dst[i] = table[nibble i]` for the nibbles of sixteen bytes in storage order (high nibble first).
    fn lookup32(self, table: Self::Table16, src: &[u8; LANES], dst: &mut [u16; 2 * LANES]);

    /// `a + b`, wrapping.
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// The bits moved down by `N`, zeros above.
    fn shift_right<const N: u32>(self, a: Self::I) -> Self::I;
    /// The nearest integer, ties to the even one. NaN and what no int32 holds give an unspecified one.
    fn round(self, a: Self::F) -> Self::I;
    /// The lowest byte of each lane.
    fn low_bytes(self, a: Self::I) -> [u8; LANES];
    /// Sixteen bytes, zero-extended.
    fn load_u8(self, src: &[u8; LANES]) -> Self::I;
    /// `table[index mod N]` per lane; `N` is a power of two.
    fn gather<const N: usize>(self, table: &[f32; N], index: Self::I) -> Self::F;
    /// [`Isa::lookup`] in a table of thirty-two entries: `index mod 32`.
    fn lookup_wide(self, table: [Self::Table; 2], index: Self::I) -> Self::F;
    /// Packs sixty-four codes below 16 into bytes, the high nibble first: the inverse of [`Isa::nibbles`].
    fn store_nibbles(self, codes: [Self::I; 4], dst: &mut [u8; 2 * LANES]);
    /// Copies a cache line past the caches.
    ///
    /// # Safety
    /// `src` is 64 readable bytes and `dst` 64 writable ones, a multiple of 64. [`Isa::fence`] is called
    /// before another thread can read them.
    #[allow(unsafe_code)]
    unsafe fn stream_line(self, src: *const u8, dst: *mut u8);
    /// Makes lines written by [`Isa::stream_line`] visible to other threads before anything written later.
    fn fence(self);
}

/// What leaves the remainder by `N`, a power of two, of an index.
#[cfg(target_arch = "x86_64")]
const fn mask<const N: usize>() -> i32 {
    const { assert!(N.is_power_of_two() && N <= 1 << 30) };
    (N as u32).cast_signed() - 1
}

/// Work that is generic over the instruction set: a struct of its inputs with one `eval`.
pub trait Op {
    /// What `eval` returns.
    type Output;
    /// Does the work with `isa`. The instructions are enabled inside [`Isa::vectorize`] only.
    fn eval<I: Isa>(self, isa: I) -> Self::Output;
}

/// Work on bfloat16 that is generic over the instructions for it.
pub(crate) trait DotsOp {
    /// Does the work with `dots`.
    fn eval<D: Dots>(self, dots: D);
}

/// An instruction set that this machine was found to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IsaKind {
    /// Plain Rust, any machine.
    Scalar(scalar::Scalar),
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    /// AVX-512 F, BW, DQ and VL, beside what AVX2 asks for.
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
    /// AMX with bfloat16, beside what AVX-512 asks for.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(amx::Amx),
}

impl IsaKind {
    /// Every instruction set of this machine for float32 arithmetic, the plainest first. All give the same bits.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut found = vec![Self::Scalar(scalar::Scalar)];
        #[cfg(target_arch = "x86_64")]
        {
            found.extend(avx2::Avx2::detect().map(Self::Avx2));
            found.extend(avx512::Avx512::detect().map(Self::Avx512));
        }
        found
    }

    /// [`IsaKind::available`], and after them those that also multiply bfloat16 matrices, which give other
    /// roundings there and the same bits in everything else.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let mut found = Self::available();
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        found.extend(amx::Amx::detect().map(Self::Amx));
        found
    }

    /// `"scalar"`, `"avx2"`, `"avx512"` or `"amx"`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar(_) => "scalar",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512",
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(_) => "amx",
        }
    }

    /// The last of [`IsaKind::all`], or the one that the environment variable `FERROLORA_ISA`
    /// names. Looked up once per process.
    ///
    /// # Errors
    /// [`Error::Unknown`] if the variable names no instruction set of this machine.
    pub fn detect() -> Result<Self> {
        static CHOSEN: OnceLock<Result<IsaKind>> = OnceLock::new();
        CHOSEN
            .get_or_init(|| {
                let forced = std::env::var_os("FERROLORA_ISA");
                Self::choose(forced.as_ref().map(|name| name.to_string_lossy()).as_deref())
            })
            .clone()
    }

    fn choose(forced: Option<&str>) -> Result<Self> {
        let available = Self::all();
        match forced {
            None | Some("") => Ok(available[available.len() - 1]),
            Some(name) => available.iter().copied().find(|kind| kind.name() == name).ok_or_else(|| Error::Unknown {
                what: "FERROLORA_ISA",
                allowed: "the instruction sets of this machine (scalar, and where present avx2, avx512, amx)",
                got: name.to_owned(),
            }),
        }
    }

    /// Evaluates `op` on this instruction set.
    pub fn run<O: Op>(self, op: O) -> O::Output {
        match self {
            Self::Scalar(isa) => op.eval(isa),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(isa) => op.eval(isa),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(isa) => op.eval(isa),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(amx) => op.eval(amx.base()),
        }
    }

    /// Whether it has instructions for bfloat16 products.
    pub(crate) fn has_dots(self) -> bool {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        return matches!(self, Self::Amx(_));
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        false
    }

    /// Evaluates `op` with the instructions for bfloat16 products.
    ///
    /// # Panics
    /// Unless [`IsaKind::has_dots`].
    pub(crate) fn run_dots<O: DotsOp>(self, op: O) {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(amx) => op.eval(amx),
            _ => unreachable!("{} has no bfloat16 products", self.name()),
        }
    }
}

#[cfg(test)]
mod tests;
