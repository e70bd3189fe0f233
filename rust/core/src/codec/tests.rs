//! The codec against its reference, bit for bit, on every instruction set and thread count.

use proptest::prelude::*;

use super::spec::{BLOCK_SIZES, Packed, QuantSpec, QuantType, Scales};
use super::{blockwise8, dequantize, double_quant, int8, quantize};
use crate::dtype::{Element, Floats, FloatsMut, bf16, f16};
use crate::reference;
use crate::simd::IsaKind;
use crate::{Error, Exec};

/// Every way to execute a call on this machine.
fn executions() -> Vec<Exec> {
    let threads = [1, 2, 3];
    IsaKind::available().into_iter().flat_map(|isa| threads.map(|threads| Exec { isa, threads })).collect()
}

/// Deterministic values of mixed magnitude, with exact zeros.
fn values(numel: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    (0..numel)
        .map(|_| {
            if next() % 31 == 0 {
                0.0
            } else {
                (next() as f32 / 4.3e9 - 0.5) * 10.0_f32.powi((next() % 5).cast_signed() - 2)
            }
        })
        .collect()
}

fn quantized(exec: &Exec, values: Floats<'_>, spec: QuantSpec) -> (Vec<u8>, Vec<f32>) {
    let (mut codes, mut absmax) = (vec![0xAA; values.len().div_ceil(2)], vec![-1.0; spec.blocks(values.len())]);
    quantize::quantize_4bit(exec, values, spec, &mut codes, &mut absmax, "w").expect("finite");
    (codes, absmax)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Codes, absmax and decoded values of one tensor on every execution, against the reference.
fn check(values: &[f32], spec: QuantSpec) {
    let (codes, absmax) = reference::quantize_4bit(values, spec);
    let decoded = reference::dequantize_4bit(&codes, &absmax, spec, values.len());
    let narrow16: Vec<f16> = decoded.iter().map(|v| f16::from_f32(*v)).collect();
    let narrow_b: Vec<bf16> = decoded.iter().map(|v| bf16::from_f32(*v)).collect();
    for exec in executions() {
        let (got_codes, got_absmax) = quantized(&exec, Floats::F32(values), spec);
        assert_eq!(got_codes, codes, "{exec:?} {spec:?} {}", values.len());
        assert_eq!(bits(&got_absmax), bits(&absmax));
        let packed = Packed::new(&codes, Scales::Plain(&absmax), spec, values.len()).expect("fits");
        let mut wide = vec![f32::NAN; values.len()];
        dequantize::dequantize_4bit(&exec, &packed, FloatsMut::F32(&mut wide)).expect("fits");
        assert_eq!(bits(&wide), bits(&decoded), "{exec:?} {spec:?} {}", values.len());
        let mut half = vec![f16::NAN; values.len()];
        dequantize::dequantize_4bit(&exec, &packed, FloatsMut::F16(&mut half)).expect("fits");
        assert_eq!(half, narrow16);
        let mut brain = vec![bf16::NAN; values.len()];
        dequantize::dequantize_4bit(&exec, &packed, FloatsMut::Bf16(&mut brain)).expect("fits");
        assert_eq!(brain, narrow_b);
    }
}

fn specs() -> impl Iterator<Item = QuantSpec> {
    let types = [QuantType::Nf4, QuantType::Fp4];
    types.into_iter().flat_map(|t| BLOCK_SIZES.map(|b| QuantSpec::new(t, b).expect("valid")))
}

#[test]
fn every_block_size_agrees_with_the_reference_on_sizes_that_hit_tails() {
    for spec in specs() {
        let b = spec.block_size();
        for numel in [0, 1, 2, 15, 16, 17, 31, b - 1, b, b + 1, 3 * b + 7] {
            check(&values(numel, 1 + numel as u32), spec);
        }
    }
}

#[test]
fn a_tensor_of_many_tasks_agrees_with_the_reference() {
    check(&values((1 << 17) + 4321, 7), QuantSpec::new(QuantType::Nf4, 64).expect("valid"));
    check(&values((1 << 17) + 4096, 8), QuantSpec::new(QuantType::Fp4, 4096).expect("valid"));
}

#[test]
fn thresholds_and_their_neighbours_take_the_codes_of_the_definition() {
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        let spec = QuantSpec::new(quant_type, 4096).expect("valid");
        let thresholds = match quant_type {
            QuantType::Nf4 => super::codebook::nf4::THRESHOLDS,
            QuantType::Fp4 => super::codebook::fp4::THRESHOLDS,
        };
        let finite = thresholds.into_iter().filter(|t| t.is_finite());
        let near = finite.flat_map(|t| [t.next_down(), t, t.next_up()]);
        let all: Vec<f32> = near.flat_map(|t| [t, -t]).chain([1.0, -1.0, 0.0, -0.0]).collect();
        check(&all, spec);
    }
}

#[test]
fn extreme_magnitudes_agree_with_the_reference() {
    let spec = QuantSpec::new(QuantType::Nf4, 32).expect("valid");
    for scale in [1e-45, 1e-40, 1e-38, 1.5e-38, 1e-30, 1e30, 3.4e38] {
        check(&values(100, 3).iter().map(|v| v / 50.0 * scale).collect::<Vec<_>>(), spec);
    }
    check(&[0.0; 100], spec);
    check(&[-0.25; 100], spec);
}

#[test]
fn sixteen_bit_inputs_have_the_codes_of_their_widened_values() {
    for spec in specs().filter(|s| s.block_size() <= 128) {
        let halves: Vec<f16> = values(1001, 5).iter().map(|v| f16::from_f32(*v)).collect();
        let brains: Vec<bf16> = values(1001, 6).iter().map(|v| bf16::from_f32(*v)).collect();
        for exec in executions() {
            let wide: Vec<f32> = halves.iter().map(|v| v.to_f32()).collect();
            assert_eq!(quantized(&exec, Floats::F16(&halves), spec), reference::quantize_4bit(&wide, spec));
            let wide: Vec<f32> = brains.iter().map(|v| v.to_f32()).collect();
            assert_eq!(quantized(&exec, Floats::Bf16(&brains), spec), reference::quantize_4bit(&wide, spec));
        }
    }
}

#[test]
fn the_pad_nibble_of_an_odd_tensor_is_the_code_of_zero() {
    for (quant_type, pad) in [(QuantType::Nf4, 7), (QuantType::Fp4, 0)] {
        let spec = QuantSpec::new(quant_type, 32).expect("valid");
        for exec in executions() {
            let (codes, _) = quantized(&exec, Floats::F32(&[1.0, 1.0, 1.0]), spec);
            assert_eq!(codes[1] & 15, pad);
        }
    }
}

/// `decode_range` of elements from .1 to .2.
struct Range<'a, E>(&'a Packed<'a>, usize, usize, std::marker::PhantomData<E>);

impl<E: Element> crate::simd::Op for Range<'_, E> {
    type Output = Vec<E>;
    fn eval<I: crate::simd::Isa>(self, isa: I) -> Vec<E> {
        let mut out = vec![E::from_f32(f32::NAN); self.2 - self.1];
        isa.vectorize(
            #[inline(always)]
            || dequantize::decode_range(isa, self.0, self.1, &mut out),
        );
        out
    }
}

fn check_range<E: Element + PartialEq>(packed: &Packed<'_>, all: &[f32], start: usize, end: usize) {
    let expected: Vec<E> = all[start..end].iter().map(|v| E::from_f32(*v)).collect();
    for isa in IsaKind::available() {
        let got = isa.run(Range::<E>(packed, start, end, std::marker::PhantomData));
        assert!(got == expected, "{} {start}..{end}: {got:?} {expected:?}", isa.name());
    }
}

#[test]
fn a_range_decodes_wherever_it_begins() {
    for (quant_type, block_size) in [(QuantType::Nf4, 32), (QuantType::Nf4, 64), (QuantType::Fp4, 128)] {
        let spec = QuantSpec::new(quant_type, block_size).expect("valid");
        let (codes, absmax) = reference::quantize_4bit(&values(633, 9), spec);
        let all = reference::dequantize_4bit(&codes, &absmax, spec, 633);
        let packed = Packed::new(&codes, Scales::Plain(&absmax), spec, 633).expect("fits");
        for start in 0..70 {
            for end in [start, start + 1, start + 2, start + 17, start + 64, 633] {
                check_range::<f32>(&packed, &all, start, end);
                check_range::<f16>(&packed, &all, start, end);
                check_range::<bf16>(&packed, &all, start, end);
            }
        }
    }
}

#[test]
fn a_range_decodes_wherever_its_blocks_lie_in_nested_blocks() {
    let spec = QuantSpec::new(QuantType::Nf4, 32).expect("valid");
    let blocks = 2 * 256 + 13;
    let (codes, absmax) = reference::quantize_4bit(&values(blocks * 32, 29), spec);
    let (nested_codes, nested_absmax, offset) = reference::double_quantize(&absmax);
    let scales = Scales::Double { codes: &nested_codes, nested_absmax: &nested_absmax, offset };
    let packed = Packed::new(&codes, scales, spec, blocks * 32).expect("fits");
    let decoded: Vec<f32> = (0..blocks).map(|i| scales.get(i)).collect();
    let all = reference::dequantize_4bit(&codes, &decoded, spec, blocks * 32);
    for first in [0, 1, 239, 240, 241, 255, 256, 500, blocks - 1] {
        for count in [1, 15, 16, 17, 33, 70, blocks] {
            let end = (first + count).min(blocks) * 32;
            check_range::<f32>(&packed, &all, first * 32, end);
            check_range::<bf16>(&packed, &all, first * 32, end);
        }
    }
}

#[test]
fn extreme_scales_decode_as_their_products_round() {
    let spec = QuantSpec::new(QuantType::Nf4, 32).expect("valid");
    let (codes, _) = reference::quantize_4bit(&values(32, 31), spec);
    for scale in [0.0, 1e-45, 1e-41, 6e-8, 1e-5, 70_000.0, f32::MAX] {
        let all = reference::dequantize_4bit(&codes, &[scale], spec, 32);
        let absmax = [scale];
        let packed = Packed::new(&codes, Scales::Plain(&absmax), spec, 32).expect("fits");
        check_range::<f16>(&packed, &all, 0, 32);
        check_range::<bf16>(&packed, &all, 0, 32);
    }
}

#[test]
fn double_quantization_agrees_with_the_reference_and_decodes_within_half_a_step() {
    for numel in [0, 1, 255, 256, 257, 70_000] {
        let absmax: Vec<f32> = values(numel, 11).iter().map(|v| v.abs()).collect();
        let (codes, nested, offset) = reference::double_quantize(&absmax);
        for exec in executions() {
            let (mut got, mut got_nested) = (vec![0; numel], vec![0.0; numel.div_ceil(256)]);
            let got_offset = double_quant::double_quantize(&exec, &absmax, &mut got, &mut got_nested).expect("fits");
            assert_eq!((got, bits(&got_nested)), (codes.clone(), bits(&nested)));
            assert_eq!(got_offset.to_bits(), offset.to_bits());
        }
        let scales = Scales::Double { codes: &codes, nested_absmax: &nested, offset };
        for (i, value) in absmax.iter().enumerate() {
            // The widest gap of the map lies in its last decade: 0.9 / 64 of the nested absmax; half of
            // it, and the last gap below -0.993 where there is no -1.0.
            let bound = nested[i / 256] * 0.0071 + 4.0 * f32::EPSILON * (offset + nested[i / 256]);
            assert!((scales.get(i) - value).abs() <= bound, "{i}: {} {value}", scales.get(i));
        }
    }
}

#[test]
fn blockwise_8_bit_agrees_with_the_nearest_entries() {
    for (numel, block_size) in [(0, 64), (1, 64), (1000, 256), (5000, 4096), (77, 7), (2100, 33)] {
        let data = values(numel, 13);
        for exec in executions() {
            let (mut codes, mut absmax) = (vec![0; numel], vec![0.0; numel.div_ceil(block_size)]);
            blockwise8::quantize_blockwise(&exec, Floats::F32(&data), block_size, &mut codes, &mut absmax, "w")
                .expect("finite");
            let mut out = vec![f32::NAN; numel];
            blockwise8::dequantize_blockwise(&exec, &codes, &absmax, block_size, FloatsMut::F32(&mut out))
                .expect("fits");
            for i in 0..numel {
                let scale = absmax[i / block_size];
                assert_eq!(codes[i], reference::nearest_dynamic8(data[i] * (1.0 / scale.max(1e-38))));
                let value = super::codebook::dynamic8::map().values[usize::from(codes[i])] * scale;
                assert_eq!(out[i].to_bits(), value.to_bits());
            }
        }
    }
}

#[test]
fn int8_rows_round_half_to_even_and_decode_within_half_a_step() {
    let (rows, cols) = (5, 301);
    let mut data = values(rows * cols, 17);
    data[2 * cols..3 * cols].fill(0.0);
    for exec in executions() {
        let (mut codes, mut scb) = (vec![1; rows * cols], vec![-1.0; rows]);
        int8::quantize_int8(&exec, Floats::F32(&data), &mut codes, &mut scb, "w").expect("finite");
        let mut out = vec![f32::NAN; rows * cols];
        let matrix = int8::Int8Matrix::new(&codes, &scb, rows, cols).expect("fits");
        int8::dequantize_int8(&exec, &matrix, FloatsMut::F32(&mut out)).expect("fits");
        for (i, value) in data.iter().enumerate() {
            let row = &data[i / cols * cols..][..cols];
            let absmax = row.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            assert_eq!(scb[i / cols].to_bits(), absmax.to_bits());
            let expected = if absmax == 0.0 { 0.0 } else { (value * (1.0 / absmax * 127.0)).round_ties_even() };
            assert_eq!(f32::from(codes[i]).to_bits(), (expected + 0.0).to_bits());
            // Half a step, and three roundings of values at most absmax.
            assert!((out[i] - value).abs() <= absmax / 254.0 + 3.0 * f32::EPSILON * absmax);
        }
    }
}

#[test]
fn int8_rows_too_small_for_127_over_absmax_decode_within_half_a_step() {
    // The smallest subnormal; 1 / absmax overflows; only 127 / absmax does; neither does.
    for absmax in [1e-45, 1e-44, 1e-40, 2.9e-39, 3e-38, 3.7e-37, 3.8e-37] {
        let row: Vec<f32> = (0..37).map(|i| absmax * (1.0 - i as f32 / 18.0)).collect();
        for exec in executions() {
            let (mut codes, mut scb) = (vec![0; 37], [0.0]);
            int8::quantize_int8(&exec, Floats::F32(&row), &mut codes, &mut scb, "w").expect("finite");
            assert_eq!(scb[0].to_bits(), absmax.to_bits());
            for (code, value) in codes.iter().zip(&row) {
                // In float64: what float32 holds of so small a product is another matter. A step, half of it,
                // and the roundings of the factors.
                let exact = f64::from(*value) / f64::from(absmax) * 127.0;
                assert!((f64::from(*code) - exact).abs() <= 0.5 + 127.0 * 3.0 * f64::from(f32::EPSILON), "{absmax:e}");
            }
            let mut out = vec![f32::NAN; 37];
            let matrix = int8::Int8Matrix::new(&codes, &scb, 1, 37).expect("fits");
            int8::dequantize_int8(&exec, &matrix, FloatsMut::F32(&mut out)).expect("fits");
            for (got, value) in out.iter().zip(&row) {
                // Of subnormal numbers the roundings are half the smallest each.
                let bound = absmax / 254.0 + 3.0 * f32::EPSILON * absmax + 2.0 * f32::from_bits(1);
                assert!((got - value).abs() <= bound, "{absmax:e}: {got:e} {value:e}");
            }
        }
    }
}

#[test]
fn a_value_that_is_not_finite_is_refused_with_its_place() {
    let spec = QuantSpec::new(QuantType::Nf4, 64).expect("valid");
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut data = values(100_000, 19);
        data[70_001] = bad;
        data[99_999] = bad;
        for exec in executions() {
            let (mut codes, mut absmax) = (vec![0; 50_000], vec![0.0; spec.blocks(100_000)]);
            let error = quantize::quantize_4bit(&exec, Floats::F32(&data), spec, &mut codes, &mut absmax, "layer.3")
                .expect_err("not finite");
            assert_eq!(error, Error::NonFinite { name: "layer.3".into(), count: 2, first: 70_001 });
        }
    }
}

#[test]
fn scales_that_are_not_finite_are_refused_with_their_place() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut absmax: Vec<f32> = values(300, 23).iter().map(|v| v.abs()).collect();
        absmax[277] = bad;
        for exec in executions() {
            let error = double_quant::double_quantize(&exec, &absmax, &mut [0; 300], &mut [0.0; 2]);
            assert_eq!(error, Err(Error::NonFinite { name: "absmax".into(), count: 1, first: 277 }));
        }
    }
}

#[test]
fn buffers_that_do_not_fit_are_refused_by_name() {
    let spec = QuantSpec::new(QuantType::Nf4, 64).expect("valid");
    let exec = Exec::new(1).expect("an instruction set");
    let error = quantize::quantize_4bit(&exec, Floats::F32(&[0.0; 65]), spec, &mut [0; 33], &mut [0.0; 1], "w");
    assert_eq!(error, Err(Error::Length { what: "absmax", expected: 2, got: 1 }));
    assert!(Packed::new(&[0; 3], Scales::Plain(&[0.0]), spec, 5).is_ok());
    assert!(Packed::new(&[0; 3], Scales::Plain(&[0.0]), spec, 7).is_err());
    assert!(QuantSpec::new(QuantType::Nf4, 48).is_err());
    assert!("int4".parse::<QuantType>().is_err());
}

proptest! {
    #[test]
    fn any_finite_tensor_agrees_with_the_reference(
        data in prop::collection::vec(prop_oneof![-1.0_f32..1.0, prop::num::f32::NORMAL, prop::num::f32::SUBNORMAL], 0..300),
        block in 0_usize..3, fp4 in any::<bool>()
    ) {
        let quant_type = if fp4 { QuantType::Fp4 } else { QuantType::Nf4 };
        check(&data, QuantSpec::new(quant_type, BLOCK_SIZES[block]).expect("valid"));
    }

    #[test]
    fn nf4_error_is_at_most_half_the_widest_gap(data in prop::collection::vec(-3.0_f32..3.0, 1..200)) {
        let spec = QuantSpec::new(QuantType::Nf4, 64).expect("valid");
        let (codes, absmax) = reference::quantize_4bit(&data, spec);
        let decoded = reference::dequantize_4bit(&codes, &absmax, spec, data.len());
        for (i, (value, got)) in data.iter().zip(decoded).enumerate() {
            // The widest gap is 1 - 0.6962 at the negative end; roundings add a few ulp.
            prop_assert!((value - got).abs() <= absmax[i / 64] * (0.303_81 / 2.0 + 1e-6));
        }
    }

    #[test]
    fn widening_is_exact(v in any::<u16>()) {
        let (h, b) = (f16::from_bits(v), bf16::from_bits(v));
        prop_assume!(!h.is_nan() && !b.is_nan());
        prop_assert_eq!(<f16 as Element>::from_f32(Element::to_f32(h)), h);
        prop_assert_eq!(<bf16 as Element>::from_f32(Element::to_f32(b)), b);
    }
}
