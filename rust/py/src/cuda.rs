//! The CUDA kernels: their table, plans, sources, and launches on torch's tensors.

use std::sync::{LazyLock, OnceLock};

use ferrolora_cuda::device::{ARCHITECTURES, Device};
use ferrolora_cuda::driver::{Driver, LibCuda, Stream, driver};
use ferrolora_cuda::launch::{Given, Lent, Tensor, launch};
use ferrolora_cuda::module::{Loaded, Modules};
use ferrolora_cuda::plan::{Argument, Launch, Plan, plan};
use ferrolora_cuda::problem::{Problem, Type};
use ferrolora_cuda::{Error, kernels, policy, source};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict, PyList};

use crate::error::raise;

/// The kernels that this process has loaded.
static MODULES: LazyLock<Modules> = LazyLock::new(Modules::default);

fn map(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error {
        Error::NoDriver { .. } | Error::OldDriver { .. } | Error::Driver { .. } => "CudaError",
        Error::Refused { .. } | Error::Unknown { .. } => "UnsupportedError",
        Error::Argument { .. } => "ShapeError",
    };
    raise(py, class, error.to_string())
}

fn loaded_driver(py: Python<'_>) -> PyResult<&'static LibCuda> {
    py.detach(driver).map_err(|error| map(py, &error))
}

/// A problem as Python passes it.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Asked {
    op: String,
    dtype: String,
    quant_type: String,
    block_size: u64,
    nested: bool,
    m: u64,
    n: u64,
    k: u64,
    rank: u64,
    lora_dtype: Option<String>,
    bias_dtype: Option<String>,
    dropout_p: f32,
    exact: bool,
    kernel: Option<String>,
    fused_rows: Option<u64>,
}

impl Asked {
    fn problem(self) -> ferrolora_cuda::Result<Problem> {
        let dtype: Type = self.dtype.parse()?;
        Ok(Problem {
            op: self.op.parse()?,
            dtype,
            codec: self.quant_type.parse()?,
            block_size: self.block_size,
            nested: self.nested,
            m: self.m,
            n: self.n,
            k: self.k,
            rank: self.rank,
            lora_dtype: self.lora_dtype.map_or(Ok(dtype), |name| name.parse())?,
            bias_dtype: self.bias_dtype.map(|name| name.parse()).transpose()?,
            dropout_p: self.dropout_p,
            exact: self.exact,
            kernel: self.kernel,
            fused_rows: self.fused_rows,
        })
    }
}

/// The rows of the kernel table.
#[pyfunction]
fn cuda_kernels(py: Python<'_>) -> PyResult<Bound<'_, PyList>> {
    let rows = PyList::empty(py);
    for row in &kernels::TABLE {
        let fields = PyDict::new(py);
        fields.set_item("entry", row.entry)?;
        fields.set_item("file", row.file)?;
        fields.set_item("constants", row.constants)?;
        let parameters: Vec<_> = row.parameters.iter().map(|p| (p.name, p.kind.declaration())).collect();
        fields.set_item("parameters", parameters)?;
        fields.set_item("max_registers", row.max_registers)?;
        fields.set_item("claims", row.claims)?;
        rows.append(fields)?;
    }
    Ok(rows)
}

/// Compute capabilities that the kernels are compiled for, 10 · major + minor.
#[pyfunction]
fn cuda_architectures() -> Vec<u32> {
    ARCHITECTURES.iter().map(|row| row.sm).collect()
}

/// A source with its headers pasted in.
#[pyfunction]
fn cuda_source(py: Python<'_>, file: &str) -> PyResult<String> {
    source::source(file).map_err(|error| map(py, &error))
}

/// The most rows for which a fused product is taken on an architecture.
#[pyfunction]
fn cuda_fused_rows(py: Python<'_>, sm: u32) -> PyResult<u64> {
    Device::of(sm, None).map(policy::fused_rows).map_err(|error| map(py, &error))
}

/// The launch that solves a problem on a device that need not be here; None stands for torch's own product.
#[pyfunction]
#[pyo3(signature = (problem, sm, sm_count=None))]
fn cuda_plan(py: Python<'_>, problem: Asked, sm: u32, sm_count: Option<u32>) -> PyResult<Option<Bound<'_, PyDict>>> {
    let planned = || plan(&problem.problem()?, Device::of(sm, sm_count)?);
    match planned().map_err(|error| map(py, &error))? {
        Plan::Kernel(launch) => describe(py, &launch).map(Some),
        Plan::Library => Ok(None),
    }
}

fn describe<'py>(py: Python<'py>, launch: &Launch) -> PyResult<Bound<'py, PyDict>> {
    let fields = PyDict::new(py);
    fields.set_item("entry", launch.row.entry)?;
    fields.set_item("file", launch.row.file)?;
    fields.set_item("constants", constants(py, launch)?)?;
    fields.set_item("grid", launch.geometry.grid)?;
    fields.set_item("block", launch.geometry.block)?;
    fields.set_item("shared", launch.geometry.shared)?;
    fields.set_item("scratch_bytes", launch.scratch_bytes())?;
    fields.set_item("counters", launch.counters())?;
    let arguments = PyList::empty(py);
    for (parameter, argument) in launch.row.parameters.iter().zip(&launch.arguments) {
        let row = PyDict::new(py);
        row.set_item("name", parameter.name)?;
        row.set_item("type", parameter.kind.declaration())?;
        let (role, dtype, numel) = match argument {
            Argument::Fixed(bits) => {
                row.set_item("bits", bits)?;
                ("fixed", None, None)
            }
            Argument::Tensor { dtype, numel } => ("tensor", Some(dtype.name()), Some(*numel)),
            Argument::Number => ("number", None, None),
            Argument::Scratch { numel } => ("scratch", Some("float32"), Some(*numel)),
            Argument::Counters { numel } => ("counters", Some("int32"), Some(*numel)),
        };
        row.set_item("role", role)?;
        row.set_item("dtype", dtype)?;
        row.set_item("numel", numel)?;
        arguments.append(row)?;
    }
    fields.set_item("arguments", arguments)?;
    Ok(fields)
}

fn constants<'py>(py: Python<'py>, launch: &Launch) -> PyResult<Bound<'py, PyDict>> {
    let fields = PyDict::new(py);
    for (name, value) in &launch.constants {
        fields.set_item(*name, value)?;
    }
    Ok(fields)
}

/// The driver's version of CUDA and its devices.
#[pyfunction]
fn cuda_driver(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let driver = loaded_driver(py)?;
    let failed = |error| map(py, &error);
    let version = driver.version().map_err(failed)?;
    let devices = PyList::empty(py);
    for index in 0..driver.device_count().map_err(failed)? {
        let fields = PyDict::new(py);
        fields.set_item("name", driver.device_name(index).map_err(failed)?)?;
        let raw = Device::raw(driver, index).map_err(failed)?;
        fields.set_item("sm", raw.sm)?;
        fields.set_item("multiprocessors", raw.sm_count)?;
        fields.set_item("shared_per_block", raw.shared_per_block)?;
        fields.set_item("kernels", Device::of(raw.sm, None).is_ok())?;
        devices.append(fields)?;
    }
    let fields = PyDict::new(py);
    fields.set_item("version", format!("{}.{}", version / 1000, version % 1000 / 10))?;
    fields.set_item("devices", devices)?;
    Ok(fields)
}

/// The launch that solves one problem on one device of this machine.
#[pyclass(frozen)]
struct CudaLaunch {
    launch: Launch,
    device: i32,
    /// Compute capability of the device.
    #[pyo3(get)]
    sm: u32,
    /// Bytes of uninitialised memory to lend to each launch.
    #[pyo3(get)]
    scratch_bytes: u64,
    /// Words that are zero to lend to each launch, which leaves them zero.
    #[pyo3(get)]
    counters: u64,
    loaded: OnceLock<Loaded>,
}

/// The launch that solves a problem on the device `index`; None stands for torch's own product.
#[pyfunction]
fn cuda_launch(py: Python<'_>, problem: Asked, index: i32) -> PyResult<Option<CudaLaunch>> {
    let driver = loaded_driver(py)?;
    let device = Device::query(driver, index).map_err(|error| map(py, &error))?;
    let planned = || plan(&problem.problem()?, device);
    let Plan::Kernel(launch) = planned().map_err(|error| map(py, &error))? else { return Ok(None) };
    let loaded = MODULES.find(index, &launch).map_or_else(OnceLock::new, OnceLock::from);
    let (scratch_bytes, counters) = (launch.scratch_bytes(), launch.counters());
    Ok(Some(CudaLaunch { launch, device: index, sm: device.sm, scratch_bytes, counters, loaded }))
}

#[pymethods]
impl CudaLaunch {
    /// Its kernel's name.
    #[getter]
    fn entry(&self) -> &'static str {
        self.launch.row.entry
    }

    /// Its kernel's source.
    #[getter]
    fn file(&self) -> &'static str {
        self.launch.row.file
    }

    /// Its kernel's compile-time constants.
    #[getter]
    fn constants<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        constants(py, &self.launch)
    }

    /// Whether its kernel is on the device.
    #[getter]
    fn is_loaded(&self) -> bool {
        self.loaded.get().is_some()
    }

    /// Puts the kernel on the device.
    fn load(&self, py: Python<'_>, cubin: &Bound<'_, PyBytes>) -> PyResult<()> {
        let (driver, cubin) = (loaded_driver(py)?, cubin.as_bytes());
        let loaded = py.detach(|| MODULES.load(driver, self.device, &self.launch, cubin));
        let loaded = loaded.map_err(|error| map(py, &error))?;
        self.loaded.get_or_init(|| loaded);
        Ok(())
    }

    /// Launches the kernel on a stream of the device, with a tensor or number for each name that the plan leaves open.
    fn __call__(
        &self,
        py: Python<'_>,
        stream: usize,
        scratch: Option<Bound<'_, PyAny>>,
        counters: Option<Bound<'_, PyAny>>,
        given: &Bound<'_, PyDict>,
    ) -> PyResult<()> {
        let missing = || raise(py, "CudaError", format!("{} is not loaded", self.entry()));
        let loaded = *self.loaded.get().ok_or_else(missing)?;
        let lent = Lent { scratch: self.memory(scratch, "scratch")?, counters: self.memory(counters, "counters")? };
        let mut values = Vec::with_capacity(given.len());
        for (name, argument) in self.launch.named() {
            let what = match argument {
                Argument::Tensor { .. } => given.get_item(name)?.filter(|value| !value.is_none()),
                Argument::Number => given.get_item(name)?,
                _ => None,
            };
            if let Some(value) = what {
                values.push((name, self.given(argument, name, &value)?));
            }
        }
        let driver = loaded_driver(py)?;
        let find = |wanted: &str| values.iter().find(|(name, _)| *name == wanted).map(|(_, value)| *value);
        py.detach(|| launch(driver, loaded, &self.launch, Stream(stream), lent, find)).map_err(|error| map(py, &error))
    }
}

impl CudaLaunch {
    fn given(&self, argument: &Argument, name: &'static str, value: &Bound<'_, PyAny>) -> PyResult<Given> {
        match argument {
            Argument::Number => Ok(Given::Number(value.extract()?)),
            _ => self.tensor(value, name).map(Given::Tensor),
        }
    }

    /// Address and elements of lent memory, which counts bytes or words of its own type.
    fn memory(&self, tensor: Option<Bound<'_, PyAny>>, what: &'static str) -> PyResult<(u64, u64)> {
        let Some(tensor) = tensor else { return Ok((0, 0)) };
        let tensor = self.tensor(&tensor, what)?;
        Ok((tensor.address, tensor.numel))
    }

    /// Checks the place and layout of `tensor`, the argument `what`.
    fn tensor(&self, tensor: &Bound<'_, PyAny>, what: &'static str) -> PyResult<Tensor> {
        let py = tensor.py();
        let index: i32 = tensor.call_method0(intern!(py, "get_device"))?.extract()?;
        if index != self.device {
            let (kernel, device) = (self.entry(), tensor.getattr(intern!(py, "device"))?);
            let message = format!("{kernel}: {what} must be on cuda:{}, not on {device}", self.device);
            return Err(raise(py, "UnsupportedError", message));
        }
        if !tensor.call_method0(intern!(py, "is_contiguous"))?.is_truthy()? {
            let message = format!("{}: {what} must be contiguous; call .contiguous() first", self.entry());
            return Err(raise(py, "ShapeError", message));
        }
        Ok(Tensor {
            address: tensor.call_method0(intern!(py, "data_ptr"))?.extract()?,
            dtype: dtype_of(tensor, what)?,
            numel: tensor.call_method0(intern!(py, "numel"))?.extract()?,
        })
    }
}

fn dtype_of(tensor: &Bound<'_, PyAny>, what: &'static str) -> PyResult<Type> {
    static DTYPES: PyOnceLock<Vec<(Py<PyAny>, Type)>> = PyOnceLock::new();
    let py = tensor.py();
    let known = DTYPES.get_or_try_init(py, || {
        let torch = py.import("torch")?;
        let row = |dtype: &Type| PyResult::Ok((torch.getattr(dtype.name())?.unbind(), *dtype));
        Type::ALL.iter().map(row).collect::<PyResult<_>>()
    })?;
    let dtype = tensor.getattr(intern!(py, "dtype"))?;
    let found = known.iter().find(|(known, _)| dtype.is(known)).map(|(_, dtype)| *dtype);
    found.ok_or_else(|| raise(py, "UnsupportedError", format!("{what}: no CUDA kernel takes {dtype}")))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<CudaLaunch>()?;
    module.add_function(wrap_pyfunction!(cuda_kernels, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_architectures, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_source, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_fused_rows, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_plan, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_driver, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_launch, module)?)
}
