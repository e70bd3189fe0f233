//! Every primitive of every instruction set against the scalar definition, bit for bit.

use half::{bf16, f16};
use proptest::prelude::*;

use super::{Isa, IsaKind, LANES, Op, scalar::Scalar};

/// All primitives applied to one set of inputs; the outputs as bits.
struct Everything {
    a: [f32; LANES],
    b: [f32; LANES],
    bytes: [u8; LANES],
}

impl Op for Everything {
    type Output = Vec<u32>;

    fn eval<I: Isa>(self, isa: I) -> Vec<u32> {
        isa.vectorize(
            #[inline(always)]
            || {
                let mut out = Vec::new();
                let mut buffer = [0.0_f32; LANES];
                let (a, b) = (isa.load(&self.a), isa.load(&self.b));
                let table = isa.table(&self.b);
                let (even, odd) = isa.nibbles_split(&self.bytes);
                let first: &[u8; 8] = self.bytes.first_chunk().expect("16 bytes");
                for value in [
                    isa.add(a, b),
                    isa.mul(a, b),
                    isa.fma(a, b, a),
                    isa.abs(a),
                    isa.splat(self.a[3]),
                    isa.lookup(table, isa.nibbles(first)),
                    isa.lookup(isa.scale_table(table, self.a[0]), even),
                    isa.lookup(table, odd),
                    isa.lookup(table, isa.gt_bit(a, b, 5)),
                    isa.lookup(table, isa.or(isa.gt_bit(b, a, 8), isa.splat_i(3))),
                    isa.lookup(table, isa.zero_i()),
                    isa.load_i8(&self.bytes.map(u8::cast_signed)),
                ] {
                    isa.store(value, &mut buffer);
                    out.extend(buffer.map(f32::to_bits));
                }
                let mut halves = [f16::ZERO; LANES];
                isa.store_f16(a, &mut halves);
                out.extend(halves.map(|v| u32::from(v.to_bits())));
                isa.store(isa.load_f16(&halves), &mut buffer);
                out.extend(buffer.map(f32::to_bits));
                let mut brains = [bf16::ZERO; LANES];
                isa.store_bf16(a, &mut brains);
                out.extend(brains.map(|v| u32::from(v.to_bits())));
                isa.store(isa.load_bf16(&brains), &mut buffer);
                out.extend(buffer.map(f32::to_bits));
                out.extend(self.moves(isa));
                out.extend(self.codes(isa));
                out.push(isa.reduce_sum(a).to_bits());
                let largest = isa.reduce_max(isa.max_abs_bits(isa.to_bits(isa.abs(b)), a));
                out.push(largest.cast_unsigned());
                out
            },
        )
    }
}

impl Everything {
    /// What only moves values: pairs of bfloat16, transposition, tables of 16 bits.
    #[inline(always)]
    fn moves<I: Isa>(&self, isa: I) -> Vec<u32> {
        let mut out = Vec::new();
        let mut buffer = [0.0_f32; LANES];
        let (a, b) = (isa.load(&self.a), isa.load(&self.b));
        let table = isa.table(&self.b);
        let mut brains = [bf16::ZERO; LANES];
        isa.store_bf16(a, &mut brains);
        let mut pairs = [bf16::ZERO; 2 * LANES];
        isa.store_pairs(isa.zip_pairs(&brains, &brains.map(|v| -v)), &mut pairs);
        out.extend(pairs.map(|v| u32::from(v.to_bits())));
        isa.store_pairs(isa.load_pairs(&pairs), &mut pairs);
        out.extend(pairs.map(|v| u32::from(v.to_bits())));
        let mut rows = [a; LANES];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = isa.add(a, isa.mul(b, isa.splat(i as f32)));
        }
        for row in isa.transpose(rows) {
            isa.store(row, &mut buffer);
            out.extend(buffer.map(f32::to_bits));
        }
        let mut words = [0; 2 * LANES];
        for table in [isa.table16_f16(table, self.a[1]), isa.table16_bf16(table, self.a[1])] {
            isa.lookup32(table, &self.bytes, &mut words);
            out.extend(words.map(u32::from));
        }
        out
    }

    /// What the encoders do with integers.
    #[inline(always)]
    fn codes<I: Isa>(&self, isa: I) -> Vec<u32> {
        let mut out = Vec::new();
        let (a, b) = (isa.load(&self.a), isa.load(&self.b));
        let codes = isa.table(&std::array::from_fn(|i| f32::from_bits(i as u32)));
        let (even, odd) = isa.nibbles_split(&self.bytes);
        let [even, odd] = [even, odd].map(|index| isa.to_bits(isa.lookup(codes, index)));
        let mut packed = [0; 2 * LANES];
        isa.store_nibbles([even, isa.gt_bit(a, b, 9), odd, isa.gt_bit(b, a, 15)], &mut packed);
        out.extend(packed.map(u32::from));
        let halves = isa.mul(isa.load_i8(&self.bytes.map(u8::cast_signed)), isa.splat(0.5));
        let bits = isa.to_bits(b);
        for lanes in [isa.round(halves), isa.shift_right::<7>(isa.to_bits(a)), isa.add_i(even, bits)] {
            out.extend(isa.low_bytes(lanes).map(u32::from));
        }
        let long: [f32; 256] = std::array::from_fn(|i| self.a[i % LANES] + i as f32);
        let mut buffer = [0.0_f32; LANES];
        for value in [
            isa.gather(&long, bits),
            isa.gather(&long, isa.load_u8(&self.bytes)),
            isa.lookup_wide([isa.table(&self.a), isa.table(&self.b)], bits),
        ] {
            isa.store(value, &mut buffer);
            out.extend(buffer.map(f32::to_bits));
        }
        out
    }
}

fn canonical(bits: Vec<u32>) -> Vec<u32> {
    // Which NaN an operation returns is not part of any primitive's meaning.
    bits.into_iter().map(|b| if f32::from_bits(b).is_nan() { 0x7fc0_0000 } else { b }).collect()
}

fn lanes() -> impl Strategy<Value = [f32; LANES]> {
    prop::array::uniform16(prop_oneof![
        4 => -2.0_f32..2.0,
        2 => any::<f32>().prop_filter("a 16-bit NaN's payload is not compared", |v| !v.is_nan()),
        1 => Just(0.0_f32),
        1 => Just(-0.0_f32),
    ])
}

proptest! {
    #[test]
    fn every_instruction_set_agrees_with_the_scalar_definition(
        a in lanes(), b in lanes(), bytes in prop::array::uniform16(any::<u8>())
    ) {
        let expected = canonical(Everything { a, b, bytes }.eval(Scalar));
        for kind in IsaKind::available() {
            prop_assert_eq!(&canonical(kind.run(Everything { a, b, bytes })), &expected, "{}", kind.name());
        }
    }
}

#[test]
fn an_unknown_instruction_set_is_refused_by_name() {
    let error = IsaKind::choose(Some("sse9")).expect_err("no such set");
    assert!(error.to_string().contains("sse9"), "{error}");
    assert_eq!(IsaKind::choose(Some("scalar")).expect("always there").name(), "scalar");
}

struct NotANumber;

impl Op for NotANumber {
    type Output = (bool, bool);

    fn eval<I: Isa>(self, isa: I) -> (bool, bool) {
        isa.vectorize(
            #[inline(always)]
            || {
                let (mut brains, mut halves) = ([bf16::ZERO; LANES], [f16::ZERO; LANES]);
                // All payload bits set: adding the rounding constant alone would wrap it to a number.
                let nan = isa.splat(f32::from_bits(0x7fff_ffff));
                isa.store_bf16(nan, &mut brains);
                isa.store_f16(nan, &mut halves);
                let table = isa.table(&[1.0; LANES]);
                let (mut words, scale) = ([0; 2 * LANES], f32::from_bits(0x7fff_ffff));
                isa.lookup32(isa.table16_bf16(table, scale), &[0x5a; LANES], &mut words);
                let brains = brains.into_iter().chain(words.map(bf16::from_bits)).all(bf16::is_nan);
                isa.lookup32(isa.table16_f16(table, scale), &[0x5a; LANES], &mut words);
                let halves = halves.into_iter().chain(words.map(f16::from_bits)).all(f16::is_nan);
                (brains, halves)
            },
        )
    }
}

#[test]
fn nan_stays_nan_in_sixteen_bits() {
    for kind in IsaKind::available() {
        assert_eq!(kind.run(NotANumber), (true, true), "{}", kind.name());
    }
}

/// The primitives that read words of codes, as bits.
struct Words<'a> {
    bytes: &'a [u8],
    stride: usize,
}

impl Op for Words<'_> {
    type Output = Vec<u32>;

    fn eval<I: Isa>(self, isa: I) -> Vec<u32> {
        isa.vectorize(
            #[inline(always)]
            || {
                let entries = std::array::from_fn(|i| i as f32);
                let first = isa.load_words(self.bytes.first_chunk().expect("64 bytes"));
                let mut out = Vec::new();
                for words in [first].into_iter().chain(isa.load_word_columns(self.bytes, self.stride)) {
                    for index in isa.word_nibbles(words) {
                        let mut lanes = [0.0; LANES];
                        isa.store(isa.lookup(isa.table(&entries), index), &mut lanes);
                        out.extend(lanes.map(|v| (v as i32).cast_unsigned()));
                    }
                }
                out
            },
        )
    }
}

#[test]
#[allow(clippy::cast_sign_loss)] // Nibbles.
fn words_of_codes_are_nibbles_in_storage_order() {
    for stride in [16, 19, 48] {
        let bytes: Vec<u8> = (0..15 * stride + 16).map(|i| (i * 37 + i / 7) as u8).collect();
        let nibble = |i: usize| u32::from(if i.is_multiple_of(2) { bytes[i / 2] >> 4 } else { bytes[i / 2] & 15 });
        // Lane i of vector v is nibble v of word i; then of word w of row i, for each of four.
        let mut expected: Vec<u32> = (0..8 * LANES).map(|at| nibble(at % LANES * 8 + at / LANES)).collect();
        for word in 0..4 {
            expected.extend((0..8 * LANES).map(|at| nibble(at % LANES * 2 * stride + 8 * word + at / LANES)));
        }
        for kind in IsaKind::available() {
            assert_eq!(kind.run(Words { bytes: &bytes, stride }), expected, "{} {stride}", kind.name());
        }
    }
}

#[test]
fn rows_of_words_past_the_end_are_refused() {
    for kind in IsaKind::available() {
        for (length, stride) in [(15 * 16 + 15, 16), (64, usize::MAX / 8)] {
            let bytes = vec![0; length];
            let read = std::panic::catch_unwind(|| kind.run(Words { bytes: &bytes, stride }));
            assert!(read.is_err(), "{} {length} {stride}", kind.name());
        }
    }
}
