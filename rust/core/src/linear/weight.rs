//! The packed weight as an `N × K` matrix.

use crate::Result;
use crate::codec::dequantize::decode_range;
use crate::codec::int8::Int8Matrix;
use crate::codec::spec::Packed;
use crate::dtype::Element;
use crate::error::check_matrix;
use crate::simd::Isa;

/// A quantized weight of `out_features` rows and `in_features` columns.
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a> {
    storage: Storage<'a>,
    out_features: usize,
    in_features: usize,
}

#[derive(Debug, Clone, Copy)]
enum Storage<'a> {
    FourBit(Packed<'a>),
    Int8(Int8Matrix<'a>),
}

impl<'a> Weight<'a> {
    /// A 4-bit tensor seen as a matrix.
    ///
    /// # Errors
    /// [`crate::Error::Length`] unless it has `out_features · in_features` elements.
    pub fn four_bit(packed: Packed<'a>, out_features: usize, in_features: usize) -> Result<Self> {
        check_matrix("weight", (out_features, in_features), packed.numel())?;
        Ok(Self { storage: Storage::FourBit(packed), out_features, in_features })
    }

    /// A row-wise int8 matrix.
    ///
    /// # Errors
    /// [`crate::Error::Length`] if the buffers do not fit the shape.
    pub fn int8(codes: &'a [i8], scb: &'a [f32], out_features: usize, in_features: usize) -> Result<Self> {
        let matrix = Int8Matrix::new(codes, scb, out_features, in_features)?;
        Ok(Self { storage: Storage::Int8(matrix), out_features, in_features })
    }

    /// N
    #[must_use]
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// K
    #[must_use]
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// The 4-bit tensor, if every row is a whole number of blocks: then a row's scales are contiguous
    /// and its bytes start at a byte.
    pub(super) fn whole_blocks(&self) -> Option<&Packed<'a>> {
        match &self.storage {
            Storage::FourBit(packed) if self.in_features.is_multiple_of(packed.spec().block_size()) => Some(packed),
            _ => None,
        }
    }

    /// Dequantizes `out.len()` values of row `row` from column `col`.
    ///
    /// Callers decode the same columns of row after row. Those are short pieces far apart in memory, which no
    /// processor foresees, so the piece of a later row is asked for here.
    #[inline(never)]
    pub(super) fn decode<I: Isa, E: Element>(&self, isa: I, row: usize, col: usize, out: &mut [E]) {
        isa.vectorize(
            #[inline(always)]
            || self.decode_inlined(isa, row, col, out),
        );
    }

    #[inline(always)]
    fn decode_inlined<I: Isa, E: Element>(&self, isa: I, row: usize, col: usize, out: &mut [E]) {
        /// Rows ahead: decoding them takes about as long as memory takes to answer.
        const AHEAD: usize = 8;
        if row + AHEAD < self.out_features {
            let first = (row + AHEAD) * self.in_features + col;
            match &self.storage {
                Storage::FourBit(packed) => isa.prefetch(&packed.codes()[first / 2..][..out.len() / 2]),
                Storage::Int8(matrix) => isa.prefetch(&matrix.codes()[first..][..out.len()]),
            }
        }
        match &self.storage {
            Storage::FourBit(packed) => decode_range(isa, packed, row * self.in_features + col, out),
            Storage::Int8(matrix) => matrix.decode_row(isa, row, col, out),
        }
    }
}
