//! The tables that codes index, and the thresholds that choose a code.

pub mod buckets;
pub mod dynamic8;
pub mod fp4;
pub mod nf4;

/// Sixteen thresholds: ascending, padded with infinity.
pub type Thresholds = [f32; 16];

#[cfg(test)]
mod tests;
