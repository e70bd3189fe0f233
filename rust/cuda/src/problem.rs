//! What is to be computed: an operator with its shapes, types and codec.

use std::fmt;
use std::str::FromStr;

use ferrolora_core::codec::spec::{BLOCK_SIZES, NESTED_BLOCK_SIZE};

use crate::{Error, Result};

/// A set of names, each standing for one value.
macro_rules! names {
    ($(#[$doc:meta])* $name:ident, $what:literal: $($(#[$row:meta])* $variant:ident = $text:literal),* $(,)?) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$row])* $variant),* }

        impl $name {
            /// Every value, in order.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// Its name.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(name: &str) -> Result<Self> {
                Self::ALL.iter().copied().find(|value| value.name() == name).ok_or_else(|| Error::Unknown {
                    what: $what,
                    allowed: [$($text),*].join(", "),
                    got: format!("{name:?}"),
                })
            }
        }
    };
}

names! {
    /// Type of the elements of a tensor.
    Type, "dtype":
    /// float32
    F32 = "float32",
    /// float16
    F16 = "float16",
    /// bfloat16
    Bf16 = "bfloat16",
    /// uint8
    U8 = "uint8",
    /// int8
    I8 = "int8",
    /// int32
    I32 = "int32",
    /// int64
    I64 = "int64",
}

impl Type {
    /// Bytes of an element.
    #[must_use]
    pub fn size(self) -> u64 {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::I64 => 8,
        }
    }

    /// Its name in the sources, for the three types of activations.
    pub(crate) fn macro_value(self) -> &'static str {
        match self {
            Self::F16 => "half",
            Self::Bf16 => "bf16",
            _ => "float",
        }
    }
}

names! {
    /// How a weight is stored.
    Codec, "quant_type":
    /// 4-bit normal float.
    Nf4 = "nf4",
    /// 4-bit float.
    Fp4 = "fp4",
    /// Row-wise int8.
    Int8 = "int8",
}

names! {
    /// What is to be computed. Shapes: `x [m, k]`, `W [n, k]`, `y [m, n]`, `A [r, k]`, `B [n, r]`, `S [m, r]`.
    Op, "op":
    /// The float weight `[n, k]`.
    Dequantize = "dequantize",
    /// The float weight transposed, `[k, n]`.
    DequantizeTransposed = "dequantize_transposed",
    /// Codes and scales of a tensor of `n · k` values, in rows of `k` for int8.
    Quantize = "quantize",
    /// The mean of `n · k` scales.
    AbsmaxMean = "absmax_mean",
    /// 8-bit codes and scales of `n · k` scales.
    QuantizeAbsmax = "quantize_absmax",
    /// `y = x·Wᵀ + bias + scaling·S·Bᵀ`.
    Linear = "linear",
    /// `dX = dY·W + mask ⊙ (dS·A)`.
    LinearBackward = "linear_backward",
    /// `S = drop(x)·Aᵀ`.
    LoraInput = "lora_input",
    /// `dS = scaling·dY·B` and `dB = scaling·dYᵀ·S`.
    LoraOutputGradients = "lora_output_gradients",
    /// `dS` alone.
    LoraDs = "lora_ds",
    /// `dB` alone.
    LoraDb = "lora_db",
    /// `dA = dSᵀ·drop(x)`.
    LoraInputGradient = "lora_input_gradient",
    /// `y += scaling·S·Bᵀ`.
    LoraAddOutput = "lora_add_output",
    /// `dX += mask ⊙ (dS·A)`.
    LoraAddInputGradient = "lora_add_input_gradient",
}

/// A problem. What an operator does not have is 0, `None` or the default.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// The operator.
    pub op: Op,
    /// Type of the activations and outputs.
    pub dtype: Type,
    /// How the weight is stored.
    pub codec: Codec,
    /// Values that share a scale; 4-bit only.
    pub block_size: u64,
    /// Whether the scales are 8-bit codes.
    pub nested: bool,
    /// Rows of the activations.
    pub m: u64,
    /// Rows of the weight.
    pub n: u64,
    /// Columns of the weight.
    pub k: u64,
    /// r of the low-rank branch; 0 without one.
    pub rank: u64,
    /// Type of A and B.
    pub lora_dtype: Type,
    /// Type of the bias, if there is one.
    pub bias_dtype: Option<Type>,
    /// Probability that an element of the branch's input is dropped.
    pub dropout_p: f32,
    /// Whether products use the very values of dequantization.
    pub exact: bool,
    /// The kernel to use, or "library"; `None` leaves the choice to the plan.
    pub kernel: Option<String>,
    /// The most rows for which a fused product beats decoding first; `None` takes the table's.
    pub fused_rows: Option<u64>,
}

impl Problem {
    /// Checks the values that a type does not.
    ///
    /// # Errors
    /// [`Error::Unknown`] for one outside its set or range.
    pub fn check(&self) -> Result<()> {
        let floats = |what, dtype| match dtype {
            Type::F32 | Type::F16 | Type::Bf16 => Ok(()),
            other => Err(unknown(what, "float32, float16, bfloat16", &other)),
        };
        floats("dtype", self.dtype)?;
        floats("lora_dtype", self.lora_dtype)?;
        floats("bias_dtype", self.bias_dtype.unwrap_or(self.dtype))?;
        if self.codec != Codec::Int8 && !BLOCK_SIZES.iter().any(|size| *size as u64 == self.block_size) {
            return Err(unknown("block_size", "32, 64, 128, 256, 512, 1024, 2048, 4096", &self.block_size));
        }
        if !(0.0..1.0).contains(&self.dropout_p) {
            return Err(unknown("dropout_p", "at least 0 and below 1", &self.dropout_p));
        }
        let sizes = [("m", self.m), ("n", self.n), ("k", self.k), ("rank", self.rank)];
        let least = [u64::from(self.has_rows()), 1, 1, u64::from(self.is_low_rank())];
        for ((what, size), least) in sizes.into_iter().zip(least) {
            if !(least..1 << 40).contains(&size) {
                return Err(unknown(what, &format!("between {least} and 2^40"), &size));
            }
        }
        // Every count of elements and bytes then fits 64 bits with room to spare.
        let largest = [(self.m, self.n), (self.m, self.k), (self.n, self.k), (self.m, self.rank)];
        match largest.into_iter().find(|(rows, cols)| rows.saturating_mul(*cols) >= 1 << 48) {
            Some((rows, cols)) => Err(unknown("a matrix", "smaller than 2^48 elements", &format!("{rows} x {cols}"))),
            None => Ok(()),
        }
    }

    /// Whether the operator reads activations.
    fn has_rows(&self) -> bool {
        use Op::{AbsmaxMean, Dequantize, DequantizeTransposed, Quantize, QuantizeAbsmax};
        !matches!(self.op, Dequantize | DequantizeTransposed | Quantize | AbsmaxMean | QuantizeAbsmax)
    }

    /// Whether the operator is one of the low-rank branch alone.
    fn is_low_rank(&self) -> bool {
        self.has_rows() && !matches!(self.op, Op::Linear | Op::LinearBackward)
    }

    /// Elements of the weight.
    #[must_use]
    pub fn numel(&self) -> u64 {
        self.n * self.k
    }

    /// Scales of the weight.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        match (self.op, self.codec) {
            (Op::AbsmaxMean | Op::QuantizeAbsmax, _) => self.numel(),
            (_, Codec::Int8) => self.n,
            _ => self.numel().div_ceil(self.block_size),
        }
    }

    /// Scales of the scales.
    #[must_use]
    pub fn nested_blocks(&self) -> u64 {
        self.blocks().div_ceil(NESTED_BLOCK_SIZE as u64)
    }

    /// Whether the weight has 4 bits.
    #[must_use]
    pub fn is_4bit(&self) -> bool {
        self.codec != Codec::Int8
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "m {}, n {}, k {}, {}, {}", self.m, self.n, self.k, self.dtype, self.codec)?;
        if self.is_4bit() {
            write!(f, " in blocks of {}{}", self.block_size, if self.nested { ", double quantization" } else { "" })?;
        }
        if self.rank > 0 {
            write!(f, ", rank {} in {}", self.rank, self.lora_dtype)?;
        }
        Ok(())
    }
}

fn unknown(what: &'static str, allowed: &str, got: &dyn fmt::Display) -> Error {
    Error::Unknown { what, allowed: allowed.to_owned(), got: got.to_string() }
}
