//! Operations a second of the matrix products: `cargo bench --bench linear`, or `-- <part of a name>`.

mod support;

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use ferrolora_core::dtype::{Floats, FloatsMut, bf16};
use ferrolora_core::linear::{Dropout, Gradients, LoraGradients, LowRank, Weight, backward, forward};
use support::{Nf4, brains, executions, values};

/// Features of the square weight: its codes fit in a second-level cache, its decoded form does not.
const SIZE: usize = 1024;

/// Rank of the branch.
const RANK: usize = 16;

/// Rows of x: one token, a few, and training batches.
const ROWS: [usize; 5] = [1, 8, 16, 128, 512];

fn weight(tensor: &Nf4) -> Weight<'_> {
    Weight::four_bit(tensor.packed(), SIZE, SIZE).expect("a tensor of the shape")
}

/// A multiplication and an addition for each row and each element of the weight.
fn operations(rows: usize) -> Throughput {
    Throughput::Elements((2 * rows * SIZE * SIZE) as u64)
}

fn linear_forward(criterion: &mut Criterion) {
    let tensor = Nf4::new(SIZE * SIZE);
    let weight = weight(&tensor);
    let mut group = criterion.benchmark_group("forward");
    group.sampling_mode(SamplingMode::Flat);
    for (isa, exec) in executions() {
        for rows in ROWS {
            let (wide, narrow) = (values(rows * SIZE), brains(rows * SIZE));
            let (mut y, mut y_narrow) = (vec![0.0; rows * SIZE], vec![bf16::ZERO; rows * SIZE]);
            group.throughput(operations(rows));
            group.bench_function(BenchmarkId::new(format!("float32, {isa}"), rows), |bencher| {
                bencher.iter(|| {
                    forward(&exec, rows, Floats::F32(&wide), &weight, None, None, FloatsMut::F32(&mut y), None)
                });
            });
            group.bench_function(BenchmarkId::new(format!("bfloat16, {isa}"), rows), |bencher| {
                bencher.iter(|| {
                    let y = FloatsMut::Bf16(&mut y_narrow);
                    forward(&exec, rows, Floats::Bf16(&narrow), &weight, None, None, y, None)
                });
            });
        }
    }
}

fn dx(criterion: &mut Criterion) {
    let tensor = Nf4::new(SIZE * SIZE);
    let weight = weight(&tensor);
    let mut group = criterion.benchmark_group("backward, dX");
    group.sampling_mode(SamplingMode::Flat);
    for (isa, exec) in executions() {
        for rows in [128, 512] {
            let (dy, mut dx) = (values(rows * SIZE), vec![0.0; rows * SIZE]);
            group.throughput(operations(rows));
            group.bench_function(BenchmarkId::new(isa, rows), |bencher| {
                bencher.iter(|| {
                    let gradients = Gradients { dx: Some(FloatsMut::F32(&mut dx)), lora: None };
                    backward(&exec, rows, Floats::F32(&dy), &weight, gradients)
                });
            });
        }
    }
}

/// Forward and the whole backward with the low-rank branch; the operations counted are the frozen weight's.
fn lora(criterion: &mut Criterion) {
    let rows = 128;
    let tensor = Nf4::new(SIZE * SIZE);
    let weight = weight(&tensor);
    let (a, b, x) = (values(RANK * SIZE), values(SIZE * RANK), values(rows * SIZE));
    let dropout = Dropout::new(0.0, 0).expect("a probability");
    let branch = LowRank::new((Floats::F32(&a), Floats::F32(&b)), RANK, (SIZE, SIZE), 2.0, dropout).expect("a branch");
    let (mut y, mut s, mut dx) = (vec![0.0; rows * SIZE], vec![0.0; rows * RANK], vec![0.0; rows * SIZE]);
    let (mut da, mut db) = (vec![0.0; RANK * SIZE], vec![0.0; SIZE * RANK]);
    let mut group = criterion.benchmark_group("LoRA, 128 rows");
    group.sampling_mode(SamplingMode::Flat).throughput(operations(rows));
    for (isa, exec) in executions() {
        group.bench_function(BenchmarkId::new("forward", isa), |bencher| {
            bencher.iter(|| {
                let (y, s) = (FloatsMut::F32(&mut y), Some(FloatsMut::F32(&mut s)));
                forward(&exec, rows, Floats::F32(&x), &weight, None, Some(&branch), y, s)
            });
        });
        group.bench_function(BenchmarkId::new("backward", isa), |bencher| {
            bencher.iter(|| {
                let gradients = LoraGradients {
                    lora: &branch,
                    x: Some(Floats::F32(&x)),
                    s: Some(Floats::F32(&s)),
                    da: Some(FloatsMut::F32(&mut da)),
                    db: Some(FloatsMut::F32(&mut db)),
                };
                let gradients = Gradients { dx: Some(FloatsMut::F32(&mut dx)), lora: Some(gradients) };
                backward(&exec, rows, Floats::F32(&y), &weight, gradients)
            });
        });
    }
}

fn main() {
    let mut criterion = support::criterion();
    linear_forward(&mut criterion);
    dx(&mut criterion);
    lora(&mut criterion);
    criterion.final_summary();
}
