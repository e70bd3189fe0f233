//! A packed weight as Python passes it.

use ferrolora_core::codec::spec::{Packed, Scales};
use ferrolora_core::linear::Weight;
use pyo3::prelude::*;

use crate::buffer::Buffer;
use crate::quantize::{StoredScales, spec};

type Tensor<'py> = Bound<'py, PyAny>;

/// The tensors of a quantized weight `[n, k]`, checked one by one.
pub struct StoredWeight<'py> {
    codes: Buffer<'py>,
    scales: StoredScales<'py>,
    quant_type: String,
    block_size: usize,
    n: usize,
    k: usize,
}

impl<'py> StoredWeight<'py> {
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        codes: Tensor<'py>,
        absmax: Tensor<'py>,
        nested_absmax: Option<Tensor<'py>>,
        offset: f32,
        quant_type: String,
        block_size: usize,
        n: usize,
        k: usize,
    ) -> PyResult<Self> {
        let scales = StoredScales::new(absmax, nested_absmax, offset)?;
        Ok(Self { codes: Buffer::new(codes, "codes")?, scales, quant_type, block_size, n, k })
    }

    /// Its slices, which need no interpreter.
    pub fn parts(&self, py: Python<'_>) -> PyResult<Parts<'_>> {
        let storage = if self.quant_type == "int8" {
            Storage::Int8(self.codes.i8(py)?, self.scales.plain(py)?)
        } else {
            Storage::FourBit(self.codes.u8(py)?, self.scales.get(py)?, &self.quant_type, self.block_size)
        };
        Ok(Parts { storage, n: self.n, k: self.k })
    }
}

/// The slices of a [`StoredWeight`].
pub struct Parts<'a> {
    storage: Storage<'a>,
    n: usize,
    k: usize,
}

enum Storage<'a> {
    FourBit(&'a [u8], Scales<'a>, &'a str, usize),
    Int8(&'a [i8], &'a [f32]),
}

impl<'a> Parts<'a> {
    /// The weight, if the slices fit the shape.
    pub fn weight(&self) -> ferrolora_core::Result<Weight<'a>> {
        match self.storage {
            Storage::FourBit(codes, scales, quant_type, block_size) => {
                let numel = self.n.saturating_mul(self.k);
                Weight::four_bit(Packed::new(codes, scales, spec(quant_type, block_size)?, numel)?, self.n, self.k)
            }
            Storage::Int8(codes, scb) => Weight::int8(codes, scb, self.n, self.k),
        }
    }
}
