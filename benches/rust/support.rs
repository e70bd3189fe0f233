//! What the benchmarks share: their settings, their instruction sets, their inputs.

use std::time::Duration;

use criterion::Criterion;
use ferrolora_core::Exec;
use ferrolora_core::codec::spec::{Packed, QuantSpec, QuantType, Scales};
use ferrolora_core::codec::{double_quant, quantize};
use ferrolora_core::dtype::{Floats, bf16};
use ferrolora_core::simd::IsaKind;

/// Ten samples of half a second together: hundreds of benchmarks end in minutes, and a kernel that got slower by
/// a fifth shows.
pub fn criterion() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500))
        .configure_from_args()
}

/// One thread on each instruction set of this machine, with its name. One, because these compare kernels;
/// `ferrolora bench` uses all.
pub fn executions() -> impl Iterator<Item = (&'static str, Exec)> {
    IsaKind::all().into_iter().map(|isa| (isa.name(), Exec { isa, threads: 1 }))
}

/// Deterministic values between -0.5 and 0.5.
pub fn values(count: usize) -> Vec<f32> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

/// [`values`] in bfloat16.
pub fn brains(count: usize) -> Vec<bf16> {
    values(count).into_iter().map(bf16::from_f32).collect()
}

/// An NF4 tensor with blocks of 64 and double quantization.
pub struct Nf4 {
    codes: Vec<u8>,
    absmax_codes: Vec<u8>,
    nested_absmax: Vec<f32>,
    offset: f32,
    numel: usize,
}

/// NF4 with blocks of 64.
pub fn nf4() -> QuantSpec {
    QuantSpec::new(QuantType::Nf4, 64).expect("a block size of the list")
}

impl Nf4 {
    /// [`values`], quantized.
    pub fn new(numel: usize) -> Self {
        let exec = Exec::new(1).expect("an instruction set");
        let blocks = nf4().blocks(numel);
        let (mut codes, mut absmax) = (vec![0; numel.div_ceil(2)], vec![0.0; blocks]);
        quantize::quantize_4bit(&exec, Floats::F32(&values(numel)), nf4(), &mut codes, &mut absmax, "w")
            .expect("finite");
        let (mut absmax_codes, mut nested_absmax) = (vec![0; blocks], vec![0.0; blocks.div_ceil(256)]);
        let offset =
            double_quant::double_quantize(&exec, &absmax, &mut absmax_codes, &mut nested_absmax).expect("finite");
        Self { codes, absmax_codes, nested_absmax, offset, numel }
    }

    /// The tensor.
    pub fn packed(&self) -> Packed<'_> {
        let scales =
            Scales::Double { codes: &self.absmax_codes, nested_absmax: &self.nested_absmax, offset: self.offset };
        Packed::new(&self.codes, scales, nf4(), self.numel).expect("buffers that fit")
    }
}
