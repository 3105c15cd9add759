//! What of many samples is told.

use anyhow::{Context as _, Result};
use serde::Serialize;

/// Three percentiles of one measurement, milliseconds with three decimals.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Percentiles {
    /// Half of the samples are at most this.
    pub p50: f64,
    /// Nine of ten samples are at most this.
    pub p90: f64,
    /// 99 of 100 samples are at most this.
    pub p99: f64,
}

impl Percentiles {
    /// Of samples in any order; each percentile is one of the samples (nearest rank), none is made up in between.
    ///
    /// # Errors
    /// Without samples there are none, and a sample that is no number is no measurement.
    pub fn of(samples: &[f64]) -> Result<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let largest = sorted.last().context("no samples")?;
        // Sorted last by their total order.
        anyhow::ensure!(largest.is_finite(), "a sample is {largest}");
        let rank = |percent| sorted.get(nearest_rank(sorted.len(), percent)).copied().map(rounded);
        let of = |percent| rank(percent).context("no samples");
        Ok(Self { p50: of(50)?, p90: of(90)?, p99: of(99)? })
    }
}

/// Index of the smallest sample that `percent` of all samples do not exceed.
fn nearest_rank(count: usize, percent: usize) -> usize {
    (count * percent).div_ceil(100).saturating_sub(1)
}

/// A microsecond is as exact as these measurements can be.
pub(super) fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_percentile_is_the_sample_of_its_rank() {
        let samples: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(Percentiles::of(&samples).unwrap(), Percentiles { p50: 100.0, p90: 180.0, p99: 198.0 });
    }

    #[test]
    fn few_samples_are_their_own_percentiles() {
        assert_eq!(Percentiles::of(&[7.0]).unwrap(), Percentiles { p50: 7.0, p90: 7.0, p99: 7.0 });
        assert_eq!(Percentiles::of(&[3.0, 1.0, 2.0]).unwrap(), Percentiles { p50: 2.0, p90: 3.0, p99: 3.0 });
        assert_eq!(Percentiles::of(&[4.0, 1.0, 3.0, 2.0]).unwrap().p50, 2.0);
    }

    #[test]
    fn microseconds_are_kept_and_nothing_finer() {
        assert_eq!(Percentiles::of(&[2.345_678_9]).unwrap().p50, 2.346);
    }

    #[test]
    fn nothing_comes_of_nothing() {
        assert!(Percentiles::of(&[]).is_err());
        assert!(Percentiles::of(&[1.0, f64::NAN]).is_err());
        assert!(Percentiles::of(&[1.0, f64::INFINITY]).is_err());
    }

    /// The definition itself, on every length and percentile that matters.
    #[test]
    fn at_least_that_many_samples_are_at_most_the_percentile() {
        for count in 1_u32..=300 {
            let samples: Vec<f64> = (0..count).map(f64::from).collect();
            let found = Percentiles::of(&samples).unwrap();
            for (percent, value) in [(50.0, found.p50), (90.0, found.p90), (99.0, found.p99)] {
                let needed = f64::from(count) * percent / 100.0;
                assert!(value + 1.0 >= needed, "{count} {percent}: too low");
                assert!(value < needed, "{count} {percent}: too high");
            }
        }
    }
}
