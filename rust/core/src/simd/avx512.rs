//! AVX-512 F, BW, DQ and VL: one 512-bit register holds the sixteen lanes.
#![allow(unsafe_code)]

// Every name here is an intrinsic; a list of eighty would say no more.
#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Isa, LANES, mask};

/// Proof that this machine has AVX-512 F, BW, DQ, VL, AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx512(());

impl Avx512 {
    /// The proof, if the machine has the instructions.
    pub fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }
}

const ROUND_NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

impl Isa for Avx512 {
    type F = __m512;
    type I = __m512i;
    type Table = __m512;
    /// Every entry twice: 32-bit lane i holds entry i in both halves.
    type Table16 = __m512i;

    const WIDE: bool = true;

    #[inline(always)]
    fn vectorize<R>(self, work: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn enabled<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        // SAFETY: `self` exists only if `detect` found every feature that `enabled` asks for.
        unsafe { enabled(work) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    fn load(self, src: &[f32; LANES]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; `src` is 64 readable bytes, and the load is unaligned.
        unsafe { _mm512_loadu_ps(src.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, value: __m512, dst: &mut [f32; LANES]) {
        // SAFETY: `self` proves AVX-512F; `dst` is 64 writable bytes, and the store is unaligned.
        unsafe { _mm512_storeu_ps(dst.as_mut_ptr(), value) }
    }
    #[inline(always)]
    fn load_f16(self, src: &[f16; LANES]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; `src` is 32 readable bytes, and the load is unaligned.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(src.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_f16(self, value: __m512, dst: &mut [f16; LANES]) {
        // SAFETY: `self` proves AVX-512F; `dst` is 32 writable bytes, and the store is unaligned.
        unsafe { _mm256_storeu_si256(dst.as_mut_ptr().cast(), _mm512_cvtps_ph::<ROUND_NEAREST>(value)) }
    }
    #[inline(always)]
    fn load_bf16(self, src: &[bf16; LANES]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; `src` is 32 readable bytes, and the load is unaligned.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(src.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    fn store_bf16(self, value: __m512, dst: &mut [bf16; LANES]) {
        // SAFETY: `self` proves AVX-512F; `dst` is 32 writable bytes, and the store is unaligned.
        unsafe {
            let bits = _mm512_castps_si512(value);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
            let chosen = _mm512_mask_mov_epi32(rounded, nan, quiet);
            let half = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(chosen));
            _mm256_storeu_si256(dst.as_mut_ptr().cast(), half);
        }
    }
    #[inline(always)]
    fn load_i8(self, src: &[i8; LANES]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; `src` is 16 readable bytes, and the load is unaligned.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(src.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_abs_ps(a) }
    }
    #[inline(always)]
    fn reduce_sum(self, a: __m512) -> f32 {
        // SAFETY: `self` proves AVX-512 F and DQ.
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    fn zero_i(self) -> __m512i {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    fn splat_i(self, value: i32) -> __m512i {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_set1_epi32(value) }
    }
    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    fn to_bits(self, a: __m512) -> __m512i {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_castps_si512(a) }
    }
    #[inline(always)]
    fn gt_bit(self, a: __m512, b: __m512, bit: i32) -> __m512i {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), bit) }
    }
    #[inline(always)]
    fn max_abs_bits(self, acc: __m512i, a: __m512) -> __m512i {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_max_epi32(acc, _mm512_castps_si512(_mm512_abs_ps(a))) }
    }
    #[inline(always)]
    fn reduce_max(self, a: __m512i) -> i32 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_reduce_max_epi32(a) }
    }

    #[inline(always)]
    fn table(self, entries: &[f32; LANES]) -> __m512 {
        self.load(entries)
    }
    #[inline(always)]
    fn scale_table(self, table: __m512, scale: f32) -> __m512 {
        self.mul(table, self.splat(scale))
    }
    #[inline(always)]
    fn lookup(self, table: __m512, index: __m512i) -> __m512 {
        // SAFETY: `self` proves AVX-512F. `vpermps` reads the lowest four bits of each index.
        unsafe { _mm512_permutexvar_ps(index, table) }
    }
    #[inline(always)]
    fn nibbles(self, src: &[u8; 8]) -> __m512i {
        let low = i32::from_le_bytes([src[0], src[1], src[2], src[3]]);
        let high = i32::from_le_bytes([src[4], src[5], src[6], src[7]]);
        // SAFETY: `self` proves AVX-512F.
        unsafe {
            // Broadcasts from memory and a shift by lane leave the port of shuffles to the lookup.
            let bytes = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
            let place = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
            _mm512_srlv_epi32(bytes, place)
        }
    }
    #[inline(always)]
    fn nibbles_split(self, src: &[u8; LANES]) -> (__m512i, __m512i) {
        // SAFETY: `self` proves AVX-512F; `src` is 16 readable bytes, and the load is unaligned.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(src.as_ptr().cast()));
            (_mm512_srli_epi32::<4>(bytes), bytes)
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
    fn load_words(self, src: &[u8; 4 * LANES]) -> __m512i {
        // SAFETY: `self` proves AVX-512F; `src` is 64 readable bytes, and the load is unaligned.
        unsafe { _mm512_loadu_si512(src.as_ptr().cast()) }
    }
    #[inline(always)]
    fn load_word_columns(self, src: &[u8], stride: usize) -> [__m512i; 4] {
        assert!(src.len() >= 16 && stride <= (src.len() - 16) / 15, "sixteen rows of four words");
        let src = src.as_ptr();
        // SAFETY: `self` proves AVX-512F; the last row read is 15, and 15·stride + 16 <= src.len(), so every
        // load of 16 bytes, unaligned, is inside.
        unsafe {
            // Quarter q of vector i is row 4q + i: transposing 4 × 4 words inside each quarter leaves the
            // rows in order.
            let [a, b, c, d] = [0, 1, 2, 3].map(
                #[inline(always)]
                |i| {
                    let row = src.add(i * stride);
                    let quarters = _mm512_castsi128_si512(_mm_loadu_si128(row.cast()));
                    let quarters = _mm512_inserti32x4::<1>(quarters, _mm_loadu_si128(row.add(4 * stride).cast()));
                    let quarters = _mm512_inserti32x4::<2>(quarters, _mm_loadu_si128(row.add(8 * stride).cast()));
                    _mm512_inserti32x4::<3>(quarters, _mm_loadu_si128(row.add(12 * stride).cast()))
                },
            );
            let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
            let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
            [
                _mm512_unpacklo_epi64(ab, cd),
                _mm512_unpackhi_epi64(ab, cd),
                _mm512_unpacklo_epi64(ab_high, cd_high),
                _mm512_unpackhi_epi64(ab_high, cd_high),
            ]
        }
    }
    #[inline(always)]
    fn word_nibbles(self, words: __m512i) -> [__m512i; 8] {
        // SAFETY: `self` proves AVX-512F.
        unsafe {
            [
                _mm512_srli_epi32::<4>(words),
                words,
                _mm512_srli_epi32::<12>(words),
                _mm512_srli_epi32::<8>(words),
                _mm512_srli_epi32::<20>(words),
                _mm512_srli_epi32::<16>(words),
                _mm512_srli_epi32::<28>(words),
                _mm512_srli_epi32::<24>(words),
            ]
        }
    }

    #[inline(always)]
    fn load_pairs(self, src: &[bf16; 2 * LANES]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; `src` is 64 readable bytes, and the load is unaligned.
        unsafe { _mm512_loadu_ps(src.as_ptr().cast()) }
    }
    #[inline(always)]
    fn store_pairs(self, value: __m512, dst: &mut [bf16; 2 * LANES]) {
        // SAFETY: `self` proves AVX-512F; `dst` is 64 writable bytes, and the store is unaligned.
        unsafe { _mm512_storeu_ps(dst.as_mut_ptr().cast(), value) }
    }
    #[inline(always)]
    fn zip_pairs(self, a: &[bf16; LANES], b: &[bf16; LANES]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; `a` and `b` are 32 readable bytes each.
        unsafe {
            let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(a.as_ptr().cast()));
            let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(b.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32::<16>(high)))
        }
    }
    #[inline(always)]
    fn transpose(self, rows: [__m512; LANES]) -> [__m512; LANES] {
        let mut r = rows;
        // SAFETY: `self` proves AVX-512F.
        unsafe {
            // Within each 128-bit part: 2 × 2 blocks of single lanes, then of pairs of them.
            for i in (0..LANES).step_by(2) {
                (r[i], r[i + 1]) = (_mm512_unpacklo_ps(r[i], r[i + 1]), _mm512_unpackhi_ps(r[i], r[i + 1]));
            }
            for i in (0..LANES).step_by(4) {
                let [a, b, c, d] = [r[i], r[i + 1], r[i + 2], r[i + 3]].map(
                    #[inline(always)]
                    |v| _mm512_castps_pd(v),
                );
                r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
                r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
                r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
                r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
            }
            // Row 4g + i now holds, in part p, lanes 4p + i of rows 4g .. 4g + 4: transpose the parts.
            let mut out = r;
            for i in 0..4 {
                let low = _mm512_shuffle_f32x4::<0x88>(r[i], r[i + 4]);
                let high = _mm512_shuffle_f32x4::<0xdd>(r[i], r[i + 4]);
                let low_after = _mm512_shuffle_f32x4::<0x88>(r[i + 8], r[i + 12]);
                let high_after = _mm512_shuffle_f32x4::<0xdd>(r[i + 8], r[i + 12]);
                out[i] = _mm512_shuffle_f32x4::<0x88>(low, low_after);
                out[i + 4] = _mm512_shuffle_f32x4::<0x88>(high, high_after);
                out[i + 8] = _mm512_shuffle_f32x4::<0xdd>(low, low_after);
                out[i + 12] = _mm512_shuffle_f32x4::<0xdd>(high, high_after);
            }
            out
        }
    }
    #[inline(always)]
    fn table16_bf16(self, table: __m512, scale: f32) -> __m512i {
        /// `vfixupimmps`: both kinds of NaN become the default NaN, all else stays.
        const DEFAULT_NAN: i32 = 0x33;
        let scaled = self.scale_table(table, scale);
        // SAFETY: `self` proves AVX-512F.
        unsafe {
            // A NaN without payload stays one under the rounding: that is one instruction, not two as in `store_bf16`.
            let scaled = _mm512_fixupimm_ps::<0>(scaled, scaled, _mm512_set1_epi32(DEFAULT_NAN));
            let bits = _mm512_castps_si512(scaled);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            both_halves(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))))
        }
    }
    #[inline(always)]
    fn table16_f16(self, table: __m512, scale: f32) -> __m512i {
        let scaled = self.scale_table(table, scale);
        // SAFETY: `self` proves AVX-512F.
        unsafe {
            let half = _mm512_cvtepu16_epi32(_mm512_cvtps_ph::<ROUND_NEAREST>(scaled));
            both_halves(_mm512_slli_epi32::<16>(half))
        }
    }
    #[inline(always)]
    fn lookup32(self, table: __m512i, src: &[u8; LANES], dst: &mut [u16; 2 * LANES]) {
        // SAFETY: `self` proves AVX-512 F and BW; `src` is 16 readable bytes, `SPREAD` 64, `dst` 64
        // writable ones, and the accesses are unaligned.
        unsafe {
            let bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(src.as_ptr().cast()));
            // Of lane i, byte i: alone in the low word, and in the upper half of the high word.
            let words = _mm512_shuffle_epi8(bytes, _mm512_loadu_si512(SPREAD.as_ptr().cast()));
            // `vpermw` reads five bits of each word. These shifts put the nibble in the upper four of them;
            // the lowest chooses between two equal entries.
            let index = _mm512_srlv_epi16(words, _mm512_set1_epi32(0x0007_0003));
            _mm512_storeu_si512(dst.as_mut_ptr().cast(), _mm512_permutexvar_epi16(index, table));
        }
    }

    #[inline(always)]
    fn add_i(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    fn shift_right<const N: u32>(self, a: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_srli_epi32::<N>(a) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512i {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_cvt_roundps_epi32::<ROUND_NEAREST>(a) }
    }
    #[inline(always)]
    fn low_bytes(self, a: __m512i) -> [u8; LANES] {
        let mut bytes = [0; LANES];
        // SAFETY: `self` proves AVX-512F; `bytes` is 16 writable bytes, and the store is unaligned.
        unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(a)) };
        bytes
    }
    #[inline(always)]
    fn load_u8(self, src: &[u8; LANES]) -> __m512i {
        // SAFETY: `self` proves AVX-512F; `src` is 16 readable bytes, and the load is unaligned.
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(src.as_ptr().cast())) }
    }
    #[inline(always)]
    fn gather<const N: usize>(self, table: &[f32; N], index: __m512i) -> __m512 {
        // SAFETY: `self` proves AVX-512F; the mask keeps every index below N.
        unsafe {
            let index = _mm512_and_si512(index, _mm512_set1_epi32(mask::<N>()));
            _mm512_i32gather_ps::<4>(index, table.as_ptr())
        }
    }
    #[inline(always)]
    fn lookup_wide(self, [low, high]: [__m512; 2], index: __m512i) -> __m512 {
        // SAFETY: `self` proves AVX-512F. `vpermt2ps` reads the lowest five bits of each index.
        unsafe { _mm512_permutex2var_ps(low, index, high) }
    }
    #[inline(always)]
    fn store_nibbles(self, [a, b, c, d]: [__m512i; 4], dst: &mut [u8; 2 * LANES]) {
        // SAFETY: `self` proves AVX-512 F, BW and VL; `dst` is 32 writable bytes, and the store is unaligned.
        unsafe {
            // Neighbouring codes, as words: sixteen times the first plus the second.
            let weights = _mm512_set1_epi32(0x0001_0010);
            let ab = _mm512_madd_epi16(_mm512_packus_epi32(a, b), weights);
            let cd = _mm512_madd_epi16(_mm512_packus_epi32(c, d), weights);
            let bytes = _mm512_cvtepi16_epi8(_mm512_packus_epi32(ab, cd));
            // The packs work within 128-bit lanes: two bytes of each vector, lane after lane.
            let order = _mm256_setr_epi16(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            _mm256_storeu_si256(dst.as_mut_ptr().cast(), _mm256_permutexvar_epi16(order, bytes));
        }
    }
    #[inline(always)]
    unsafe fn stream_line(self, src: *const u8, dst: *mut u8) {
        // SAFETY: `self` proves AVX-512F; the rest is the caller's promise.
        unsafe { _mm512_stream_si512(dst.cast(), _mm512_loadu_si512(src.cast())) }
    }
    #[inline(always)]
    fn fence(self) {
        // SAFETY: every x86-64 has the instruction.
        unsafe { _mm_sfence() }
    }
}

/// For `vpshufb` on sixteen bytes in each 128-bit lane: byte i to bytes 0 and 3 of 32-bit lane i, zeros
/// between.
static SPREAD: [u8; 64] = {
    let mut pattern = [0x80; 64];
    let mut i = 0;
    while i < 16 {
        pattern[4 * i] = i as u8;
        pattern[4 * i + 3] = i as u8;
        i += 1;
    }
    pattern
};

/// The upper half of each 32-bit lane in both halves.
///
/// # Safety
/// AVX-512F.
#[inline(always)]
unsafe fn both_halves(upper: __m512i) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let mask = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
        _mm512_or_si512(_mm512_srli_epi32::<16>(upper), _mm512_and_si512(upper, mask))
    }
}
