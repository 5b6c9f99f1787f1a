//! Summaries of samples, and whether two sets of them differ beyond noise.

/// What a set of durations comes to, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub(super) struct Summary {
    pub(super) n: usize,
    pub(super) min: f64,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Summary {
    /// `None` without samples.
    pub(super) fn of(samples: &[f64]) -> Option<Self> {
        let sorted = sorted(samples);
        Some(Self {
            n: sorted.len(),
            min: *sorted.first()?,
            p50: quantile(&sorted, 0.5),
            p90: quantile(&sorted, 0.9),
            p99: quantile(&sorted, 0.99),
            max: *sorted.last()?,
        })
    }
}

pub(super) fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The smallest sample that at least this fraction of all does not exceed (nearest rank): it
/// was measured, not interpolated.
pub(super) fn quantile(sorted: &[f64], fraction: f64) -> f64 {
    let rank = (fraction * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// [`quantile`] at one half, without sorting all.
fn median(mut samples: Vec<f64>) -> f64 {
    let middle = samples.len().div_ceil(2) - 1;
    *samples.select_nth_unstable_by(middle, f64::total_cmp).1
}

/// How a second set of samples differs from a first one.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub(super) struct Difference {
    /// Median of the second by median of the first.
    pub(super) ratio: f64,
    /// Bounds of the ratio that 99 % of resampled pairs of sets lie within.
    pub(super) low: f64,
    pub(super) high: f64,
    /// Two-sided: how often chance alone makes ranks differ as much, if both sets come from
    /// one distribution.
    pub(super) p: f64,
}

impl Difference {
    /// Chance makes one in a thousand comparisons look like this.
    const SIGNIFICANT: f64 = 0.001;
    /// Medians closer than this are the same for everybody who has to choose.
    const RELEVANT: f64 = 0.02;

    /// `None` where a set has fewer than 8 samples: nothing can be said then.
    pub(super) fn between(before: &[f64], after: &[f64]) -> Option<Self> {
        if before.len() < 8 || after.len() < 8 {
            return None;
        }
        let (low, high) = bootstrap(before, after);
        Some(Self {
            ratio: median(after.to_vec()) / median(before.to_vec()),
            low,
            high,
            p: mann_whitney(before, after),
        })
    }

    /// Whether the second moved beyond noise: the ranks say so, the medians lie apart, and
    /// their ratio is on one side of 1 in 99 % of resamplings.
    pub(super) fn moved(&self) -> bool {
        self.p < Self::SIGNIFICANT
            && (self.ratio - 1.0).abs() > Self::RELEVANT
            && (self.low > 1.0 || self.high < 1.0)
    }
}

const RESAMPLINGS: usize = 1000;

/// The 0.5th and 99.5th percentile of the ratio of medians over resampled pairs of sets.
fn bootstrap(before: &[f64], after: &[f64]) -> (f64, f64) {
    // The same seed for everybody: the same files give the same answer.
    let mut random = Random::new(0x7265_7761_6b65);
    let ratios: Vec<f64> = (0..RESAMPLINGS)
        .map(|_| median(resample(after, &mut random)) / median(resample(before, &mut random)))
        .collect();
    let ratios = sorted(&ratios);
    (quantile(&ratios, 0.005), quantile(&ratios, 0.995))
}

fn resample(samples: &[f64], random: &mut Random) -> Vec<f64> {
    let pick = |_| samples[random.below(samples.len())];
    (0..samples.len()).map(pick).collect()
}

/// Two-sided p of the rank-sum test, by its normal approximation with corrections for ties
/// and continuity (from 8 samples a side on, that is good to a few percent).
fn mann_whitney(a: &[f64], b: &[f64]) -> f64 {
    let (n, m) = (a.len() as f64, b.len() as f64);
    let mut all: Vec<(f64, bool)> = a.iter().map(|x| (*x, true)).collect();
    all.extend(b.iter().map(|x| (*x, false)));
    all.sort_by(|x, y| x.0.total_cmp(&y.0));
    let (mut rank_sum, mut ties, mut at) = (0.0, 0.0, 0);
    while at < all.len() {
        let equal = all[at..].iter().take_while(|x| x.0 == all[at].0).count();
        // Ranks count from 1; equal samples share the mean of theirs.
        let rank = at as f64 + (equal as f64 + 1.0) / 2.0;
        rank_sum += rank * all[at..at + equal].iter().filter(|x| x.1).count() as f64;
        ties += (equal as f64).powi(3) - equal as f64;
        at += equal;
    }
    let u = rank_sum - n * (n + 1.0) / 2.0;
    let total = n + m;
    let variance = n * m / 12.0 * (total + 1.0 - ties / (total * (total - 1.0)));
    if variance <= 0.0 {
        return 1.0;
    }
    let distance = ((u - n * m / 2.0).abs() - 0.5).max(0.0);
    (2.0 * upper_tail(distance / variance.sqrt())).min(1.0)
}

/// 1 - Φ(z) for z >= 0 (Abramowitz and Stegun 26.2.17; absolute error below 7.5e-8).
fn upper_tail(z: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * z);
    let density = (-z * z / 2.0).exp() / std::f64::consts::TAU.sqrt();
    let coefficients = [
        0.319_381_530,
        -0.356_563_782,
        1.781_477_937,
        -1.821_255_978,
        1.330_274_429,
    ];
    let sum = coefficients
        .iter()
        .rev()
        .fold(0.0, |sum, factor| (sum + factor) * t);
    density * sum
}

/// A small deterministic generator (SplitMix64), for shuffling and resampling.
pub(super) struct Random(u64);

impl Random {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// A number below `limit`, which is small: the bias does not matter.
    pub(super) const fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    pub(super) fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            list.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Latencies as they are: a floor, a spread, now and then something slow.
    fn latencies(seed: u64, count: usize, base: f64) -> Vec<f64> {
        let mut random = Random::new(seed);
        let mut unit = || (random.next() >> 11) as f64 / (1_u64 << 53) as f64;
        (0..count)
            .map(|_| {
                let slow = if unit() < 0.03 { 5.0 * unit() } else { 0.0 };
                base * (1.0 + 0.1 * unit() + 0.1 * unit() + slow)
            })
            .collect()
    }

    #[test]
    fn quantiles_are_samples_by_nearest_rank() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        for (fraction, expected) in [
            (0.0, 1.0),
            (0.5, 50.0),
            (0.9, 90.0),
            (0.99, 99.0),
            (1.0, 100.0),
        ] {
            assert_eq!(quantile(&hundred, fraction), expected, "{fraction}");
        }
        let summary = Summary::of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!((summary.n, summary.min, summary.p50), (3, 1.0, 2.0));
        assert_eq!((summary.p99, summary.max), (3.0, 3.0));
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn the_tail_of_the_normal_distribution_is_right() {
        for (z, tail) in [
            (0.0, 0.5),
            (1.0, 0.158_655_3),
            (1.96, 0.024_997_9),
            (3.0, 0.001_349_9),
        ] {
            assert!(
                (upper_tail(z) - tail).abs() < 1e-6,
                "{z}: {}",
                upper_tail(z)
            );
        }
    }

    #[test]
    fn the_rank_sum_test_agrees_with_a_published_example() {
        // Mann and Whitney's test without ties, n = m = 8: U = 12 has the exact two-sided
        // p of 0.0379; the approximation with continuity correction gives 0.0406.
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 8.0, 11.0, 14.0];
        let b = [6.0, 7.0, 9.0, 10.0, 12.0, 13.0, 15.0, 16.0];
        let p = mann_whitney(&a, &b);
        assert!((p - 0.0406).abs() < 0.001, "{p}");
        assert_eq!(mann_whitney(&a, &b), mann_whitney(&b, &a));
        assert_eq!(mann_whitney(&[1.0; 9], &[1.0; 9]), 1.0, "all tied");
    }

    #[test]
    fn equal_samples_have_not_moved() {
        let same = latencies(1, 200, 10.0);
        let difference = Difference::between(&same, &same).unwrap();
        assert!(!difference.moved(), "{difference:?}");
        let mut moved = 0;
        for seed in 0..40 {
            let (a, b) = (
                latencies(seed, 200, 10.0),
                latencies(seed + 1000, 200, 10.0),
            );
            moved += usize::from(Difference::between(&a, &b).unwrap().moved());
        }
        assert_eq!(moved, 0, "of 40 pairs from one distribution");
    }

    #[test]
    fn shifted_samples_have_moved_and_the_ratio_says_where() {
        for seed in 0..8 {
            let before = latencies(seed, 200, 10.0);
            for (shift, slower) in [(1.1, true), (0.9, false)] {
                let after = latencies(seed + 500, 200, 10.0 * shift);
                let difference = Difference::between(&before, &after).unwrap();
                assert!(difference.moved(), "{seed}: {difference:?}");
                assert_eq!(difference.ratio > 1.0, slower, "{difference:?}");
                assert!(
                    difference.low < shift && shift < difference.high,
                    "{difference:?}"
                );
            }
        }
    }

    #[test]
    fn a_difference_that_nobody_feels_is_none_and_few_samples_say_nothing() {
        let before: Vec<f64> = (0..2000).map(|n| 10.0 + f64::from(n) * 1e-6).collect();
        let after: Vec<f64> = before.iter().map(|x| x * 1.005).collect();
        let difference = Difference::between(&before, &after).unwrap();
        assert!(difference.p < 1e-9 && !difference.moved(), "{difference:?}");
        assert_eq!(Difference::between(&before[..7], &after), None);
    }

    #[test]
    fn shuffling_keeps_every_element_and_repeats_with_its_seed() {
        let shuffled = |seed| {
            let mut list: Vec<usize> = (0..50).collect();
            Random::new(seed).shuffle(&mut list);
            list
        };
        assert_eq!(shuffled(1), shuffled(1));
        assert_ne!(shuffled(1), shuffled(2));
        let mut back = shuffled(3);
        back.sort_unstable();
        assert_eq!(back, (0..50).collect::<Vec<_>>());
    }
}
