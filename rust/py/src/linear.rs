//! The fused linear: forward and backward, with and without the low-rank branch.

use ferrolora_core::dtype::{Floats, FloatsMut};
use ferrolora_core::linear::dropout::dropout_mask as core_dropout_mask;
use ferrolora_core::linear::{self as core, Dropout, Gradients, LoraGradients, LowRank, RowRanks};
use ferrolora_core::{Exec, Result};
use pyo3::prelude::*;

use crate::buffer::Buffer;
use crate::error::detached;
use crate::weight::StoredWeight;

type Tensor<'py> = Bound<'py, PyAny>;

/// Rows of `numel` elements in rows of `cols`.
fn rows(numel: usize, cols: usize) -> usize {
    numel.checked_div(cols).unwrap_or(0)
}

/// Rank of `lora_a [r, K]` and `lora_b [N, r]`, whichever side has elements.
pub fn rank(lora_a: &Floats<'_>, lora_b: &Floats<'_>, n: usize, k: usize) -> usize {
    lora_a.len().checked_div(k).unwrap_or_else(|| rows(lora_b.len(), n))
}

/// The branch of which each `m / row_ranks.len()` rows after one another use the ranks `start..end` of one pair of
/// `row_ranks`; all rows use all of it if there are none.
fn of_rows(lora: LowRank<'_>, row_ranks: Vec<(usize, usize)>, m: usize) -> Result<LowRank<'_>> {
    if row_ranks.is_empty() {
        return Ok(lora);
    }
    let spans = row_ranks.into_iter().map(|(start, end)| start..end).collect();
    let row_ranks = RowRanks::new(spans, m, lora.rank())?;
    lora.of_rows(row_ranks)
}

/// Writes `y = x·deq(W)ᵀ + bias`.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn linear<'py>(
    py: Python<'py>,
    x: Tensor<'py>,
    codes: Tensor<'py>,
    absmax: Tensor<'py>,
    nested_absmax: Option<Tensor<'py>>,
    offset: f32,
    quant_type: String,
    block_size: usize,
    n: usize,
    k: usize,
    bias: Option<Tensor<'py>>,
    y: Tensor<'py>,
    threads: usize,
) -> PyResult<()> {
    let stored = StoredWeight::new(codes, absmax, nested_absmax, offset, quant_type, block_size, n, k)?;
    let weight = stored.parts(py)?;
    let (x, mut y) = (Buffer::new(x, "x")?, Buffer::new(y, "y")?);
    let bias = bias.map(|t| Buffer::new(t, "bias")).transpose()?;
    let (x, y) = (x.floats(py)?, y.floats_mut(py)?);
    let bias = bias.as_ref().map(|b| b.floats(py)).transpose()?;
    let m = if k > 0 { rows(x.len(), k) } else { rows(y.len(), n) };
    detached(py, || core::forward(&Exec::new(threads)?, m, x, &weight.weight()?, bias, None, y, None))
}

/// Writes `S = drop(x)·Aᵀ` and `y = x·deq(W)ᵀ + bias + scaling·S·Bᵀ`; `row_ranks` as [`of_rows`] says.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn linear_lora<'py>(
    py: Python<'py>,
    x: Tensor<'py>,
    codes: Tensor<'py>,
    absmax: Tensor<'py>,
    nested_absmax: Option<Tensor<'py>>,
    offset: f32,
    quant_type: String,
    block_size: usize,
    n: usize,
    k: usize,
    bias: Option<Tensor<'py>>,
    lora_a: Tensor<'py>,
    lora_b: Tensor<'py>,
    scaling: f32,
    dropout_p: f32,
    seed: i64,
    row_ranks: Vec<(usize, usize)>,
    y: Tensor<'py>,
    s: Tensor<'py>,
    threads: usize,
) -> PyResult<()> {
    let stored = StoredWeight::new(codes, absmax, nested_absmax, offset, quant_type, block_size, n, k)?;
    let weight = stored.parts(py)?;
    let (x, mut y, mut s) = (Buffer::new(x, "x")?, Buffer::new(y, "y")?, Buffer::new(s, "s")?);
    let (lora_a, lora_b) = (Buffer::new(lora_a, "lora_A")?, Buffer::new(lora_b, "lora_B")?);
    let bias = bias.map(|t| Buffer::new(t, "bias")).transpose()?;
    let (x, y, s) = (x.floats(py)?, y.floats_mut(py)?, s.floats_mut(py)?);
    let (lora_a, lora_b) = (lora_a.floats(py)?, lora_b.floats(py)?);
    let bias = bias.as_ref().map(|b| b.floats(py)).transpose()?;
    let m = if k > 0 { rows(x.len(), k) } else { rows(y.len(), n) };
    detached(py, || {
        let dropout = Dropout::new(dropout_p, seed.cast_unsigned())?;
        let lora = LowRank::new((lora_a, lora_b), rank(&lora_a, &lora_b, n, k), (n, k), scaling, dropout)?;
        let lora = of_rows(lora, row_ranks, m)?;
        core::forward(&Exec::new(threads)?, m, x, &weight.weight()?, bias, Some(&lora), y, Some(s))
    })
}

/// Writes `dx = dy·deq(W)`.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn linear_backward<'py>(
    py: Python<'py>,
    dy: Tensor<'py>,
    codes: Tensor<'py>,
    absmax: Tensor<'py>,
    nested_absmax: Option<Tensor<'py>>,
    offset: f32,
    quant_type: String,
    block_size: usize,
    n: usize,
    k: usize,
    dx: Tensor<'py>,
    threads: usize,
) -> PyResult<()> {
    let stored = StoredWeight::new(codes, absmax, nested_absmax, offset, quant_type, block_size, n, k)?;
    let weight = stored.parts(py)?;
    let (dy, mut dx) = (Buffer::new(dy, "dy")?, Buffer::new(dx, "dx")?);
    let (dy, dx) = (dy.floats(py)?, dx.floats_mut(py)?);
    let m = if n > 0 { rows(dy.len(), n) } else { rows(dx.len(), k) };
    detached(py, || {
        core::backward(&Exec::new(threads)?, m, dy, &weight.weight()?, Gradients { dx: Some(dx), lora: None })
    })
}

/// Writes what is not None of dx, `da [r, K]` and `db [N, r]`. Only da needs x, only db needs s.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn linear_lora_backward<'py>(
    py: Python<'py>,
    dy: Tensor<'py>,
    x: Option<Tensor<'py>>,
    s: Option<Tensor<'py>>,
    codes: Tensor<'py>,
    absmax: Tensor<'py>,
    nested_absmax: Option<Tensor<'py>>,
    offset: f32,
    quant_type: String,
    block_size: usize,
    n: usize,
    k: usize,
    lora_a: Tensor<'py>,
    lora_b: Tensor<'py>,
    scaling: f32,
    dropout_p: f32,
    seed: i64,
    row_ranks: Vec<(usize, usize)>,
    dx: Option<Tensor<'py>>,
    da: Option<Tensor<'py>>,
    db: Option<Tensor<'py>>,
    threads: usize,
) -> PyResult<()> {
    let stored = StoredWeight::new(codes, absmax, nested_absmax, offset, quant_type, block_size, n, k)?;
    let weight = stored.parts(py)?;
    let dy = Buffer::new(dy, "dy")?;
    let x = x.map(|t| Buffer::new(t, "x")).transpose()?;
    let s = s.map(|t| Buffer::new(t, "s")).transpose()?;
    let (lora_a, lora_b) = (Buffer::new(lora_a, "lora_A")?, Buffer::new(lora_b, "lora_B")?);
    let mut dx = dx.map(|t| Buffer::new(t, "dx")).transpose()?;
    let mut da = da.map(|t| Buffer::new(t, "da")).transpose()?;
    let mut db = db.map(|t| Buffer::new(t, "db")).transpose()?;
    let dy = dy.floats(py)?;
    let x = x.as_ref().map(|b| b.floats(py)).transpose()?;
    let s = s.as_ref().map(|b| b.floats(py)).transpose()?;
    let (lora_a, lora_b) = (lora_a.floats(py)?, lora_b.floats(py)?);
    let dx = dx.as_mut().map(|b| b.floats_mut(py)).transpose()?;
    let da = da.as_mut().map(|b| b.floats_mut(py)).transpose()?;
    let db = db.as_mut().map(|b| b.floats_mut(py)).transpose()?;
    let inputs = x.map(|x| x.len()).or(dx.as_ref().map(FloatsMut::len));
    let m = if n > 0 { rows(dy.len(), n) } else { rows(inputs.unwrap_or(0), k) };
    detached(py, || {
        let dropout = Dropout::new(dropout_p, seed.cast_unsigned())?;
        let lora = LowRank::new((lora_a, lora_b), rank(&lora_a, &lora_b, n, k), (n, k), scaling, dropout)?;
        let lora = of_rows(lora, row_ranks, m)?;
        let branch = LoraGradients { lora: &lora, x, s, da, db };
        core::backward(&Exec::new(threads)?, m, dy, &weight.weight()?, Gradients { dx, lora: Some(branch) })
    })
}

/// Writes the mask that the kernels multiply a `[rows, cols]` input by: 0 or 1 / (1 - p).
#[pyfunction]
fn dropout_mask<'py>(py: Python<'py>, seed: i64, rows: usize, cols: usize, p: f32, out: Tensor<'py>) -> PyResult<()> {
    let mut out = Buffer::new(out, "out")?;
    let out = out.f32_mut(py)?;
    let mask = || -> Result<()> {
        core_dropout_mask(&Exec::new(1)?, Dropout::new(p, seed.cast_unsigned())?, (rows, cols), out)
    };
    detached(py, mask)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(linear, module)?)?;
    module.add_function(wrap_pyfunction!(linear_lora, module)?)?;
    module.add_function(wrap_pyfunction!(linear_backward, module)?)?;
    module.add_function(wrap_pyfunction!(linear_lora_backward, module)?)?;
    module.add_function(wrap_pyfunction!(dropout_mask, module)?)
}
