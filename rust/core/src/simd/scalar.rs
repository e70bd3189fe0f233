//! Plain Rust: the instruction set of every machine, and the meaning of each primitive.

use std::array::from_fn;

use half::{bf16, f16};

use super::stream::LINE;
use super::{Isa, LANES};

/// Where the nibbles of a little-endian word lie, in storage order.
const NIBBLE_SHIFTS: [u32; 8] = [4, 0, 12, 8, 20, 16, 28, 24];

/// No special instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scalar;

impl Isa for Scalar {
    type F = [f32; LANES];
    type I = [i32; LANES];
    type Table = [f32; LANES];
    type Table16 = [u16; LANES];

    const WIDE: bool = false;

    #[inline(always)]
    fn vectorize<R>(self, work: impl FnOnce() -> R) -> R {
        work()
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [value; LANES]
    }
    #[inline(always)]
    fn load(self, src: &[f32; LANES]) -> Self::F {
        *src
    }
    #[inline(always)]
    fn store(self, value: Self::F, dst: &mut [f32; LANES]) {
        *dst = value;
    }
    #[inline(always)]
    fn load_f16(self, src: &[f16; LANES]) -> Self::F {
        src.map(f16::to_f32)
    }
    #[inline(always)]
    fn store_f16(self, value: Self::F, dst: &mut [f16; LANES]) {
        *dst = value.map(f16::from_f32);
    }
    #[inline(always)]
    fn load_bf16(self, src: &[bf16; LANES]) -> Self::F {
        src.map(bf16::to_f32)
    }
    #[inline(always)]
    fn store_bf16(self, value: Self::F, dst: &mut [bf16; LANES]) {
        *dst = value.map(bf16::from_f32);
    }
    #[inline(always)]
    fn load_i8(self, src: &[i8; LANES]) -> Self::F {
        src.map(f32::from)
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        a.map(f32::abs)
    }
    #[inline(always)]
    fn reduce_sum(self, a: Self::F) -> f32 {
        let b: [f32; 8] = from_fn(|i| a[i] + a[i + 8]);
        let c: [f32; 4] = from_fn(|i| b[i] + b[i + 4]);
        (c[0] + c[2]) + (c[1] + c[3])
    }

    #[inline(always)]
    fn zero_i(self) -> Self::I {
        [0; LANES]
    }
    #[inline(always)]
    fn splat_i(self, value: i32) -> Self::I {
        [value; LANES]
    }
    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    fn to_bits(self, a: Self::F) -> Self::I {
        a.map(|v| v.to_bits().cast_signed())
    }
    #[inline(always)]
    fn gt_bit(self, a: Self::F, b: Self::F, bit: i32) -> Self::I {
        from_fn(|i| if a[i] > b[i] { bit } else { 0 })
    }
    #[inline(always)]
    fn max_abs_bits(self, acc: Self::I, a: Self::F) -> Self::I {
        from_fn(|i| acc[i].max(a[i].abs().to_bits().cast_signed()))
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::I) -> i32 {
        a.into_iter().fold(a[0], i32::max)
    }

    #[inline(always)]
    fn table(self, entries: &[f32; LANES]) -> Self::Table {
        *entries
    }
    #[inline(always)]
    fn scale_table(self, table: Self::Table, scale: f32) -> Self::Table {
        table.map(|v| v * scale)
    }
    #[inline(always)]
    fn lookup(self, table: Self::Table, index: Self::I) -> Self::F {
        index.map(|i| table[(i & 15).cast_unsigned() as usize])
    }
    #[inline(always)]
    fn nibbles(self, src: &[u8; 8]) -> Self::I {
        from_fn(|i| i32::from(if i % 2 == 0 { src[i / 2] >> 4 } else { src[i / 2] & 15 }))
    }
    #[inline(always)]
    fn nibbles_split(self, src: &[u8; LANES]) -> (Self::I, Self::I) {
        (src.map(|b| i32::from(b >> 4)), src.map(|b| i32::from(b & 15)))
    }
    #[inline(always)]
    fn prefetch<T>(self, _src: &[T]) {}
    #[inline(always)]
    fn load_words(self, src: &[u8; 4 * LANES]) -> Self::I {
        from_fn(|i| i32::from_le_bytes(from_fn(|j| src[4 * i + j])))
    }
    #[inline(always)]
    fn load_word_columns(self, src: &[u8], stride: usize) -> [Self::I; 4] {
        from_fn(|j| from_fn(|i| i32::from_le_bytes(from_fn(|byte| src[i * stride + 4 * j + byte]))))
    }
    #[inline(always)]
    fn word_nibbles(self, words: Self::I) -> [Self::I; 8] {
        NIBBLE_SHIFTS.map(|shift| words.map(|word| word >> shift))
    }

    #[inline(always)]
    fn load_pairs(self, src: &[bf16; 2 * LANES]) -> Self::F {
        from_fn(|i| pair(src[2 * i], src[2 * i + 1]))
    }
    #[inline(always)]
    fn store_pairs(self, value: Self::F, dst: &mut [bf16; 2 * LANES]) {
        for (pair, value) in dst.as_chunks_mut::<2>().0.iter_mut().zip(value) {
            let bits = value.to_bits();
            *pair = [bf16::from_bits(bits as u16), bf16::from_bits((bits >> 16) as u16)];
        }
    }
    #[inline(always)]
    fn zip_pairs(self, a: &[bf16; LANES], b: &[bf16; LANES]) -> Self::F {
        from_fn(|i| pair(a[i], b[i]))
    }
    #[inline(always)]
    fn transpose(self, rows: [Self::F; LANES]) -> [Self::F; LANES] {
        from_fn(|i| from_fn(|j| rows[j][i]))
    }
    #[inline(always)]
    fn table16_bf16(self, table: Self::Table, scale: f32) -> Self::Table16 {
        table.map(|v| bf16::from_f32(v * scale).to_bits())
    }
    #[inline(always)]
    fn table16_f16(self, table: Self::Table, scale: f32) -> Self::Table16 {
        table.map(|v| f16::from_f32(v * scale).to_bits())
    }
    #[inline(always)]
    fn lookup32(self, table: Self::Table16, src: &[u8; LANES], dst: &mut [u16; 2 * LANES]) {
        for (pair, byte) in dst.as_chunks_mut::<2>().0.iter_mut().zip(src) {
            *pair = [table[usize::from(byte >> 4)], table[usize::from(byte & 15)]];
        }
    }

    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn shift_right<const N: u32>(self, a: Self::I) -> Self::I {
        a.map(|v| (v.cast_unsigned() >> N).cast_signed())
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::I {
        a.map(|v| v.round_ties_even() as i32)
    }
    #[inline(always)]
    fn low_bytes(self, a: Self::I) -> [u8; LANES] {
        a.map(|v| v.to_le_bytes()[0])
    }
    #[inline(always)]
    fn load_u8(self, src: &[u8; LANES]) -> Self::I {
        src.map(i32::from)
    }
    #[inline(always)]
    fn gather<const N: usize>(self, table: &[f32; N], index: Self::I) -> Self::F {
        const { assert!(N.is_power_of_two()) };
        index.map(|i| table[i.cast_unsigned() as usize % N])
    }
    #[inline(always)]
    fn lookup_wide(self, table: [Self::Table; 2], index: Self::I) -> Self::F {
        index.map(|i| table.as_flattened()[i.cast_unsigned() as usize % (2 * LANES)])
    }
    #[inline(always)]
    fn store_nibbles(self, codes: [Self::I; 4], dst: &mut [u8; 2 * LANES]) {
        for (byte, [high, low]) in dst.iter_mut().zip(codes.as_flattened().as_chunks().0) {
            *byte = ((high << 4) | low).to_le_bytes()[0];
        }
    }
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn stream_line(self, src: *const u8, dst: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe { src.copy_to_nonoverlapping(dst, LINE) }
    }
    #[inline(always)]
    fn fence(self) {}
}

fn pair(low: bf16, high: bf16) -> f32 {
    f32::from_bits(u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16)
}
