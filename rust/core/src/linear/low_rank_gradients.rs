//! dA and dB of the low-rank branch: `dA = dSᵀ·(mask ⊙ x)`, `dB = scaling · dYᵀ·S`.

use super::lora::LowRank;
use super::panel::Source;
use super::reduce::{columns_per_task, over_rows};
use super::weight::Weight;
use crate::Result;
use crate::dtype::{Element, Floats, FloatsMut, like, narrow, with_floats};
use crate::error::{check_len, check_matrix};
use crate::parallel::split_columns;
use crate::simd::Isa;

/// Inputs and outputs of the low-rank branch's backward.
#[derive(Debug)]
pub struct LoraGradients<'a> {
    /// The branch.
    pub lora: &'a LowRank<'a>,
    /// x `[M, K]` of the forward pass, in the type of dY. Only dA needs it.
    pub x: Option<Floats<'a>>,
    /// S `[M, r]` of the forward pass, in the type of dY. Only dB needs it.
    pub s: Option<Floats<'a>>,
    /// dA `[r, K]`, summed in float32 and rounded once.
    pub da: Option<FloatsMut<'a>>,
    /// dB `[N, r]`, summed in float32 and rounded once.
    pub db: Option<FloatsMut<'a>>,
}

impl<'a> LoraGradients<'a> {
    /// Whether everything fits the weight and `rows`.
    pub(super) fn check(&self, rows: usize, weight: &Weight<'_>) -> Result<()> {
        self.lora.check(rows, weight)?;
        if let Some(da) = &self.da {
            check_len("da", self.lora.a.len(), da.len())?;
            check_matrix("x", (rows, weight.in_features()), self.x.map_or(0, |x| x.len()))?;
        }
        if let Some(db) = &self.db {
            check_len("db", self.lora.b.len(), db.len())?;
            check_matrix("s", (rows, self.lora.rank), self.s.map_or(0, |s| s.len()))?;
        }
        Ok(())
    }

    /// With x and S in the type of `dy`.
    pub(super) fn typed<E: Element>(self, dy: &[E]) -> Result<TypedGradients<'a, E>> {
        Ok(TypedGradients {
            lora: self.lora,
            x: self.x.map(|x| like(dy, "dy", "x", x)).transpose()?.unwrap_or_default(),
            s: self.s.map(|s| like(dy, "dy", "s", s)).transpose()?.unwrap_or_default(),
            da: self.da,
            db: self.db,
        })
    }
}

/// [`LoraGradients`] whose activations have one known type.
pub(super) struct TypedGradients<'a, E> {
    pub(super) lora: &'a LowRank<'a>,
    pub(super) x: &'a [E],
    pub(super) s: &'a [E],
    pub(super) da: Option<FloatsMut<'a>>,
    pub(super) db: Option<FloatsMut<'a>>,
}

impl<'a, E: Element> TypedGradients<'a, E> {
    pub(super) fn lora(&self) -> &'a LowRank<'a> {
        self.lora
    }

    /// Computes what is asked for from `dy [rows, N]` and `ds [rows, r]`; `k` is K.
    pub(super) fn compute<I: Isa>(self, isa: I, threads: usize, rows: usize, dy: &Source<'_, E>, ds: &[f32], k: usize) {
        let rank = self.lora.rank;
        if rank == 0 {
            return; // dA and dB have no element
        }
        if let Some(da) = self.da {
            let x = Source { data: self.x, cols: k, first_row: 0, dropout: self.lora.dropout };
            let width = columns_per_task(k);
            in_float32(isa, da, |da| {
                let parts = split_columns(da, k, width);
                over_rows(isa, threads, (ds, rank), &x, (rows, width), parts, |part, cols, da: Vec<&mut [f32]>| {
                    for (i, line) in da.into_iter().enumerate() {
                        for (c, value) in line.iter_mut().enumerate() {
                            *value = part.get::<I>(i, c, cols);
                        }
                    }
                });
            });
        }
        if let Some(db) = self.db {
            let width = columns_per_task(dy.cols);
            let scaling = self.lora.scaling;
            let s: Vec<f32> = self.s.iter().map(|v| v.to_f32()).collect();
            in_float32(isa, db, |db| {
                let parts: Vec<_> = db.chunks_mut(width * rank).collect();
                over_rows(isa, threads, (&s, rank), dy, (rows, width), parts, |part, cols, db: &mut [f32]| {
                    for (c, line) in db.chunks_mut(rank).enumerate() {
                        for (i, value) in line.iter_mut().enumerate() {
                            *value = scaling * part.get::<I>(i, c, cols);
                        }
                    }
                });
            });
        }
    }
}

/// Lets `work` fill a float32 buffer of the size of `out`: `out` itself, or one that is then rounded into it.
pub(super) fn in_float32<I: Isa>(isa: I, out: FloatsMut<'_>, work: impl FnOnce(&mut [f32])) {
    if let FloatsMut::F32(out) = out {
        return work(out);
    }
    let mut wide = vec![0.0; out.len()];
    work(&mut wide);
    with_floats!(FloatsMut, out, out => isa.vectorize(
        #[inline(always)]
        || narrow(isa, &wide, out),
    ));
}
