//! Quantize and dequantize.

use ferrolora_core::codec::int8::{self, Int8Matrix};
use ferrolora_core::codec::spec::{Packed, QuantSpec, Scales};
use ferrolora_core::codec::{blockwise8, dequantize, double_quant, quantize};
use ferrolora_core::{Exec, Result};
use pyo3::prelude::*;

use crate::buffer::Buffer;
use crate::error::detached;

type Tensor<'py> = Bound<'py, PyAny>;

/// Name of a tensor in errors when the caller gave none.
const UNNAMED: &str = "the tensor";

pub fn spec(quant_type: &str, block_size: usize) -> Result<QuantSpec> {
    QuantSpec::new(quant_type.parse()?, block_size)
}

/// Stored scales: float32, or uint8 codes with their nested absmax and offset.
pub struct StoredScales<'py> {
    absmax: Buffer<'py>,
    nested_absmax: Option<Buffer<'py>>,
    offset: f32,
}

impl<'py> StoredScales<'py> {
    pub fn new(absmax: Tensor<'py>, nested_absmax: Option<Tensor<'py>>, offset: f32) -> PyResult<Self> {
        Ok(Self {
            absmax: Buffer::new(absmax, "absmax")?,
            nested_absmax: nested_absmax.map(|t| Buffer::new(t, "nested_absmax")).transpose()?,
            offset,
        })
    }

    pub fn get(&self, py: Python<'_>) -> PyResult<Scales<'_>> {
        match &self.nested_absmax {
            Some(nested) => {
                Ok(Scales::Double { codes: self.absmax.u8(py)?, nested_absmax: nested.f32(py)?, offset: self.offset })
            }
            None => Ok(Scales::Plain(self.absmax.f32(py)?)),
        }
    }

    /// The tensors that hold the scales.
    fn buffers(&self) -> impl Iterator<Item = &Buffer<'py>> {
        std::iter::once(&self.absmax).chain(&self.nested_absmax)
    }

    /// As the SCB of int8, which is always float32.
    pub fn plain(&self, py: Python<'_>) -> PyResult<&[f32]> {
        self.absmax.f32(py)
    }
}

/// Writes the 4-bit codes and the absmax of each block of x.
#[pyfunction]
#[pyo3(signature = (x, quant_type, block_size, codes, absmax, threads, name=None))]
#[allow(clippy::too_many_arguments)]
fn quantize_4bit<'py>(
    py: Python<'py>,
    x: Tensor<'py>,
    quant_type: &str,
    block_size: usize,
    codes: Tensor<'py>,
    absmax: Tensor<'py>,
    threads: usize,
    name: Option<&str>,
) -> PyResult<()> {
    let x = Buffer::new(x, "x")?;
    let (mut codes, mut absmax) = (Buffer::new(codes, "codes")?, Buffer::new(absmax, "absmax")?);
    let (x, codes, absmax) = (x.floats(py)?, codes.u8_mut(py)?, absmax.f32_mut(py)?);
    detached(py, || {
        let (exec, spec) = (Exec::new(threads)?, spec(quant_type, block_size)?);
        quantize::quantize_4bit(&exec, x, spec, codes, absmax, name.unwrap_or(UNNAMED))
    })
}

/// Writes the 8-bit codes of the absmax values and their nested absmax; returns the offset.
#[pyfunction]
fn double_quantize<'py>(
    py: Python<'py>,
    absmax: Tensor<'py>,
    codes: Tensor<'py>,
    nested_absmax: Tensor<'py>,
    threads: usize,
) -> PyResult<f32> {
    let absmax = Buffer::new(absmax, "absmax")?;
    let (mut codes, mut nested) = (Buffer::new(codes, "codes")?, Buffer::new(nested_absmax, "nested_absmax")?);
    let (absmax, codes, nested) = (absmax.f32(py)?, codes.u8_mut(py)?, nested.f32_mut(py)?);
    detached(py, || double_quant::double_quantize(&Exec::new(threads)?, absmax, codes, nested))
}

/// Writes the values of a 4-bit tensor.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn dequantize_4bit<'py>(
    py: Python<'py>,
    codes: Tensor<'py>,
    absmax: Tensor<'py>,
    nested_absmax: Option<Tensor<'py>>,
    offset: f32,
    quant_type: &str,
    block_size: usize,
    out: Tensor<'py>,
    threads: usize,
) -> PyResult<()> {
    let (codes, mut out) = (Buffer::new(codes, "codes")?, Buffer::new(out, "out")?);
    let scales = StoredScales::new(absmax, nested_absmax, offset)?;
    let inputs: Vec<_> = scales.buffers().chain([&codes]).collect();
    out.apart_from(py, &inputs)?;
    let numel = out.numel();
    let (codes, scales, out) = (codes.u8(py)?, scales.get(py)?, out.floats_mut(py)?);
    detached(py, || {
        let packed = Packed::new(codes, scales, spec(quant_type, block_size)?, numel)?;
        dequantize::dequantize_4bit(&Exec::new(threads)?, &packed, out)
    })
}

/// Writes the row-wise int8 codes of x and the SCB of each row.
#[pyfunction]
#[pyo3(signature = (x, codes, scb, threads, name=None))]
fn quantize_int8<'py>(
    py: Python<'py>,
    x: Tensor<'py>,
    codes: Tensor<'py>,
    scb: Tensor<'py>,
    threads: usize,
    name: Option<&str>,
) -> PyResult<()> {
    let x = Buffer::new(x, "x")?;
    let (mut codes, mut scb) = (Buffer::new(codes, "codes")?, Buffer::new(scb, "scb")?);
    let (x, codes, scb) = (x.floats(py)?, codes.i8_mut(py)?, scb.f32_mut(py)?);
    detached(py, || int8::quantize_int8(&Exec::new(threads)?, x, codes, scb, name.unwrap_or(UNNAMED)))
}

/// Writes the values of a row-wise int8 matrix.
#[pyfunction]
fn dequantize_int8<'py>(
    py: Python<'py>,
    codes: Tensor<'py>,
    scb: Tensor<'py>,
    out: Tensor<'py>,
    threads: usize,
) -> PyResult<()> {
    let (codes, scb) = (Buffer::new(codes, "codes")?, Buffer::new(scb, "scb")?);
    let mut out = Buffer::new(out, "out")?;
    out.apart_from(py, &[&codes, &scb])?;
    let (codes, scb, out) = (codes.i8(py)?, scb.f32(py)?, out.floats_mut(py)?);
    detached(py, || {
        let cols = codes.len().checked_div(scb.len()).unwrap_or(0);
        let matrix = Int8Matrix::new(codes, scb, scb.len(), cols)?;
        int8::dequantize_int8(&Exec::new(threads)?, &matrix, out)
    })
}

/// Writes the 8-bit dynamic codes of x and the absmax of each block.
#[pyfunction]
#[pyo3(signature = (x, block_size, codes, absmax, threads, name=None))]
fn quantize_blockwise<'py>(
    py: Python<'py>,
    x: Tensor<'py>,
    block_size: usize,
    codes: Tensor<'py>,
    absmax: Tensor<'py>,
    threads: usize,
    name: Option<&str>,
) -> PyResult<()> {
    let x = Buffer::new(x, "x")?;
    let (mut codes, mut absmax) = (Buffer::new(codes, "codes")?, Buffer::new(absmax, "absmax")?);
    let (x, codes, absmax) = (x.floats(py)?, codes.u8_mut(py)?, absmax.f32_mut(py)?);
    detached(py, || {
        let exec = Exec::new(threads)?;
        blockwise8::quantize_blockwise(&exec, x, block_size, codes, absmax, name.unwrap_or(UNNAMED))
    })
}

/// Writes the values of an 8-bit block-wise tensor.
#[pyfunction]
fn dequantize_blockwise<'py>(
    py: Python<'py>,
    codes: Tensor<'py>,
    absmax: Tensor<'py>,
    block_size: usize,
    out: Tensor<'py>,
    threads: usize,
) -> PyResult<()> {
    let (codes, absmax) = (Buffer::new(codes, "codes")?, Buffer::new(absmax, "absmax")?);
    let mut out = Buffer::new(out, "out")?;
    out.apart_from(py, &[&codes, &absmax])?;
    let (codes, absmax, out) = (codes.u8(py)?, absmax.f32(py)?, out.floats_mut(py)?);
    detached(py, || blockwise8::dequantize_blockwise(&Exec::new(threads)?, codes, absmax, block_size, out))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(quantize_4bit, module)?)?;
    module.add_function(wrap_pyfunction!(double_quantize, module)?)?;
    module.add_function(wrap_pyfunction!(dequantize_4bit, module)?)?;
    module.add_function(wrap_pyfunction!(quantize_int8, module)?)?;
    module.add_function(wrap_pyfunction!(dequantize_int8, module)?)?;
    module.add_function(wrap_pyfunction!(quantize_blockwise, module)?)?;
    module.add_function(wrap_pyfunction!(dequantize_blockwise, module)?)
}
