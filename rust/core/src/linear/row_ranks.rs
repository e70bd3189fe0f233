//! Stacked branches of which each row uses its own: a batch whose rows have different adapters.

use std::ops::Range;

use crate::error::check_len;
use crate::{Error, Result};

/// Which of a branch's ranks each row uses. S and dS are zero at the others, so that `A [Σr, K]` and `B [N, Σr]` of
/// several adapters, one after another, give each row the product of its own adapter alone.
#[derive(Debug, Clone)]
pub struct RowRanks {
    /// One for every `each` rows; empty where the rows have no adapter.
    spans: Vec<Range<usize>>,
    each: usize,
}

impl RowRanks {
    /// `spans[i]` of `rank` for rows `i · rows / spans.len()` and those after it, up to the next span's.
    ///
    /// # Errors
    /// [`Error::Range`] for a span that is not in `0..rank`, or rows that are no multiple of the spans.
    pub fn new(spans: Vec<Range<usize>>, rows: usize, rank: usize) -> Result<Self> {
        if let Some(span) = spans.iter().find(|span| span.start > span.end || span.end > rank) {
            let got = format!("{span:?} of {rank}");
            return Err(Error::Range { what: "row_ranks", expected: "ranges of the branch's ranks", got });
        }
        if spans.is_empty() || !rows.is_multiple_of(spans.len()) {
            let got = format!("{} for {rows} rows", spans.len());
            return Err(Error::Range { what: "row_ranks", expected: "as many ranges as divide the rows", got });
        }
        Ok(Self { each: rows / spans.len(), spans })
    }

    /// Fails unless it was made for `rows`.
    pub(super) fn check(&self, rows: usize) -> Result<()> {
        check_len("rows of row_ranks", rows, self.each * self.spans.len())
    }

    /// The ranks of one row.
    pub(super) fn of(&self, row: usize) -> Range<usize> {
        self.spans[row / self.each].clone()
    }

    /// Clears what is not the rows' own in `lines [rows, rank]`, from row `first`.
    pub(super) fn clear_others(&self, first: usize, rank: usize, lines: &mut [f32]) {
        for (row, line) in lines.chunks_mut(rank.max(1)).enumerate() {
            let own = self.of(first + row);
            line[..own.start].fill(0.0);
            line[own.end..].fill(0.0);
        }
    }

    /// [`RowRanks::clear_others`] of `columns [rank, width]`, of which the first `rows` are there.
    pub(super) fn clear_others_across(&self, (first, rows): (usize, usize), width: usize, columns: &mut [f32]) {
        for row in 0..rows.min(width) {
            let own = self.of(first + row);
            for (j, line) in columns.chunks_mut(width).enumerate() {
                if !own.contains(&j) {
                    line[row] = 0.0;
                }
            }
        }
    }
}
