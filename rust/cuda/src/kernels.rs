//! THE table: every kernel, where its text is, what it is compiled and called with, and what its machine code must hold.

use crate::{Error, Result};

/// The type of a kernel's parameter, as its source declares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A pointer to memory of the device.
    Pointer,
    /// `unsigned int`
    U32,
    /// `long long`
    I64,
    /// `float`
    F32,
}

impl Kind {
    /// The type in the source; a pointer's is `void*`, whatever it points to.
    #[must_use]
    pub fn declaration(self) -> &'static str {
        match self {
            Self::Pointer => "void*",
            Self::U32 => "unsigned int",
            Self::I64 => "long long",
            Self::F32 => "float",
        }
    }
}

/// A parameter of a kernel. Its name decides what a plan gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameter {
    /// Its name in the source.
    pub name: &'static str,
    /// Its type there.
    pub kind: Kind,
}

/// One kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Row {
    /// Its entry point, `extern "C"`, which is also its name in plans and messages.
    pub entry: &'static str,
    /// Its source below `cuda/`.
    pub file: &'static str,
    /// The macros that the source reads; a plan sets every one.
    pub constants: &'static [&'static str],
    /// Its parameters, in order.
    pub parameters: &'static [Parameter],
    /// The most registers of a thread, on any architecture.
    pub max_registers: u32,
    /// Machine instructions that it must hold, with the oldest architecture that has them.
    pub claims: &'static [(&'static str, u32)],
}

/// Parameters by name; `m`, `n`, `k` and other counts are `long long`.
macro_rules! parameters {
    ($($name:ident),* $(,)?) => { &[$(Parameter { name: stringify!($name), kind: kind_of(stringify!($name)) }),*] };
}

const fn kind_of(name: &str) -> Kind {
    match name.as_bytes() {
        b"m" | b"n" | b"k" | b"numel" | b"rows" | b"cols" | b"blocks" => Kind::I64,
        b"scaling" | b"keep" => Kind::F32,
        b"threshold" => Kind::U32,
        _ => Kind::Pointer,
    }
}

const FORWARD: &[Parameter] =
    parameters![x, codes, absmax, nested, offset, bias, s, b, y, partial, counters, m, n, k, scaling];
const BACKWARD: &[Parameter] =
    parameters![dy, codes, absmax, nested, offset, ds, a, seed, dx, partial, counters, m, n, k, threshold, keep];
const LORA_INPUT: &[Parameter] = parameters![x, a, seed, s, partial, counters, m, k, threshold, keep];

const STORED: &[&str] = &["FL_TYPE", "FL_CODEC", "FL_BLOCK_SIZE", "FL_NESTED"];
const GEMV: &[&str] = &[
    "FL_TYPE",
    "FL_CODEC",
    "FL_BLOCK_SIZE",
    "FL_NESTED",
    "FL_RANK",
    "FL_LORA_TYPE",
    "FL_BIAS_TYPE",
    "FL_PAIR_TABLE",
    "FL_WARPS",
    "FL_TILES",
];
const GEMM: &[&str] = &[
    "FL_TYPE",
    "FL_CODEC",
    "FL_BLOCK_SIZE",
    "FL_NESTED",
    "FL_RANK",
    "FL_LORA_TYPE",
    "FL_TILE_M",
    "FL_TILE_N",
    "FL_WARPS_M",
    "FL_WARPS_N",
    "FL_STAGES",
    "FL_BIAS_TYPE",
    "FL_EXACT",
];
const GEMM_BACKWARD: &[&str] = &[
    "FL_TYPE",
    "FL_CODEC",
    "FL_BLOCK_SIZE",
    "FL_NESTED",
    "FL_RANK",
    "FL_LORA_TYPE",
    "FL_TILE_M",
    "FL_TILE_N",
    "FL_WARPS_M",
    "FL_WARPS_N",
    "FL_STAGES",
    "FL_DROPOUT",
];
const LORA: &[&str] = &["FL_TYPE", "FL_RANK", "FL_LORA_TYPE", "FL_DROPOUT"];
const LORA_GRADIENTS: &[&str] = &["FL_TYPE", "FL_RANK", "FL_LORA_TYPE", "FL_DROPOUT", "FL_ROWS", "FL_COLUMNS"];
const FMA: &[&str] =
    &["FL_TYPE", "FL_CODEC", "FL_BLOCK_SIZE", "FL_NESTED", "FL_RANK", "FL_LORA_TYPE", "FL_BIAS_TYPE", "FL_DROPOUT"];

/// Matrix products on the tensor cores.
const TENSOR_CORES: &[(&str, u32)] = &[("HMMA", 75)];
/// The same, fed by copies that run beside them.
const PIPELINED: &[(&str, u32)] = &[("HMMA", 75), ("LDGSTS", 80)];

const fn row(
    file: &'static str,
    entry: &'static str,
    constants: &'static [&'static str],
    parameters: &'static [Parameter],
    claims: &'static [(&'static str, u32)],
) -> Row {
    // 255 is the machine's own limit; it lets 256 threads have a multiprocessor to themselves.
    Row { entry, file, constants, parameters, max_registers: 255, claims }
}

/// Every kernel.
pub static TABLE: [Row; 21] = [
    row("dequantize.cu", "dequantize_4bit", STORED, parameters![codes, absmax, nested, offset, out, numel], &[]),
    row(
        "dequantize.cu",
        "dequantize_4bit_transposed",
        STORED,
        parameters![codes, absmax, nested, offset, out, n, k],
        &[],
    ),
    row("dequantize.cu", "dequantize_int8", &["FL_TYPE"], parameters![codes, scb, out, rows, cols], &[]),
    row(
        "quantize.cu",
        "quantize_4bit",
        &["FL_TYPE", "FL_CODEC", "FL_BLOCK_SIZE"],
        parameters![x, codes, absmax, nonfinite, numel],
        &[],
    ),
    row("quantize.cu", "absmax_mean", &["FL_TYPE"], parameters![absmax, offset, blocks], &[]),
    row("quantize.cu", "quantize_absmax", &["FL_TYPE"], parameters![absmax, offset, codes, nested, blocks], &[]),
    row("quantize.cu", "quantize_int8", &["FL_TYPE"], parameters![x, codes, scb, nonfinite, rows, cols], &[]),
    row("gemv_4bit.cu", "gemv_4bit", GEMV, FORWARD, TENSOR_CORES),
    row("gemm_4bit.cu", "gemm_4bit", GEMM, FORWARD, PIPELINED),
    row("gemm_4bit_backward.cu", "gemm_4bit_backward", GEMM_BACKWARD, BACKWARD, PIPELINED),
    row("lora.cu", "lora_input", LORA, LORA_INPUT, TENSOR_CORES),
    row(
        "lora.cu",
        "lora_output_gradients",
        LORA_GRADIENTS,
        parameters![dy, b, s, ds, db, ds_partial, db_partial, counters, m, n, scaling],
        TENSOR_CORES,
    ),
    row(
        "lora.cu",
        "lora_input_gradient",
        LORA_GRADIENTS,
        parameters![x, ds, seed, da, da_partial, counters, m, k, threshold, keep],
        TENSOR_CORES,
    ),
    row(
        "lora_add.cu",
        "lora_add_input_gradient",
        LORA,
        parameters![ds, a, seed, dx, m, k, threshold, keep],
        TENSOR_CORES,
    ),
    row("lora_add.cu", "lora_add_output", LORA, parameters![s, b, y, m, n, scaling], TENSOR_CORES),
    row("fma.cu", "fma_forward", FMA, FORWARD, &[]),
    row("fma.cu", "fma_backward", FMA, BACKWARD, &[]),
    row("fma_lora.cu", "fma_lora_input", LORA, LORA_INPUT, &[]),
    row("fma_lora.cu", "fma_lora_ds", LORA, parameters![dy, b, ds, partial, counters, m, n, scaling], &[]),
    row("fma_lora.cu", "fma_lora_db", LORA, parameters![dy, s, db, partial, counters, m, n, scaling], &[]),
    row(
        "fma_lora.cu",
        "fma_lora_da",
        LORA,
        parameters![x, ds, seed, da, partial, counters, m, k, threshold, keep],
        &[],
    ),
];

/// The row of an entry.
///
/// # Errors
/// [`Error::Unknown`] for a name that is no entry.
pub fn find(entry: &str) -> Result<&'static Row> {
    TABLE.iter().find(|row| row.entry == entry).ok_or_else(|| Error::Unknown {
        what: "kernel",
        allowed: TABLE.iter().map(|row| row.entry).collect::<Vec<_>>().join(", "),
        got: format!("{entry:?}"),
    })
}

#[cfg(test)]
mod tests {
    use super::{TABLE, find};

    #[test]
    fn every_entry_is_found_once() {
        for row in &TABLE {
            assert_eq!(TABLE.iter().filter(|other| other.entry == row.entry).count(), 1);
            assert!(std::ptr::eq(find(row.entry).expect("in the table"), row));
        }
    }

    #[test]
    fn an_unknown_entry_lists_the_known_ones() {
        let error = find("gemm_3bit").expect_err("no such kernel").to_string();
        assert!(error.contains("gemm_4bit") && error.contains("\"gemm_3bit\""), "{error}");
    }
}
