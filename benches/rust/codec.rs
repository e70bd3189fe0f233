//! Elements a second of the codecs: `cargo bench --bench codec`, or `-- <part of a name>`.

mod support;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use ferrolora_core::codec::int8::Int8Matrix;
use ferrolora_core::codec::{blockwise8, dequantize, double_quant, int8, quantize};
use ferrolora_core::dtype::{Floats, FloatsMut, bf16};
use support::{Nf4, brains, executions, nf4, values};

/// A matrix that no second-level cache holds, decoded.
const ROWS: usize = 1024;
const COLS: usize = 4096;
const NUMEL: usize = ROWS * COLS;

/// Block of the 8-bit block-wise codec, bitsandbytes' default for optimizer states.
const BLOCK_8BIT: usize = 256;

fn group<'c>(criterion: &'c mut Criterion, name: &str, elements: usize) -> BenchmarkGroup<'c, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(elements as u64));
    group
}

fn quantize_4bit(criterion: &mut Criterion) {
    let (wide, narrow) = (values(NUMEL), brains(NUMEL));
    let (mut codes, mut absmax) = (vec![0; NUMEL / 2], vec![0.0; nf4().blocks(NUMEL)]);
    let mut group = group(criterion, "quantize_4bit", NUMEL);
    for (isa, exec) in executions() {
        for (name, src) in [("float32", Floats::F32(&wide)), ("bfloat16", Floats::Bf16(&narrow))] {
            group.bench_function(BenchmarkId::new(name, isa), |bencher| {
                bencher.iter(|| quantize::quantize_4bit(&exec, src, nf4(), &mut codes, &mut absmax, "w"));
            });
        }
    }
}

/// Into an output that was written before, and into a fresh one, whose pages the system must first provide.
fn dequantize_4bit(criterion: &mut Criterion) {
    let tensor = Nf4::new(NUMEL);
    let (mut wide, mut narrow) = (vec![0.0; NUMEL], vec![bf16::ZERO; NUMEL]);
    let mut group = group(criterion, "dequantize_4bit", NUMEL);
    for (isa, exec) in executions() {
        group.bench_function(BenchmarkId::new("float32", isa), |bencher| {
            bencher.iter(|| dequantize::dequantize_4bit(&exec, &tensor.packed(), FloatsMut::F32(&mut wide)));
        });
        group.bench_function(BenchmarkId::new("bfloat16", isa), |bencher| {
            bencher.iter(|| dequantize::dequantize_4bit(&exec, &tensor.packed(), FloatsMut::Bf16(&mut narrow)));
        });
        group.bench_function(BenchmarkId::new("float32, fresh", isa), |bencher| {
            bencher.iter_with_large_drop(|| {
                let mut out = vec![0.0; NUMEL];
                dequantize::dequantize_4bit(&exec, &tensor.packed(), FloatsMut::F32(&mut out)).map(|()| out)
            });
        });
    }
}

/// Decoding in cache: what the matrix products do, a piece at a time.
fn dequantize_4bit_in_cache(criterion: &mut Criterion) {
    const PIECE: usize = 4096;
    let tensor = Nf4::new(PIECE);
    let (mut wide, mut narrow) = (vec![0.0; PIECE], vec![bf16::ZERO; PIECE]);
    let mut group = group(criterion, "dequantize_4bit in cache", PIECE);
    for (isa, exec) in executions() {
        group.bench_function(BenchmarkId::new("float32", isa), |bencher| {
            bencher.iter(|| dequantize::dequantize_4bit(&exec, &tensor.packed(), FloatsMut::F32(&mut wide)));
        });
        group.bench_function(BenchmarkId::new("bfloat16", isa), |bencher| {
            bencher.iter(|| dequantize::dequantize_4bit(&exec, &tensor.packed(), FloatsMut::Bf16(&mut narrow)));
        });
    }
}

fn double_quantize(criterion: &mut Criterion) {
    let absmax: Vec<f32> = values(NUMEL / 64).into_iter().map(f32::abs).collect();
    let (mut codes, mut nested) = (vec![0; absmax.len()], vec![0.0; absmax.len() / 256]);
    let mut group = group(criterion, "double_quantize", absmax.len());
    for (isa, exec) in executions() {
        group.bench_function(isa, |bencher| {
            bencher.iter(|| double_quant::double_quantize(&exec, &absmax, &mut codes, &mut nested));
        });
    }
}

fn blockwise_8bit(criterion: &mut Criterion) {
    let src = values(NUMEL);
    let (mut codes, mut absmax) = (vec![0; NUMEL], vec![0.0; NUMEL / BLOCK_8BIT]);
    let mut out = vec![0.0; NUMEL];
    let mut group = group(criterion, "blockwise_8bit", NUMEL);
    for (isa, exec) in executions() {
        group.bench_function(BenchmarkId::new("quantize", isa), |bencher| {
            bencher.iter(|| {
                let src = Floats::F32(&src);
                blockwise8::quantize_blockwise(&exec, src, BLOCK_8BIT, &mut codes, &mut absmax, "w")
            });
        });
        group.bench_function(BenchmarkId::new("dequantize", isa), |bencher| {
            bencher.iter(|| {
                let out = FloatsMut::F32(&mut out);
                blockwise8::dequantize_blockwise(&exec, &codes, &absmax, BLOCK_8BIT, out)
            });
        });
    }
}

fn int8_rows(criterion: &mut Criterion) {
    let src = values(NUMEL);
    let (mut codes, mut scb) = (vec![0; NUMEL], vec![0.0; ROWS]);
    let mut out = vec![0.0; NUMEL];
    let mut group = group(criterion, "int8", NUMEL);
    for (isa, exec) in executions() {
        group.bench_function(BenchmarkId::new("quantize", isa), |bencher| {
            bencher.iter(|| int8::quantize_int8(&exec, Floats::F32(&src), &mut codes, &mut scb, "w"));
        });
        group.bench_function(BenchmarkId::new("dequantize", isa), |bencher| {
            let matrix = Int8Matrix::new(&codes, &scb, ROWS, COLS).expect("buffers that fit");
            bencher.iter(|| int8::dequantize_int8(&exec, &matrix, FloatsMut::F32(&mut out)));
        });
    }
}

fn main() {
    let mut criterion = support::criterion();
    quantize_4bit(&mut criterion);
    dequantize_4bit(&mut criterion);
    dequantize_4bit_in_cache(&mut criterion);
    double_quantize(&mut criterion);
    blockwise_8bit(&mut criterion);
    int8_rows(&mut criterion);
    criterion.final_summary();
}
