//! The validated description of a packed 4-bit tensor.

use super::codebook::{dynamic8, fp4, nf4};
use crate::error::check_len;
use crate::simd::{Isa, LANES};
use crate::{Error, Result};

/// Block of the second quantization, the one of the absmax values.
pub const NESTED_BLOCK_SIZE: usize = 256;

/// The most blocks whose scales [`Scales::run`] decodes together.
pub(crate) const RUN: usize = 64;

/// The block sizes a 4-bit tensor may have.
pub const BLOCK_SIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// A 4-bit data type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantType {
    /// 4-bit normal float.
    Nf4,
    /// 4-bit float.
    Fp4,
}

impl QuantType {
    /// Value of each code.
    #[must_use]
    pub fn values(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &nf4::VALUES,
            Self::Fp4 => &fp4::VALUES,
        }
    }

    /// Code of 0.0, which also fills the pad nibble of an odd tensor.
    #[must_use]
    pub fn zero_code(self) -> u8 {
        match self {
            Self::Nf4 => nf4::ZERO_CODE,
            Self::Fp4 => fp4::ZERO_CODE,
        }
    }
}

impl std::str::FromStr for QuantType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "nf4" => Ok(Self::Nf4),
            "fp4" => Ok(Self::Fp4),
            other => Err(Error::Unknown { what: "quant_type", allowed: "nf4, fp4", got: other.to_owned() }),
        }
    }
}

/// How a tensor is quantized to 4 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantSpec {
    quant_type: QuantType,
    block_size: usize,
}

impl QuantSpec {
    /// A description.
    ///
    /// # Errors
    /// [`Error::Unknown`] unless `block_size` is one of [`BLOCK_SIZES`].
    pub fn new(quant_type: QuantType, block_size: usize) -> Result<Self> {
        if !BLOCK_SIZES.contains(&block_size) {
            return Err(Error::Unknown {
                what: "block_size",
                allowed: "32, 64, 128, 256, 512, 1024, 2048, 4096",
                got: block_size.to_string(),
            });
        }
        Ok(Self { quant_type, block_size })
    }

    /// The 4-bit type.
    #[must_use]
    pub fn quant_type(self) -> QuantType {
        self.quant_type
    }

    /// Elements that share one absmax.
    #[must_use]
    pub fn block_size(self) -> usize {
        self.block_size
    }

    /// Block sizes are powers of two: a shift by this divides by one.
    #[inline(always)]
    pub(crate) fn log_block_size(self) -> u32 {
        self.block_size.trailing_zeros()
    }

    /// Blocks of a tensor of `numel` elements; the last may be short.
    #[must_use]
    pub fn blocks(self, numel: usize) -> usize {
        numel.div_ceil(self.block_size)
    }
}

/// The absmax of each block, as stored.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    /// One float32 a block.
    Plain(&'a [f32]),
    /// `absmax[i] = dynamic8[codes[i]] · nested_absmax[i / 256] + offset`
    Double {
        /// 8-bit dynamic code of each block's centred absmax.
        codes: &'a [u8],
        /// Absmax of each 256 centred values.
        nested_absmax: &'a [f32],
        /// Mean of the absmax values.
        offset: f32,
    },
}

impl<'a> Scales<'a> {
    /// Absmax of block `i`, decoded.
    #[must_use]
    #[inline(always)]
    pub fn get(&self, i: usize) -> f32 {
        match *self {
            Self::Plain(absmax) => absmax[i],
            Self::Double { codes, nested_absmax, offset } => {
                // Two roundings, as every reader of the format does; not a fused multiply-add.
                dynamic8::map().values[usize::from(codes[i])] * nested_absmax[i / NESTED_BLOCK_SIZE] + offset
            }
        }
    }

    /// Absmax of `count` blocks from `first`: as stored, or decoded into the buffer.
    #[inline(always)]
    pub(crate) fn run<'b, I: Isa>(self, isa: I, first: usize, count: usize, buffer: &'b mut [f32; RUN]) -> &'b [f32]
    where
        'a: 'b,
    {
        let (codes, nested_absmax, offset) = match self {
            Self::Plain(absmax) => return &absmax[first..][..count],
            Self::Double { .. } if count <= LANES => {
                // One by one the first is there sooner than from a gather.
                self.decode(first, &mut buffer[..count]);
                return &buffer[..count];
            }
            Self::Double { codes, nested_absmax, offset } => (codes, nested_absmax, isa.splat(offset)),
        };
        let values = &dynamic8::map().values;
        for (i, lanes) in buffer[..count.next_multiple_of(LANES)].as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let (at, count) = (first + i * LANES, (count - i * LANES).min(LANES));
            // Sixteen lanes, even if fewer are wanted, where the tensor has so many and they share a nested absmax.
            match codes[at..].first_chunk() {
                Some(sixteen) if at % NESTED_BLOCK_SIZE <= NESTED_BLOCK_SIZE - LANES => {
                    let scale = isa.splat(nested_absmax[at / NESTED_BLOCK_SIZE]);
                    isa.store(isa.add(isa.mul(isa.gather(values, isa.load_u8(sixteen)), scale), offset), lanes);
                }
                _ => self.decode(at, &mut lanes[..count]),
            }
        }
        &buffer[..count]
    }

    /// Absmax of the blocks from `first`, decoded: [`Scales::get`] for each.
    #[inline(always)]
    pub(crate) fn decode(&self, first: usize, out: &mut [f32]) {
        match *self {
            Self::Plain(absmax) => out.copy_from_slice(&absmax[first..][..out.len()]),
            Self::Double { codes, nested_absmax, offset } => {
                let values = &dynamic8::map().values;
                let (mut first, mut rest) = (first, out);
                while !rest.is_empty() {
                    let nested = first / NESTED_BLOCK_SIZE;
                    let count = ((nested + 1) * NESTED_BLOCK_SIZE - first).min(rest.len());
                    let (now, after) = rest.split_at_mut(count);
                    let scale = nested_absmax[nested];
                    for (value, code) in now.iter_mut().zip(&codes[first..][..count]) {
                        *value = values[usize::from(*code)] * scale + offset;
                    }
                    (first, rest) = (first + count, after);
                }
            }
        }
    }

    fn check(&self, blocks: usize) -> Result<()> {
        match *self {
            Self::Plain(absmax) => check_len("absmax", blocks, absmax.len()),
            Self::Double { codes, nested_absmax, .. } => {
                check_len("absmax", blocks, codes.len())?;
                check_len("nested_absmax", blocks.div_ceil(NESTED_BLOCK_SIZE), nested_absmax.len())
            }
        }
    }
}

/// A 4-bit tensor in memory: flat row-major nibbles, high nibble first, and the scale of each block.
#[derive(Debug, Clone, Copy)]
pub struct Packed<'a> {
    codes: &'a [u8],
    scales: Scales<'a>,
    spec: QuantSpec,
    numel: usize,
}

impl<'a> Packed<'a> {
    /// Checks every length against `numel`.
    ///
    /// # Errors
    /// [`Error::Length`] naming the buffer that does not fit.
    pub fn new(codes: &'a [u8], scales: Scales<'a>, spec: QuantSpec, numel: usize) -> Result<Self> {
        check_len("codes", numel.div_ceil(2), codes.len())?;
        scales.check(spec.blocks(numel))?;
        Ok(Self { codes, scales, spec, numel })
    }

    /// Packed nibbles.
    #[must_use]
    pub fn codes(&self) -> &'a [u8] {
        self.codes
    }

    /// Scales of the blocks.
    #[must_use]
    pub fn scales(&self) -> Scales<'a> {
        self.scales
    }

    /// How the tensor was quantized.
    #[must_use]
    pub fn spec(&self) -> QuantSpec {
        self.spec
    }

    /// Elements of the tensor.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// Code of element `i`.
    #[must_use]
    #[inline(always)]
    pub fn code(&self, i: usize) -> u8 {
        let byte = self.codes[i / 2];
        if i.is_multiple_of(2) { byte >> 4 } else { byte & 15 }
    }
}
