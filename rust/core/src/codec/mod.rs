//! Float tensors to 4-bit or 8-bit codes and back, byte for byte as bitsandbytes stores them.
//!
//! | file | what |
//! |---|---|
//! | `spec` | the validated description of a packed tensor |
//! | `quantize`, `dequantize` | 4-bit, block-wise absmax |
//! | `double_quant` | the absmax values themselves in 8 bits |
//! | `int8` | row-wise int8 |
//! | `blockwise8` | 8-bit dynamic map, block-wise absmax |

pub mod blockwise8;
pub mod codebook;
pub mod dequantize;
pub mod double_quant;
pub mod int8;
pub mod quantize;
pub mod spec;

mod finite;

#[cfg(test)]
mod tests;
