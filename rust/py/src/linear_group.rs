//! Linears that share x, in one call.

use ferrolora_core::dtype::{Floats, FloatsMut};
use ferrolora_core::linear::{self as core, Dropout, LoraGradients, LowRank, OutputGradient, Sibling};
use ferrolora_core::{Exec, Result};
use pyo3::prelude::*;

use crate::buffer::Buffer;
use crate::error::detached;
use crate::linear::rank;
use crate::weight::{Parts, StoredWeight};

type Tensor<'py> = Bound<'py, PyAny>;

/// A weight and its branch, by the attributes of a Python object.
#[derive(FromPyObject)]
struct Member<'py> {
    codes: Tensor<'py>,
    absmax: Tensor<'py>,
    nested_absmax: Option<Tensor<'py>>,
    offset: f32,
    quant_type: String,
    block_size: usize,
    n: usize,
    bias: Option<Tensor<'py>>,
    lora_a: Tensor<'py>,
    lora_b: Tensor<'py>,
    scaling: f32,
    dropout_p: f32,
    seed: i64,
}

/// A [`Member`], checked.
struct Stored<'py> {
    weight: StoredWeight<'py>,
    bias: Option<Buffer<'py>>,
    lora: (Buffer<'py>, Buffer<'py>),
    shape: (usize, usize),
    scaling: f32,
    dropout_p: f32,
    seed: i64,
}

impl<'py> Stored<'py> {
    fn new(member: Member<'py>, k: usize) -> PyResult<Self> {
        let Member { codes, absmax, nested_absmax, offset, quant_type, block_size, n, .. } = member;
        Ok(Self {
            weight: StoredWeight::new(codes, absmax, nested_absmax, offset, quant_type, block_size, n, k)?,
            bias: member.bias.map(|bias| Buffer::new(bias, "bias")).transpose()?,
            lora: (Buffer::new(member.lora_a, "lora_A")?, Buffer::new(member.lora_b, "lora_B")?),
            shape: (n, k),
            scaling: member.scaling,
            dropout_p: member.dropout_p,
            seed: member.seed,
        })
    }

    fn slices(&self, py: Python<'_>) -> PyResult<Slices<'_>> {
        Ok(Slices {
            weight: self.weight.parts(py)?,
            bias: self.bias.as_ref().map(|bias| bias.floats(py)).transpose()?,
            lora: (self.lora.0.floats(py)?, self.lora.1.floats(py)?),
            shape: self.shape,
            scaling: self.scaling,
            dropout: (self.dropout_p, self.seed),
        })
    }
}

/// The slices of a [`Stored`], which need no interpreter.
struct Slices<'a> {
    weight: Parts<'a>,
    bias: Option<Floats<'a>>,
    lora: (Floats<'a>, Floats<'a>),
    shape: (usize, usize),
    scaling: f32,
    dropout: (f32, i64),
}

impl<'a> Slices<'a> {
    fn low_rank(&self) -> Result<LowRank<'a>> {
        let (n, k) = self.shape;
        let dropout = Dropout::new(self.dropout.0, self.dropout.1.cast_unsigned())?;
        LowRank::new(self.lora, rank(&self.lora.0, &self.lora.1, n, k), (n, k), self.scaling, dropout)
    }
}

fn stored(members: Vec<Member<'_>>, k: usize) -> PyResult<Vec<Stored<'_>>> {
    members.into_iter().map(|member| Stored::new(member, k)).collect()
}

fn buffers<'py>(tensors: Vec<Tensor<'py>>, what: &'static str) -> PyResult<Vec<Buffer<'py>>> {
    tensors.into_iter().map(|tensor| Buffer::new(tensor, what)).collect()
}

/// Writes `s[i] = drop(x)·A[i]ᵀ` and `y[i] = x·deq(W[i])ᵀ + bias[i] + scaling·S·B[i]ᵀ` for x `[m, k]`.
#[pyfunction]
fn linear_group<'py>(
    py: Python<'py>,
    x: Tensor<'py>,
    shape: (usize, usize),
    members: Vec<Member<'py>>,
    y: Vec<Tensor<'py>>,
    s: Vec<Tensor<'py>>,
    threads: usize,
) -> PyResult<()> {
    let (m, k) = shape;
    let (x, stored) = (Buffer::new(x, "x")?, stored(members, k)?);
    let (mut y, mut s) = (buffers(y, "y")?, buffers(s, "s")?);
    let x = x.floats(py)?;
    let slices: Vec<_> = stored.iter().map(|member| member.slices(py)).collect::<PyResult<_>>()?;
    let y: Vec<_> = y.iter_mut().map(|y| y.floats_mut(py)).collect::<PyResult<_>>()?;
    let s: Vec<_> = s.iter_mut().map(|s| s.floats_mut(py)).collect::<PyResult<_>>()?;
    detached(py, || {
        let weights: Vec<_> = slices.iter().map(|member| member.weight.weight()).collect::<Result<_>>()?;
        let loras: Vec<_> = slices.iter().map(Slices::low_rank).collect::<Result<_>>()?;
        let operands = slices.iter().zip(&weights).zip(&loras);
        let siblings = operands.zip(y.into_iter().zip(s)).map(|(((member, weight), lora), (y, s))| Sibling {
            weight,
            bias: member.bias,
            lora: Some(lora),
            y,
            s: Some(s),
        });
        core::forward_group(&Exec::new(threads)?, m, x, siblings.collect())
    })
}

/// Writes what is not None of `dx [m, k]`, the sum over the members, and of each `da [r, k]` and `db [n, r]`.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn linear_group_backward<'py>(
    py: Python<'py>,
    dy: Vec<Tensor<'py>>,
    x: Option<Tensor<'py>>,
    s: Vec<Tensor<'py>>,
    shape: (usize, usize),
    members: Vec<Member<'py>>,
    dx: Option<Tensor<'py>>,
    da: Option<Vec<Tensor<'py>>>,
    db: Option<Vec<Tensor<'py>>>,
    threads: usize,
) -> PyResult<()> {
    let (m, k) = shape;
    let stored = stored(members, k)?;
    let (dy, s) = (buffers(dy, "dy")?, buffers(s, "s")?);
    let x = x.map(|x| Buffer::new(x, "x")).transpose()?;
    let mut dx = dx.map(|dx| Buffer::new(dx, "dx")).transpose()?;
    let mut da = buffers(da.unwrap_or_default(), "da")?;
    let mut db = buffers(db.unwrap_or_default(), "db")?;
    let x = x.as_ref().map(|x| x.floats(py)).transpose()?;
    let dx = dx.as_mut().map(|dx| dx.floats_mut(py)).transpose()?;
    let slices: Vec<_> = stored.iter().map(|member| member.slices(py)).collect::<PyResult<_>>()?;
    let dy: Vec<_> = dy.iter().map(|dy| dy.floats(py)).collect::<PyResult<_>>()?;
    let s: Vec<_> = s.iter().map(|s| s.floats(py)).collect::<PyResult<_>>()?;
    let mut da = da.iter_mut().map(|da| da.floats_mut(py)).collect::<PyResult<Vec<_>>>()?.into_iter();
    let mut db = db.iter_mut().map(|db| db.floats_mut(py)).collect::<PyResult<Vec<_>>>()?.into_iter();
    let gradients: Vec<_> = dy.into_iter().map(|dy| (dy, da.next(), db.next())).collect();
    let run = |dx: Option<FloatsMut<'_>>| {
        let weights: Vec<_> = slices.iter().map(|member| member.weight.weight()).collect::<Result<_>>()?;
        let loras: Vec<_> = slices.iter().map(Slices::low_rank).collect::<Result<_>>()?;
        let mut s = s.into_iter();
        let outputs = gradients.into_iter().zip(weights.iter().zip(&loras)).map(|((dy, da, db), (weight, lora))| {
            let branch = LoraGradients { lora, x, s: s.next(), da, db };
            OutputGradient { dy, weight, lora: Some(branch) }
        });
        core::backward_group(&Exec::new(threads)?, m, outputs.collect(), dx)
    };
    detached(py, || run(dx))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(linear_group, module)?)?;
    module.add_function(wrap_pyfunction!(linear_group_backward, module)?)
}
