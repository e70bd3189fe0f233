//! The plan of a problem: which kernel, with which constants, grid, shared memory and arguments. A pure function, so
//! that every shape on every architecture is tested without a GPU.

use std::fmt;

use crate::device::{Device, MAX_GRID_YZ, MAX_THREADS, STATIC_SHARED};
use crate::driver::Geometry;
use crate::kernels::{Kind, Row, find};
use crate::ops::{dequantize, fma, gemm, gemv, lora, quantize};
use crate::policy;
use crate::problem::{Op, Problem, Type};
use crate::{Error, Result};

/// Why a kernel does not take a problem, readable, with what it needs.
pub type Reason = String;

/// How a problem is solved.
#[derive(Debug, Clone, PartialEq)]
pub enum Plan {
    /// By one launch of one kernel.
    Kernel(Launch),
    /// By decoding the weight into a workspace, torch's own product, and the other operators.
    Library,
}

/// What one parameter of a kernel gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Argument {
    /// A value that the plan knows; the bits of the parameter's type, 0 for a null pointer.
    Fixed(u64),
    /// A contiguous tensor of the caller on the device.
    Tensor {
        /// Type of its elements.
        dtype: Type,
        /// Number of its elements.
        numel: u64,
    },
    /// A float of the caller.
    Number,
    /// Uninitialised memory that only this launch uses.
    Scratch {
        /// Number of float32 values.
        numel: u64,
    },
    /// Words that are zero before the launch and after it.
    Counters {
        /// Number of words of 32 bits.
        numel: u64,
    },
}

impl fmt::Display for Argument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(bits) => write!(f, "{bits}"),
            Self::Tensor { dtype, numel } => write!(f, "a contiguous tensor of {numel} {dtype}, 16-byte aligned"),
            Self::Number => f.write_str("a number"),
            Self::Scratch { numel } => write!(f, "{numel} float32 of scratch memory"),
            Self::Counters { numel } => write!(f, "{numel} counters"),
        }
    }
}

/// One launch of one kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// The kernel.
    pub row: &'static Row,
    /// Its compile-time constants, in the row's order.
    pub constants: Vec<(&'static str, String)>,
    /// Blocks, threads, dynamic shared memory.
    pub geometry: Geometry,
    /// What its parameters get, in order.
    pub arguments: Vec<Argument>,
}

impl Launch {
    /// Names the machine code: the entry and its constants.
    #[must_use]
    pub fn key(&self) -> String {
        let constants: Vec<_> = self.constants.iter().map(|(name, value)| format!(" {name}={value}")).collect();
        format!("{}{}", self.row.entry, constants.concat())
    }

    /// Each parameter's name with what it gets.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &Argument)> {
        self.row.parameters.iter().map(|parameter| parameter.name).zip(&self.arguments)
    }

    /// Bytes of scratch memory, each part at a multiple of 16.
    #[must_use]
    pub fn scratch_bytes(&self) -> u64 {
        self.arguments.iter().map(Argument::scratch_bytes).sum()
    }

    /// Number of counters.
    #[must_use]
    pub fn counters(&self) -> u64 {
        let count = |argument: &Argument| if let Argument::Counters { numel } = argument { *numel } else { 0 };
        self.arguments.iter().map(count).sum()
    }

    /// Whether the device can run it.
    fn fits(&self, device: Device) -> std::result::Result<(), Reason> {
        let ([x, y, z], [threads, ..]) = (self.geometry.grid, self.geometry.block);
        if threads > MAX_THREADS {
            Err(format!("a block of {threads} threads is over the {MAX_THREADS} of the device"))
        } else if x > i32::MAX.unsigned_abs() || y > MAX_GRID_YZ || z > MAX_GRID_YZ {
            Err(format!("a grid of {x} x {y} x {z} blocks is over what the device has; split the rows of the input"))
        } else if self.geometry.shared > device.shared_per_block.saturating_sub(STATIC_SHARED) {
            let (shared, most) = (self.geometry.shared, device.shared_per_block);
            Err(format!("{shared} bytes of shared memory are over the {most} of sm_{}", device.sm))
        } else {
            Ok(())
        }
    }
}

impl Argument {
    pub(crate) fn scratch_bytes(&self) -> u64 {
        if let Self::Scratch { numel } = self { (numel * 4).next_multiple_of(16) } else { 0 }
    }
}

/// What a family of kernels decides: the rest of a launch follows from the names in the table.
pub(crate) struct Choice {
    pub entry: &'static str,
    /// Values of the constants that no other kernel has.
    pub constants: Vec<(&'static str, u64)>,
    pub grid: [u64; 3],
    pub threads: u32,
    pub shared: u64,
}

/// The launch of a choice.
pub(crate) fn launch(problem: &Problem, choice: &Choice) -> std::result::Result<Launch, Reason> {
    let row = find(choice.entry).map_err(|error| error.to_string())?;
    let constants = row.constants.iter().map(|name| (*name, constant(name, problem, choice))).collect();
    // What does not fit 32 bits does not fit a device either, and is refused there.
    let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let geometry =
        Geometry { grid: choice.grid.map(narrow), block: [choice.threads, 1, 1], shared: narrow(choice.shared) };
    let arguments = row.parameters.iter().map(|p| argument(p.name, p.kind, problem, choice)).collect();
    Ok(Launch { row, constants, geometry, arguments })
}

/// Value of a macro.
fn constant(name: &str, problem: &Problem, choice: &Choice) -> String {
    let own = choice.constants.iter().find(|(known, _)| *known == name);
    match (name, own) {
        (_, Some((_, value))) => value.to_string(),
        ("FL_TYPE", _) => problem.dtype.macro_value().to_owned(),
        ("FL_CODEC", _) => problem.codec.name().to_owned(),
        ("FL_BLOCK_SIZE", _) if problem.is_4bit() => problem.block_size.to_string(),
        ("FL_BLOCK_SIZE", _) => "0".to_owned(), // int8 has a scale a row
        ("FL_NESTED", _) => u64::from(problem.nested).to_string(),
        ("FL_RANK", _) => problem.rank.to_string(),
        ("FL_LORA_TYPE", _) => problem.lora_dtype.macro_value().to_owned(),
        ("FL_BIAS_TYPE", _) => problem.bias_dtype.unwrap_or(problem.dtype).macro_value().to_owned(),
        ("FL_DROPOUT", _) => u64::from(problem.dropout_p > 0.0).to_string(),
        ("FL_EXACT", _) => u64::from(problem.exact).to_string(),
        _ => unreachable!("{name} is set by the family of its kernel"),
    }
}

/// What the parameter of this name gets.
fn argument(name: &str, kind: Kind, problem: &Problem, choice: &Choice) -> Argument {
    let Problem { dtype, m, n, k, rank: r, nested, .. } = *problem;
    let tensor = |dtype, numel| Argument::Tensor { dtype, numel };
    let only_if = |there: bool, argument| if there { argument } else { Argument::Fixed(0) };
    let [x, y, z] = choice.grid;
    match name {
        "m" => Argument::Fixed(m),
        "n" | "rows" => Argument::Fixed(n),
        "k" | "cols" => Argument::Fixed(k),
        "numel" => Argument::Fixed(problem.numel()),
        "blocks" => Argument::Fixed(problem.blocks()),
        "threshold" => Argument::Fixed(dropout_threshold(problem.dropout_p)),
        "keep" => Argument::Fixed(u64::from((1.0 / (1.0 - problem.dropout_p)).to_bits())),
        "scaling" => only_if(r > 0, Argument::Number),
        "x" if problem.op == Op::Quantize => tensor(dtype, problem.numel()),
        "x" | "dx" => tensor(dtype, m * k),
        "y" | "dy" => tensor(dtype, m * n),
        "out" => tensor(dtype, problem.numel()),
        "codes" if problem.op == Op::QuantizeAbsmax => tensor(Type::U8, problem.blocks()),
        "codes" if problem.is_4bit() => tensor(Type::U8, problem.numel().div_ceil(2)),
        "codes" => tensor(Type::I8, problem.numel()),
        "absmax" => tensor(if nested { Type::U8 } else { Type::F32 }, problem.blocks()),
        "scb" => tensor(Type::F32, problem.blocks()),
        "nested" => only_if(nested || problem.op == Op::QuantizeAbsmax, tensor(Type::F32, problem.nested_blocks())),
        "offset" => {
            let computed = matches!(problem.op, Op::AbsmaxMean | Op::QuantizeAbsmax);
            only_if(nested || computed, tensor(Type::F32, 1))
        }
        "nonfinite" => tensor(Type::I32, 1),
        "bias" => problem.bias_dtype.map_or(Argument::Fixed(0), |dtype| tensor(dtype, n)),
        "s" => only_if(r > 0, tensor(dtype, m * r)),
        "ds" => only_if(r > 0, tensor(Type::F32, m * r)),
        "a" | "da" => only_if(r > 0, tensor(problem.lora_dtype, r * k)),
        "b" | "db" => only_if(r > 0, tensor(problem.lora_dtype, n * r)),
        "seed" => only_if(problem.dropout_p > 0.0 && r > 0, tensor(Type::I64, 1)),
        "partial" => only_if(z > 1, Argument::Scratch { numel: z * output(problem) }),
        "ds_partial" => Argument::Scratch { numel: x * m * r },
        "db_partial" => Argument::Scratch { numel: y * n * r },
        "da_partial" => Argument::Scratch { numel: y * k * r },
        "counters" if choice.entry.starts_with("lora_") && choice.entry != "lora_input" => {
            Argument::Counters { numel: (x + y) * z }
        }
        "counters" => Argument::Counters { numel: x * y },
        _ => unreachable!("the table has no parameter {name} of kind {kind:?}"),
    }
}

/// Elements that a split sum adds up.
fn output(problem: &Problem) -> u64 {
    let Problem { m, n, k, rank: r, .. } = *problem;
    match problem.op {
        Op::LinearBackward => m * k,
        Op::LoraInput | Op::LoraDs => m * r,
        Op::LoraDb | Op::LoraOutputGradients => n * r,
        Op::LoraInputGradient => r * k,
        _ => m * n,
    }
}

/// `p · 2³²`, rounded down: an element is dropped if its random word is below it.
#[allow(clippy::cast_sign_loss)] // p is at least 0
fn dropout_threshold(p: f32) -> u64 {
    (f64::from(p) * 4_294_967_296.0) as u64
}

/// Parts of the depth of a product, so that the output tiles alone need not fill the device.
pub(crate) fn splits(tiles: u64, depth: u64, least_depth: u64, device: Device) -> u64 {
    const BLOCKS_PER_MULTIPROCESSOR: u64 = 2;
    const MOST: u64 = 32;
    let wanted = (BLOCKS_PER_MULTIPROCESSOR * u64::from(device.sm_count)).div_ceil(tiles.max(1));
    wanted.min(depth / least_depth).clamp(1, MOST)
}

/// A kernel that could solve a problem: its entry and what makes its launch.
type Candidate = (&'static str, fn(&Problem, Device) -> std::result::Result<Choice, Reason>);

/// The kernels of an operator, the best first.
fn candidates(op: Op) -> &'static [Candidate] {
    match op {
        Op::Dequantize => &[("dequantize_4bit", dequantize::four_bit), ("dequantize_int8", dequantize::int8)],
        Op::DequantizeTransposed => &[("dequantize_4bit_transposed", dequantize::transposed)],
        Op::Quantize => &[("quantize_4bit", quantize::four_bit), ("quantize_int8", quantize::int8)],
        Op::AbsmaxMean => &[("absmax_mean", quantize::absmax_mean)],
        Op::QuantizeAbsmax => &[("quantize_absmax", quantize::absmax)],
        Op::Linear => &[("gemv_4bit", gemv::forward), ("gemm_4bit", gemm::forward), ("fma_forward", fma::forward)],
        Op::LinearBackward => &[("gemm_4bit_backward", gemm::backward), ("fma_backward", fma::backward)],
        Op::LoraInput => &[("lora_input", lora::input), ("fma_lora_input", fma::lora_input)],
        Op::LoraOutputGradients => &[("lora_output_gradients", lora::output_gradients)],
        Op::LoraDs => &[("fma_lora_ds", fma::lora_ds)],
        Op::LoraDb => &[("fma_lora_db", fma::lora_db)],
        Op::LoraInputGradient => &[("lora_input_gradient", lora::input_gradient), ("fma_lora_da", fma::lora_da)],
        Op::LoraAddOutput => &[("lora_add_output", lora::add_output)],
        Op::LoraAddInputGradient => &[("lora_add_input_gradient", lora::add_input_gradient)],
    }
}

/// Whether torch's own products can stand for the operator.
fn has_library(op: Op) -> bool {
    use Op::{Linear, LinearBackward, LoraAddInputGradient, LoraAddOutput, LoraOutputGradients};
    matches!(op, Linear | LinearBackward | LoraOutputGradients | LoraAddOutput | LoraAddInputGradient)
}

/// The plan of a problem on a device.
///
/// # Errors
/// [`Error::Unknown`] for a value outside its set; [`Error::Refused`] if nothing takes the problem, with each kernel's
/// reason.
pub fn plan(problem: &Problem, device: Device) -> Result<Plan> {
    problem.check()?;
    let wanted = problem.kernel.as_deref();
    if has_library(problem.op) && (wanted == Some("library") || (wanted.is_none() && policy::library(problem, device)))
    {
        return Ok(Plan::Library);
    }
    let mut reasons = Vec::new();
    for (entry, choose) in candidates(problem.op) {
        if wanted.is_some_and(|wanted| wanted != *entry) {
            continue;
        }
        let made = choose(problem, device).and_then(|choice| launch(problem, &choice));
        match made.and_then(|launch| launch.fits(device).map(|()| launch)) {
            Ok(launch) => return Ok(Plan::Kernel(launch)),
            Err(reason) => reasons.push(format!("{entry}: {reason}")),
        }
    }
    if has_library(problem.op) && wanted.is_none() {
        return Ok(Plan::Library);
    }
    if reasons.is_empty() {
        let known: Vec<_> = candidates(problem.op).iter().map(|(entry, _)| *entry).collect();
        reasons.push(format!("{} is solved by {} only", problem.op, known.join(", ")));
    }
    Err(Error::Refused {
        op: problem.op.name(),
        problem: format!("{problem} on sm_{}", device.sm),
        reason: reasons.join("; "),
    })
}

#[cfg(test)]
pub(crate) mod tests;
