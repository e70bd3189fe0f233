//! The low-rank branch: `scaling · drop(x)·Aᵀ·Bᵀ`.

use std::borrow::Cow;

use super::row_ranks::RowRanks;
use super::weight::Weight;
use crate::dtype::Floats;
use crate::error::{check_finite, check_matrix};
use crate::{Error, Result};

/// Dropout of the branch's input: element kept with probability `1 - p` and divided by `1 - p`.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    p: f32,
    seed: u64,
}

impl Dropout {
    /// Probability `p` of dropping; the mask is a pure function of `seed` and the element's place.
    ///
    /// # Errors
    /// [`Error::Range`] unless `0 <= p < 1`.
    pub fn new(p: f32, seed: u64) -> Result<Self> {
        if (0.0..1.0).contains(&p) {
            Ok(Self { p, seed })
        } else {
            Err(Error::Range { what: "dropout_p", expected: "at least 0 and below 1", got: p.to_string() })
        }
    }

    /// Probability of dropping an element.
    #[must_use]
    pub fn p(&self) -> f32 {
        self.p
    }

    /// Key of the generator.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// `None` if nothing is ever dropped.
    pub(super) fn active(self) -> Option<Self> {
        (self.p > 0.0).then_some(self)
    }
}

/// Operands of the branch, in float32.
#[derive(Debug)]
pub struct LowRank<'a> {
    /// `[r, K]`
    pub(super) a: Cow<'a, [f32]>,
    /// `[N, r]`
    pub(super) b: Cow<'a, [f32]>,
    pub(super) rank: usize,
    pub(super) scaling: f32,
    pub(super) dropout: Option<Dropout>,
    /// None: every row uses all ranks.
    pub(super) row_ranks: Option<RowRanks>,
}

impl<'a> LowRank<'a> {
    /// `a [rank, in_features]`, `b [out_features, rank]`. Both are small; 16-bit ones are widened here, once.
    ///
    /// # Errors
    /// [`Error::Length`] if a buffer does not fit the shape.
    pub fn new(
        (a, b): (Floats<'a>, Floats<'a>),
        rank: usize,
        (out_features, in_features): (usize, usize),
        scaling: f32,
        dropout: Dropout,
    ) -> Result<Self> {
        check_matrix("lora_A", (rank, in_features), a.len())?;
        check_matrix("lora_B", (out_features, rank), b.len())?;
        Ok(Self { a: a.widened(), b: b.widened(), rank, scaling, dropout: dropout.active(), row_ranks: None })
    }

    /// The branch of which each row uses its own ranks.
    ///
    /// # Errors
    /// [`Error::Range`] if A or B holds a value that is not finite: times zero it would reach the rows of others.
    pub fn of_rows(self, row_ranks: RowRanks) -> Result<Self> {
        check_finite("lora_A of an adapter in a mixed batch", &self.a)?;
        check_finite("lora_B of an adapter in a mixed batch", &self.b)?;
        Ok(Self { row_ranks: Some(row_ranks), ..self })
    }

    /// r
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Whether the operands fit the weight and as many rows.
    pub(super) fn check(&self, rows: usize, weight: &Weight<'_>) -> Result<()> {
        check_matrix("lora_A", (self.rank, weight.in_features()), self.a.len())?;
        check_matrix("lora_B", (weight.out_features(), self.rank), self.b.len())?;
        self.row_ranks.as_ref().map_or(Ok(()), |row_ranks| row_ranks.check(rows))
    }
}
