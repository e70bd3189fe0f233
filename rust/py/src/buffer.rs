//! Torch CPU tensors as slices: the only unsafe code of the binding.
#![allow(unsafe_code)]

use ferrolora_core::dtype::{Floats, FloatsMut};
use half::{bf16, f16};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::error::raise;

/// The torch dtypes a buffer may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    F32,
    F16,
    Bf16,
    U8,
    I8,
}

impl Kind {
    /// torch's name of the type.
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::U8 => "uint8",
            Self::I8 => "int8",
        }
    }

    /// Bytes of an element, which are also its alignment.
    fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::U8 | Self::I8 => 1,
        }
    }
}

/// A contiguous CPU tensor, checked. It keeps the tensor alive for the length of the call.
///
/// Invariant: if `numel` is not 0, `data` is not null, a multiple of the size of `kind`, and points to `numel`
/// elements of type `kind`, alive as long as `_tensor` is.
pub struct Buffer<'py> {
    _tensor: Bound<'py, PyAny>,
    data: usize,
    numel: usize,
    kind: Kind,
    what: &'static str,
}

/// torch's dtype objects, looked up once.
fn dtypes(py: Python<'_>) -> PyResult<&[(Py<PyAny>, Kind); 5]> {
    static DTYPES: PyOnceLock<[(Py<PyAny>, Kind); 5]> = PyOnceLock::new();
    DTYPES.get_or_try_init(py, || {
        let torch = py.import("torch")?;
        let dtype = |name: &str| torch.getattr(name).map(Bound::unbind);
        Ok([
            (dtype("float32")?, Kind::F32),
            (dtype("bfloat16")?, Kind::Bf16),
            (dtype("float16")?, Kind::F16),
            (dtype("uint8")?, Kind::U8),
            (dtype("int8")?, Kind::I8),
        ])
    })
}

fn kind_of(tensor: &Bound<'_, PyAny>, what: &'static str) -> PyResult<Kind> {
    let py = tensor.py();
    let dtype = tensor.getattr(intern!(py, "dtype"))?;
    let found = dtypes(py)?.iter().find(|(known, _)| dtype.is(known)).map(|(_, kind)| *kind);
    found.ok_or_else(|| {
        let allowed = "float32, float16, bfloat16, uint8 or int8";
        raise(py, "UnsupportedError", format!("{what}: the CPU kernels take {allowed}, got {dtype}"))
    })
}

fn on_cpu(tensor: &Bound<'_, PyAny>, what: &'static str) -> PyResult<()> {
    let py = tensor.py();
    if tensor.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
        return Ok(());
    }
    let device = tensor.getattr(intern!(py, "device"))?;
    Err(raise(py, "UnsupportedError", format!("{what}: the CPU kernels take CPU tensors, got one on {device}")))
}

impl<'py> Buffer<'py> {
    /// Checks device, layout, dtype and address of `tensor`, the argument `what`.
    pub fn new(tensor: Bound<'py, PyAny>, what: &'static str) -> PyResult<Self> {
        let py = tensor.py();
        on_cpu(&tensor, what)?;
        if !tensor.call_method0(intern!(py, "is_contiguous"))?.is_truthy()? {
            return Err(raise(py, "ShapeError", format!("{what} must be contiguous; call .contiguous() first")));
        }
        let kind = kind_of(&tensor, what)?;
        let data: usize = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let numel = tensor.call_method0(intern!(py, "numel"))?.extract()?;
        if numel > 0 && data == 0 {
            return Err(raise(py, "UnsupportedError", format!("{what} has no memory behind it (a fake tensor?)")));
        }
        if numel > 0 && !data.is_multiple_of(kind.size()) {
            let message = format!("{what} does not start at a multiple of its element size; call .clone() first");
            return Err(raise(py, "UnsupportedError", message));
        }
        Ok(Self { _tensor: tensor, data, numel, kind, what })
    }

    /// Fails if this output shares memory with one of `inputs`.
    pub fn apart_from(&self, py: Python<'_>, inputs: &[&Self]) -> PyResult<()> {
        let bytes = |b: &Self| b.data..b.data + b.numel * b.kind.size();
        let own = bytes(self);
        let shares = |other: &&&Self| own.start < bytes(other).end && bytes(other).start < own.end;
        inputs.iter().find(shares).map_or(Ok(()), |input| {
            let message = format!("{} shares memory with {}; pass another tensor", self.what, input.what);
            Err(raise(py, "UnsupportedError", message))
        })
    }

    /// The elements.
    fn slice<T>(&self) -> &[T] {
        if self.numel == 0 {
            return &[];
        }
        // SAFETY: by the invariant, `data` points to `numel` elements that live as long as `self`; the
        // callers below ask for the type of `kind`, whose alignment `new` checked. The caller of the
        // Python function must not write to an input or touch an output from another thread while the
        // call runs, as for every torch op.
        unsafe { std::slice::from_raw_parts(self.data as *const T, self.numel) }
    }

    /// The elements, writable.
    fn slice_mut<T>(&mut self) -> &mut [T] {
        if self.numel == 0 {
            return &mut [];
        }
        // SAFETY: as for `slice`; no other slice aliases it, because each output is a tensor that the ops
        // package has just allocated, but for the `out` of dequantizing, which comes from its caller and
        // which `apart_from` checks.
        unsafe { std::slice::from_raw_parts_mut(self.data as *mut T, self.numel) }
    }

    /// Elements of the tensor.
    pub fn numel(&self) -> usize {
        self.numel
    }

    fn wrong(&self, py: Python<'_>, expected: &str) -> PyErr {
        raise(py, "UnsupportedError", format!("{} must be {expected}, got {}", self.what, self.kind.name()))
    }

    /// As float32, float16 or bfloat16.
    pub fn floats(&self, py: Python<'_>) -> PyResult<Floats<'_>> {
        match self.kind {
            Kind::F32 => Ok(Floats::F32(self.slice())),
            Kind::F16 => Ok(Floats::F16(self.slice::<f16>())),
            Kind::Bf16 => Ok(Floats::Bf16(self.slice::<bf16>())),
            _ => Err(self.wrong(py, "float32, float16 or bfloat16")),
        }
    }

    /// As writable float32, float16 or bfloat16.
    pub fn floats_mut(&mut self, py: Python<'_>) -> PyResult<FloatsMut<'_>> {
        match self.kind {
            Kind::F32 => Ok(FloatsMut::F32(self.slice_mut())),
            Kind::F16 => Ok(FloatsMut::F16(self.slice_mut::<f16>())),
            Kind::Bf16 => Ok(FloatsMut::Bf16(self.slice_mut::<bf16>())),
            _ => Err(self.wrong(py, "float32, float16 or bfloat16")),
        }
    }

    /// As float32.
    pub fn f32(&self, py: Python<'_>) -> PyResult<&[f32]> {
        if self.kind == Kind::F32 { Ok(self.slice()) } else { Err(self.wrong(py, "float32")) }
    }

    /// As writable float32.
    pub fn f32_mut(&mut self, py: Python<'_>) -> PyResult<&mut [f32]> {
        if self.kind == Kind::F32 { Ok(self.slice_mut()) } else { Err(self.wrong(py, "float32")) }
    }

    /// As uint8.
    pub fn u8(&self, py: Python<'_>) -> PyResult<&[u8]> {
        if self.kind == Kind::U8 { Ok(self.slice()) } else { Err(self.wrong(py, "uint8")) }
    }

    /// As writable uint8.
    pub fn u8_mut(&mut self, py: Python<'_>) -> PyResult<&mut [u8]> {
        if self.kind == Kind::U8 { Ok(self.slice_mut()) } else { Err(self.wrong(py, "uint8")) }
    }

    /// As int8.
    pub fn i8(&self, py: Python<'_>) -> PyResult<&[i8]> {
        if self.kind == Kind::I8 { Ok(self.slice()) } else { Err(self.wrong(py, "int8")) }
    }

    /// As writable int8.
    pub fn i8_mut(&mut self, py: Python<'_>) -> PyResult<&mut [i8]> {
        if self.kind == Kind::I8 { Ok(self.slice_mut()) } else { Err(self.wrong(py, "int8")) }
    }
}
