//! The codec against the golden vectors: bytes that other readers and writers of the format define.
//! `tests/golden/README.md` says how they are made and what they hold.

use std::collections::HashMap;
use std::path::Path;

use ferrolora_core::Exec;
use ferrolora_core::codec::int8::Int8Matrix;
use ferrolora_core::codec::spec::{Packed, QuantSpec, Scales};
use ferrolora_core::codec::{blockwise8, dequantize, double_quant, int8, quantize};
use ferrolora_core::dtype::{Floats, FloatsMut, bf16, f16};
use ferrolora_core::simd::IsaKind;

struct Record(HashMap<String, String>);

impl Record {
    fn read(file: &str) -> Vec<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(file);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let line = |line: &str| line.split_once(' ').map(|(k, v)| (k.to_owned(), v.to_owned()));
        text.trim().split("\n\n").map(|block| Self(block.lines().filter_map(line).collect())).collect()
    }

    fn word(&self, key: &str) -> &str {
        self.0.get(key).unwrap_or_else(|| panic!("{} has no {key}", self.0["case"]))
    }

    fn number(&self, key: &str) -> usize {
        self.word(key).parse().expect("a decimal integer")
    }

    fn bytes(&self, key: &str) -> Vec<u8> {
        let hex = self.0.get(key).map_or("", String::as_str);
        (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).expect("hex")).collect()
    }

    fn bits32(&self, key: &str) -> Vec<u32> {
        self.bytes(key).as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
    }

    fn bits16(&self, key: &str) -> Vec<u16> {
        self.bytes(key).as_chunks().0.iter().map(|b| u16::from_le_bytes(*b)).collect()
    }

    fn f32(&self, key: &str) -> Vec<f32> {
        self.bits32(key).into_iter().map(f32::from_bits).collect()
    }
}

/// The input of a record, in its own type.
enum Input {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Input {
    fn of(record: &Record) -> Self {
        match record.word("dtype") {
            "float32" => Self::F32(record.f32("input")),
            "float16" => Self::F16(record.bits16("input").into_iter().map(f16::from_bits).collect()),
            "bfloat16" => Self::Bf16(record.bits16("input").into_iter().map(bf16::from_bits).collect()),
            other => panic!("dtype {other}"),
        }
    }

    fn floats(&self) -> Floats<'_> {
        match self {
            Self::F32(v) => Floats::F32(v),
            Self::F16(v) => Floats::F16(v),
            Self::Bf16(v) => Floats::Bf16(v),
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Calls `check` for every record of `file` on every instruction set of this machine.
fn for_each(file: &str, check: impl Fn(&Exec, &Record)) {
    let records = Record::read(file);
    assert!(records.len() > 3, "{file} holds {} records", records.len());
    for isa in IsaKind::available() {
        for record in &records {
            check(&Exec { isa, threads: 2 }, record);
        }
    }
}

fn four_bit(exec: &Exec, record: &Record) {
    let case = record.word("case");
    let spec = QuantSpec::new(record.word("quant_type").parse().expect("a type"), record.number("block_size"));
    let (spec, input) = (spec.expect("a block size"), Input::of(record));
    let numel = record.number("numel");
    let (mut codes, mut absmax) = (vec![0; numel.div_ceil(2)], vec![0.0; spec.blocks(numel)]);
    quantize::quantize_4bit(exec, input.floats(), spec, &mut codes, &mut absmax, case).expect("finite");
    assert_eq!(codes, record.bytes("codes"), "{case}");
    assert_eq!(bits(&absmax), record.bits32("absmax"), "{case}");
    let (mut nested, mut nested_absmax) = (vec![0; absmax.len()], vec![0.0; absmax.len().div_ceil(256)]);
    let offset = double_quant::double_quantize(exec, &absmax, &mut nested, &mut nested_absmax).expect("fits");
    assert_eq!(nested, record.bytes("nested_codes"), "{case}");
    assert_eq!(bits(&nested_absmax), record.bits32("nested_absmax"), "{case}");
    assert_eq!(vec![offset.to_bits()], record.bits32("offset"), "{case}");

    let packed = Packed::new(&codes, Scales::Plain(&absmax), spec, numel).expect("fits");
    let mut wide = vec![f32::NAN; numel];
    dequantize::dequantize_4bit(exec, &packed, FloatsMut::F32(&mut wide)).expect("fits");
    assert_eq!(bits(&wide), record.bits32("decoded_float32"), "{case}");
    if record.0.contains_key("decoded_nested_float32") {
        let mut half = vec![f16::NAN; numel];
        dequantize::dequantize_4bit(exec, &packed, FloatsMut::F16(&mut half)).expect("fits");
        assert_eq!(half.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), record.bits16("decoded_float16"), "{case}");
        let mut brain = vec![bf16::NAN; numel];
        dequantize::dequantize_4bit(exec, &packed, FloatsMut::Bf16(&mut brain)).expect("fits");
        assert_eq!(brain.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), record.bits16("decoded_bfloat16"), "{case}");
        let scales = Scales::Double { codes: &nested, nested_absmax: &nested_absmax, offset };
        let packed = Packed::new(&codes, scales, spec, numel).expect("fits");
        dequantize::dequantize_4bit(exec, &packed, FloatsMut::F32(&mut wide)).expect("fits");
        assert_eq!(bits(&wide), record.bits32("decoded_nested_float32"), "{case}");
    }
}

#[test]
fn nf4_bytes_are_the_published_ones() {
    for_each("nf4.txt", four_bit);
}

#[test]
fn fp4_bytes_are_the_published_ones() {
    for_each("fp4.txt", four_bit);
}

#[test]
fn double_quantized_scales_are_the_published_ones() {
    for_each("double_quant.txt", |exec, record| {
        let (case, absmax) = (record.word("case"), record.f32("absmax"));
        let (mut codes, mut nested) = (vec![0; absmax.len()], vec![0.0; absmax.len().div_ceil(256)]);
        let offset = double_quant::double_quantize(exec, &absmax, &mut codes, &mut nested).expect("fits");
        assert_eq!(vec![offset.to_bits()], record.bits32("offset"), "{case}");
        assert_eq!(codes, record.bytes("nested_codes"), "{case}");
        assert_eq!(bits(&nested), record.bits32("nested_absmax"), "{case}");
        let scales = Scales::Double { codes: &codes, nested_absmax: &nested, offset };
        let decoded: Vec<u32> = (0..absmax.len()).map(|i| scales.get(i).to_bits()).collect();
        assert_eq!(decoded, record.bits32("decoded_float32"), "{case}");
    });
}

#[test]
fn dynamic_8_bit_bytes_are_the_published_ones() {
    for_each("dynamic8.txt", |exec, record| {
        let (case, block_size, numel) = (record.word("case"), record.number("block_size"), record.number("numel"));
        let input = Input::of(record);
        let (mut codes, mut absmax) = (vec![0; numel], vec![0.0; numel.div_ceil(block_size)]);
        blockwise8::quantize_blockwise(exec, input.floats(), block_size, &mut codes, &mut absmax, case)
            .expect("finite");
        assert_eq!(codes, record.bytes("codes"), "{case}");
        assert_eq!(bits(&absmax), record.bits32("absmax"), "{case}");
        let mut wide = vec![f32::NAN; numel];
        blockwise8::dequantize_blockwise(exec, &codes, &absmax, block_size, FloatsMut::F32(&mut wide)).expect("fits");
        assert_eq!(bits(&wide), record.bits32("decoded_float32"), "{case}");
    });
}

#[test]
fn int8_bytes_are_the_published_ones() {
    for_each("int8.txt", |exec, record| {
        let (case, rows, cols) = (record.word("case"), record.number("rows"), record.number("columns"));
        let input = Input::of(record);
        let (mut codes, mut scb) = (vec![0; rows * cols], vec![0.0; rows]);
        int8::quantize_int8(exec, input.floats(), &mut codes, &mut scb, case).expect("finite");
        let expected: Vec<i8> = record.bytes("codes").into_iter().map(u8::cast_signed).collect();
        assert_eq!(codes, expected, "{case}");
        assert_eq!(bits(&scb), record.bits32("absmax"), "{case}");
        let mut wide = vec![f32::NAN; rows * cols];
        let matrix = Int8Matrix::new(&codes, &scb, rows, cols).expect("fits");
        int8::dequantize_int8(exec, &matrix, FloatsMut::F32(&mut wide)).expect("fits");
        assert_eq!(bits(&wide), record.bits32("decoded_float32"), "{case}");
    });
}
