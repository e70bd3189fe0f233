//! AVX2 with FMA and F16C: two 256-bit registers hold the sixteen lanes.
#![allow(unsafe_code)]

// Every name here is an intrinsic; a list of eighty would say no more.
#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Isa, LANES, mask};

/// Proof that this machine has AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx2(());

impl Avx2 {
    /// The proof, if the machine has the instructions.
    pub fn detect() -> Option<Self> {
        let found =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }
}

/// `array::map` of a pair, always inlined: a call in between would run `f` without the instruction set.
#[inline(always)]
fn both<T, R>([low, high]: [T; 2], f: impl Fn(T) -> R) -> [R; 2] {
    [f(low), f(high)]
}

const ROUND_NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;

impl Isa for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    type Table = [__m256; 2];
    /// The low bytes of the entries and the high ones, each in both 128-bit lanes.
    type Table16 = [__m256i; 2];

    const WIDE: bool = false;

    #[inline(always)]
    fn vectorize<R>(self, work: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn enabled<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        // SAFETY: `self` exists only if `detect` found every feature that `enabled` asks for.
        unsafe { enabled(work) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_set1_ps(value); 2] }
    }
    #[inline(always)]
    fn load(self, src: &[f32; LANES]) -> Self::F {
        // SAFETY: `self` proves AVX; `src` is 64 readable bytes, and the loads are unaligned.
        unsafe { [_mm256_loadu_ps(src.as_ptr()), _mm256_loadu_ps(src.as_ptr().add(8))] }
    }
    #[inline(always)]
    fn store(self, value: Self::F, dst: &mut [f32; LANES]) {
        // SAFETY: `self` proves AVX; `dst` is 64 writable bytes, and the stores are unaligned.
        unsafe {
            _mm256_storeu_ps(dst.as_mut_ptr(), value[0]);
            _mm256_storeu_ps(dst.as_mut_ptr().add(8), value[1]);
        }
    }
    #[inline(always)]
    fn load_f16(self, src: &[f16; LANES]) -> Self::F {
        let src = src.as_ptr();
        // SAFETY: `self` proves F16C; `src` is 32 readable bytes, and the loads are unaligned.
        unsafe {
            both(
                [0, 8],
                #[inline(always)]
                |i| _mm256_cvtph_ps(_mm_loadu_si128(src.add(i).cast())),
            )
        }
    }
    #[inline(always)]
    fn store_f16(self, value: Self::F, dst: &mut [f16; LANES]) {
        let dst = dst.as_mut_ptr();
        for (i, v) in value.into_iter().enumerate() {
            // SAFETY: `self` proves F16C; bytes 16·i to 16·i+15 of the 32 are writable, i < 2.
            unsafe { _mm_storeu_si128(dst.add(8 * i).cast(), _mm256_cvtps_ph::<ROUND_NEAREST>(v)) }
        }
    }
    #[inline(always)]
    fn load_bf16(self, src: &[bf16; LANES]) -> Self::F {
        let src = src.as_ptr();
        // SAFETY: `self` proves AVX2; `src` is 32 readable bytes, and the loads are unaligned.
        unsafe {
            both(
                [0, 8],
                #[inline(always)]
                |i| {
                    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(src.add(i).cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
                },
            )
        }
    }
    #[inline(always)]
    fn store_bf16(self, value: Self::F, dst: &mut [bf16; LANES]) {
        // SAFETY: `self` proves AVX2; `dst` is 32 writable bytes, and the store is unaligned.
        unsafe { _mm256_storeu_si256(dst.as_mut_ptr().cast(), round_bf16(value)) }
    }
    #[inline(always)]
    fn load_i8(self, src: &[i8; LANES]) -> Self::F {
        let src = src.as_ptr();
        // SAFETY: `self` proves AVX2; `src` is 16 readable bytes, 8 at each offset.
        unsafe {
            both(
                [0, 8],
                #[inline(always)]
                |i| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(src.add(i).cast()))),
            )
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: `self` proves FMA.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        // SAFETY: `self` proves AVX.
        unsafe {
            both(
                a,
                #[inline(always)]
                |v| _mm256_andnot_ps(_mm256_set1_ps(-0.0), v),
            )
        }
    }
    #[inline(always)]
    fn reduce_sum(self, a: Self::F) -> f32 {
        // SAFETY: `self` proves AVX.
        unsafe {
            let eight = _mm256_add_ps(a[0], a[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    fn zero_i(self) -> Self::I {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_setzero_si256(); 2] }
    }
    #[inline(always)]
    fn splat_i(self, value: i32) -> Self::I {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_set1_epi32(value); 2] }
    }
    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }
    #[inline(always)]
    fn to_bits(self, a: Self::F) -> Self::I {
        // SAFETY: `self` proves AVX.
        unsafe {
            both(
                a,
                #[inline(always)]
                |v| _mm256_castps_si256(v),
            )
        }
    }
    #[inline(always)]
    fn gt_bit(self, a: Self::F, b: Self::F, bit: i32) -> Self::I {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let bit = _mm256_set1_epi32(bit);
            both(
                [0, 1],
                #[inline(always)]
                |i| _mm256_and_si256(bit, _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(a[i], b[i]))),
            )
        }
    }
    #[inline(always)]
    fn max_abs_bits(self, acc: Self::I, a: Self::F) -> Self::I {
        let bits = self.to_bits(self.abs(a));
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_max_epi32(acc[0], bits[0]), _mm256_max_epi32(acc[1], bits[1])] }
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::I) -> i32 {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let eight = _mm256_max_epi32(a[0], a[1]);
            let four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
            let two = _mm_max_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
            _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two)))
        }
    }

    #[inline(always)]
    fn table(self, entries: &[f32; LANES]) -> Self::Table {
        self.load(entries)
    }
    #[inline(always)]
    fn scale_table(self, table: Self::Table, scale: f32) -> Self::Table {
        self.mul(table, self.splat(scale))
    }
    #[inline(always)]
    fn lookup(self, table: Self::Table, index: Self::I) -> Self::F {
        // SAFETY: `self` proves AVX2. `vpermps` reads three bits of each index; bit 3, moved to the
        // sign, chooses the half.
        unsafe {
            both(
                index,
                #[inline(always)]
                |i| {
                    let low = _mm256_permutevar8x32_ps(table[0], i);
                    let high = _mm256_permutevar8x32_ps(table[1], i);
                    _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(i)))
                },
            )
        }
    }
    #[inline(always)]
    fn nibbles(self, src: &[u8; 8]) -> Self::I {
        let (low, high) = src.split_at(4);
        both(
            [low, high],
            #[inline(always)]
            |four| {
                let four = i32::from_le_bytes([four[0], four[1], four[2], four[3]]);
                // SAFETY: `self` proves AVX2.
                unsafe {
                    let bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
                    _mm256_or_si256(_mm256_srli_epi64::<4>(bytes), _mm256_slli_epi64::<32>(bytes))
                }
            },
        )
    }
    #[inline(always)]
    fn nibbles_split(self, src: &[u8; LANES]) -> (Self::I, Self::I) {
        let src = src.as_ptr();
        // SAFETY: `self` proves AVX2; `src` is 16 readable bytes, 8 at each offset.
        unsafe {
            let bytes = both(
                [0, 8],
                #[inline(always)]
                |i| _mm256_cvtepu8_epi32(_mm_loadl_epi64(src.add(i).cast())),
            );
            (
                both(
                    bytes,
                    #[inline(always)]
                    |b| _mm256_srli_epi32::<4>(b),
                ),
                bytes,
            )
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, src: &[T]) {
        const LINE: usize = 64;
        for offset in (0..size_of_val(src)).step_by(LINE) {
            // SAFETY: a prefetch reads nothing, and the offset stays inside `src`.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(src.as_ptr().cast::<i8>().add(offset)) };
        }
    }
    #[inline(always)]
    fn load_words(self, src: &[u8; 4 * LANES]) -> Self::I {
        let src = src.as_ptr();
        // SAFETY: `self` proves AVX; `src` is 64 readable bytes, and the loads are unaligned.
        unsafe { [_mm256_loadu_si256(src.cast()), _mm256_loadu_si256(src.add(32).cast())] }
    }
    #[inline(always)]
    fn load_word_columns(self, src: &[u8], stride: usize) -> [Self::I; 4] {
        assert!(src.len() >= 16 && stride <= (src.len() - 16) / 15, "sixteen rows of four words");
        let src = src.as_ptr();
        // SAFETY: `self` proves AVX2; the last row read is 15, and 15·stride + 16 <= src.len(), so every
        // load of 16 bytes, unaligned, is inside.
        unsafe {
            // Half h of vector i is row 4h + i of eight: transposing 4 × 4 words inside each half leaves the
            // rows in order.
            let [low, high] = [0, 8].map(
                #[inline(always)]
                |first| {
                    let [a, b, c, d] = [0, 1, 2, 3].map(
                        #[inline(always)]
                        |i| {
                            let row = src.add((first + i) * stride);
                            let halves = _mm256_castsi128_si256(_mm_loadu_si128(row.cast()));
                            _mm256_inserti128_si256::<1>(halves, _mm_loadu_si128(row.add(4 * stride).cast()))
                        },
                    );
                    let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
                    let (ab_high, cd_high) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
                    [
                        _mm256_unpacklo_epi64(ab, cd),
                        _mm256_unpackhi_epi64(ab, cd),
                        _mm256_unpacklo_epi64(ab_high, cd_high),
                        _mm256_unpackhi_epi64(ab_high, cd_high),
                    ]
                },
            );
            [[low[0], high[0]], [low[1], high[1]], [low[2], high[2]], [low[3], high[3]]]
        }
    }
    #[inline(always)]
    fn word_nibbles(self, words: Self::I) -> [Self::I; 8] {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let [a, b] = words;
            [
                [_mm256_srli_epi32::<4>(a), _mm256_srli_epi32::<4>(b)],
                words,
                [_mm256_srli_epi32::<12>(a), _mm256_srli_epi32::<12>(b)],
                [_mm256_srli_epi32::<8>(a), _mm256_srli_epi32::<8>(b)],
                [_mm256_srli_epi32::<20>(a), _mm256_srli_epi32::<20>(b)],
                [_mm256_srli_epi32::<16>(a), _mm256_srli_epi32::<16>(b)],
                [_mm256_srli_epi32::<28>(a), _mm256_srli_epi32::<28>(b)],
                [_mm256_srli_epi32::<24>(a), _mm256_srli_epi32::<24>(b)],
            ]
        }
    }

    #[inline(always)]
    fn load_pairs(self, src: &[bf16; 2 * LANES]) -> Self::F {
        let src = src.as_ptr();
        // SAFETY: `self` proves AVX; `src` is 64 readable bytes, and the loads are unaligned.
        unsafe { [_mm256_loadu_ps(src.cast()), _mm256_loadu_ps(src.add(LANES).cast())] }
    }
    #[inline(always)]
    fn store_pairs(self, value: Self::F, dst: &mut [bf16; 2 * LANES]) {
        let dst = dst.as_mut_ptr();
        // SAFETY: `self` proves AVX; `dst` is 64 writable bytes, and the stores are unaligned.
        unsafe {
            _mm256_storeu_ps(dst.cast(), value[0]);
            _mm256_storeu_ps(dst.add(LANES).cast(), value[1]);
        }
    }
    #[inline(always)]
    fn zip_pairs(self, a: &[bf16; LANES], b: &[bf16; LANES]) -> Self::F {
        let (a, b) = (a.as_ptr(), b.as_ptr());
        // SAFETY: `self` proves AVX2; `a` and `b` are 32 readable bytes each, 16 at each offset.
        unsafe {
            both(
                [0, 8],
                #[inline(always)]
                |i| {
                    let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(a.add(i).cast()));
                    let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(b.add(i).cast()));
                    _mm256_castsi256_ps(_mm256_or_si256(low, _mm256_slli_epi32::<16>(high)))
                },
            )
        }
    }
    #[inline(always)]
    fn transpose(self, rows: [Self::F; LANES]) -> [Self::F; LANES] {
        let mut out = rows;
        // Plain loops: `array::map` is not always inlined.
        for (part, half) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let mut block = [rows[0][0]; 8];
            for i in 0..8 {
                block[i] = rows[8 * part + i][half];
            }
            // SAFETY: `self` proves AVX.
            let block = unsafe { transpose_eight(block) };
            for i in 0..8 {
                out[8 * half + i][part] = block[i];
            }
        }
        out
    }
    #[inline(always)]
    fn table16_bf16(self, table: Self::Table, scale: f32) -> Self::Table16 {
        // SAFETY: `self` proves AVX2.
        unsafe { byte_planes(round_bf16(self.scale_table(table, scale))) }
    }
    #[inline(always)]
    fn table16_f16(self, table: Self::Table, scale: f32) -> Self::Table16 {
        let [low, high] = self.scale_table(table, scale);
        // SAFETY: `self` proves F16C and AVX2.
        unsafe {
            let (low, high) = (_mm256_cvtps_ph::<ROUND_NEAREST>(low), _mm256_cvtps_ph::<ROUND_NEAREST>(high));
            byte_planes(_mm256_set_m128i(high, low))
        }
    }
    #[inline(always)]
    fn lookup32(self, [low, high]: Self::Table16, src: &[u8; LANES], dst: &mut [u16; 2 * LANES]) {
        // SAFETY: `self` proves AVX2; `src` is 16 readable bytes and `dst` 64 writable ones, and the accesses
        // are unaligned.
        unsafe {
            let (nibble, bytes) = (_mm_set1_epi8(15), _mm_loadu_si128(src.as_ptr().cast()));
            let first = _mm_and_si128(_mm_srli_epi16::<4>(bytes), nibble);
            let second = _mm_and_si128(bytes, nibble);
            let index = _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
            // The unpacks below work within 128-bit lanes: the permutation makes their results contiguous.
            let index = _mm256_permute4x64_epi64::<0b11_01_10_00>(index);
            let (low, high) = (_mm256_shuffle_epi8(low, index), _mm256_shuffle_epi8(high, index));
            let dst = dst.as_mut_ptr();
            _mm256_storeu_si256(dst.cast(), _mm256_unpacklo_epi8(low, high));
            _mm256_storeu_si256(dst.add(LANES).cast(), _mm256_unpackhi_epi8(low, high));
        }
    }

    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
    }
    #[inline(always)]
    fn shift_right<const N: u32>(self, a: Self::I) -> Self::I {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let count = _mm_cvtsi32_si128(N.cast_signed());
            [_mm256_srl_epi32(a[0], count), _mm256_srl_epi32(a[1], count)]
        }
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::I {
        // SAFETY: `self` proves AVX. The rounding mode of a Rust program is to nearest.
        unsafe { [_mm256_cvtps_epi32(a[0]), _mm256_cvtps_epi32(a[1])] }
    }
    #[inline(always)]
    fn low_bytes(self, a: Self::I) -> [u8; LANES] {
        let mut bytes = [0; LANES];
        // SAFETY: `self` proves AVX2; `bytes` is 16 writable bytes, and the store is unaligned.
        unsafe {
            let byte = _mm256_set1_epi32(0xff);
            let words = _mm256_packus_epi32(_mm256_and_si256(a[0], byte), _mm256_and_si256(a[1], byte));
            // The pack interleaves 128-bit halves; the permutation puts them back in order.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let packed = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(bytes.as_mut_ptr().cast(), packed);
        }
        bytes
    }
    #[inline(always)]
    fn load_u8(self, src: &[u8; LANES]) -> Self::I {
        let src = src.as_ptr();
        // SAFETY: `self` proves AVX2; `src` is 16 readable bytes, 8 at each offset.
        unsafe {
            both(
                [0, 8],
                #[inline(always)]
                |i| _mm256_cvtepu8_epi32(_mm_loadl_epi64(src.add(i).cast())),
            )
        }
    }
    #[inline(always)]
    fn gather<const N: usize>(self, table: &[f32; N], index: Self::I) -> Self::F {
        // SAFETY: `self` proves AVX2; the mask keeps every index below N.
        unsafe {
            let mask = _mm256_set1_epi32(mask::<N>());
            both(
                index,
                #[inline(always)]
                |i| _mm256_i32gather_ps::<4>(table.as_ptr(), _mm256_and_si256(i, mask)),
            )
        }
    }
    #[inline(always)]
    fn lookup_wide(self, [low, high]: [Self::Table; 2], index: Self::I) -> Self::F {
        let (low, high) = (self.lookup(low, index), self.lookup(high, index));
        // SAFETY: `self` proves AVX2. Bit 4, moved to the sign, chooses the half.
        unsafe {
            let choice = both(
                index,
                #[inline(always)]
                |i| _mm256_castsi256_ps(_mm256_slli_epi32::<27>(i)),
            );
            [_mm256_blendv_ps(low[0], high[0], choice[0]), _mm256_blendv_ps(low[1], high[1], choice[1])]
        }
    }
    #[inline(always)]
    fn store_nibbles(self, codes: [Self::I; 4], dst: &mut [u8; 2 * LANES]) {
        let [a, b, c, d] = codes;
        // SAFETY: `self` proves AVX2; `dst` is 32 writable bytes, and the store is unaligned.
        unsafe {
            // Neighbouring codes, as words: sixteen times the first plus the second.
            let weights = _mm256_set1_epi32(0x0001_0010);
            let (a, b) = (_mm256_packus_epi32(a[0], a[1]), _mm256_packus_epi32(b[0], b[1]));
            let (c, d) = (_mm256_packus_epi32(c[0], c[1]), _mm256_packus_epi32(d[0], d[1]));
            let ab = _mm256_packus_epi32(_mm256_madd_epi16(a, weights), _mm256_madd_epi16(b, weights));
            let cd = _mm256_packus_epi32(_mm256_madd_epi16(c, weights), _mm256_madd_epi16(d, weights));
            // The packs work within 128-bit lanes: two bytes of each vector of eight, lane after lane.
            let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(ab, cd));
            let order = _mm256_setr_epi8(
                0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15, //
                0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15,
            );
            _mm256_storeu_si256(dst.as_mut_ptr().cast(), _mm256_shuffle_epi8(bytes, order));
        }
    }
    #[inline(always)]
    unsafe fn stream_line(self, src: *const u8, dst: *mut u8) {
        // SAFETY: `self` proves AVX; the rest is the caller's promise.
        unsafe {
            _mm256_stream_si256(dst.cast(), _mm256_loadu_si256(src.cast()));
            _mm256_stream_si256(dst.add(32).cast(), _mm256_loadu_si256(src.add(32).cast()));
        }
    }
    #[inline(always)]
    fn fence(self) {
        // SAFETY: every x86-64 has the instruction.
        unsafe { _mm_sfence() }
    }
}

/// Sixteen bfloat16, rounded to nearest, ties to even; NaN stays NaN.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn round_bf16(value: [__m256; 2]) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let [low, high] = both(
            value,
            #[inline(always)]
            |v| {
                let bits = _mm256_castps_si256(v);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
                let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
                _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
            },
        );
        // The pack interleaves 128-bit halves; the permutation puts them back in order.
        _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high))
    }
}

/// The low bytes of sixteen words and their high bytes, each twice.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn byte_planes(words: __m256i) -> [__m256i; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm256_and_si256(words, _mm256_set1_epi16(0xff));
        // Per 128-bit lane: eight low bytes, eight high bytes.
        let bytes = _mm256_packus_epi16(low, _mm256_srli_epi16::<8>(words));
        [_mm256_permute4x64_epi64::<0b10_00_10_00>(bytes), _mm256_permute4x64_epi64::<0b11_01_11_01>(bytes)]
    }
}

/// Lane j of row i becomes lane i of row j.
///
/// # Safety
/// AVX.
#[inline(always)]
unsafe fn transpose_eight(r: [__m256; 8]) -> [__m256; 8] {
    let mut out = r;
    // SAFETY: the caller's promise.
    unsafe {
        for i in [0, 4] {
            let (a, b) = (_mm256_unpacklo_ps(r[i], r[i + 1]), _mm256_unpackhi_ps(r[i], r[i + 1]));
            let (c, d) = (_mm256_unpacklo_ps(r[i + 2], r[i + 3]), _mm256_unpackhi_ps(r[i + 2], r[i + 3]));
            out[i] = _mm256_shuffle_ps::<0x44>(a, c);
            out[i + 1] = _mm256_shuffle_ps::<0xee>(a, c);
            out[i + 2] = _mm256_shuffle_ps::<0x44>(b, d);
            out[i + 3] = _mm256_shuffle_ps::<0xee>(b, d);
        }
        let half = out;
        for i in 0..4 {
            out[i] = _mm256_permute2f128_ps::<0x20>(half[i], half[i + 4]);
            out[i + 4] = _mm256_permute2f128_ps::<0x31>(half[i], half[i + 4]);
        }
    }
    out
}
