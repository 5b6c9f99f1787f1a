//! When to probe again, and which probe to give up: the arithmetic of hedged readiness,
//! without sockets or clocks.
//!
//! A SYN can be lost for good reason: the tap's carrier comes up a few milliseconds after its
//! reader has attached, and what is sent into that gap is dropped. The kernel repeats a SYN
//! only after a full second. So many are sent, each on a connection of its own, close to one
//! another at first. Unanswered SYNs cost the guest next to nothing; requests do cost it
//! something, so once a connection stands, further ones come slowly: TCP carries the request.

use std::time::{Duration, Instant};

/// How eagerly a guest is probed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hedge {
    /// Time between the first probes.
    pub first_gap: Duration,
    /// How many probes follow one another that closely.
    pub burst: u32,
    /// Growth of the gap after the burst, in percent of the gap before: 130 is ×1.3.
    pub growth_percent: u32,
    /// Longest gap while nothing answers.
    pub widest_gap: Duration,
    /// Longest gap while the guest's kernel refuses, or the agent answers that it is not
    /// ready: the path works and the next answer costs next to nothing.
    pub refused_gap: Duration,
    /// First gap once a connection stands; doubled by each further one.
    pub connected_gap: Duration,
    /// Longest gap once a connection stands.
    pub widest_connected_gap: Duration,
    /// Most probes in flight.
    pub in_flight: usize,
    /// Shortest time that a connected probe is left to wait for its answer. The limit grows
    /// with the time that the guest has taken so far, so that no guest is too slow for it.
    pub answer_floor: Duration,
}

impl Default for Hedge {
    fn default() -> Self {
        Self {
            first_gap: Duration::from_millis(1),
            burst: 10,
            growth_percent: 130,
            widest_gap: Duration::from_millis(50),
            refused_gap: Duration::from_millis(5),
            connected_gap: Duration::from_millis(25),
            widest_connected_gap: Duration::from_millis(250),
            in_flight: 12,
            answer_floor: Duration::from_millis(250),
        }
    }
}

impl Hedge {
    fn grown(&self, gap: Duration, widest: Duration) -> Duration {
        let grown = gap.saturating_mul(self.growth_percent.max(100)) / 100;
        grown.min(widest).max(self.first_gap)
    }

    /// How long a probe may wait for its answer that was connected `waited` after the first
    /// probe of all: as long again, and at least [`Hedge::answer_floor`].
    ///
    /// A guest that takes a time T for an answer is served by the first probe that connects
    /// after T, so it is found ready within about 2 T, however large T is. A fixed limit
    /// below T would starve it for ever.
    #[must_use]
    pub fn answer_limit(&self, waited: Duration) -> Duration {
        waited.max(self.answer_floor)
    }
}

/// When the next probe is due.
#[derive(Debug, Clone)]
pub(super) struct Schedule {
    hedge: Hedge,
    sent: u64,
    gap: Duration,
    refused_gap: Duration,
    connected_gap: Duration,
    next_at: Instant,
}

impl Schedule {
    /// A schedule whose first probe is due now.
    pub(super) fn new(hedge: Hedge, now: Instant) -> Self {
        Self {
            sent: 0,
            gap: hedge.first_gap,
            refused_gap: hedge.first_gap,
            connected_gap: hedge.connected_gap,
            next_at: now,
            hedge,
        }
    }

    pub(super) const fn hedge(&self) -> &Hedge {
        &self.hedge
    }

    pub(super) const fn next_at(&self) -> Instant {
        self.next_at
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        now >= self.next_at
    }

    /// A probe was sent. Its number, from 1. However late it was, the next one comes a whole
    /// gap later: a loop that was held up does not fire a volley.
    pub(super) fn sent(&mut self, now: Instant) -> u64 {
        self.sent += 1;
        self.next_at = now + self.gap;
        if self.sent >= u64::from(self.hedge.burst) {
            self.gap = self.hedge.grown(self.gap, self.hedge.widest_gap);
        }
        self.sent
    }

    /// A connection stands: the next probe can wait.
    pub(super) fn connected(&mut self, now: Instant) {
        self.next_at = self.next_at.max(now + self.connected_gap);
        let widest = self.hedge.widest_connected_gap;
        self.connected_gap = self.connected_gap.saturating_mul(2).min(widest);
    }

    /// A probe was refused, or ended with an answer that is not the right one: the path
    /// works, so try again soon.
    pub(super) fn turned_down(&mut self, now: Instant) {
        self.next_at = self.next_at.min(now + self.refused_gap);
        self.refused_gap = self.hedge.grown(self.refused_gap, self.hedge.refused_gap);
    }
}

/// Which of several unanswered probes to give up for a new one, by index into `numbers`.
///
/// Numbers grow with time. The one that ends in the fewest zero bits goes, the oldest of
/// equals; never the newest. So the ages of those kept spread out geometrically: a guest
/// whose first packet takes seconds still finds an old connection to answer on, while most
/// are recent.
pub(super) fn give_up(numbers: impl Iterator<Item = (usize, u64)>) -> Option<usize> {
    let mut all: Vec<_> = numbers.collect();
    let newest = all.iter().map(|(_, number)| *number).max()?;
    if all.len() > 1 {
        all.retain(|(_, number)| *number != newest);
    }
    let victim = all
        .into_iter()
        .min_by_key(|(_, number)| (number.trailing_zeros(), *number));
    victim.map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(duration: Duration) -> f64 {
        duration.as_secs_f64() * 1e3
    }

    /// The times of the first `count` probes that nothing answers.
    fn unanswered(count: usize) -> Vec<f64> {
        let start = Instant::now();
        let mut schedule = Schedule::new(Hedge::default(), start);
        let mut times = Vec::new();
        for _ in 0..count {
            let at = schedule.next_at();
            assert!(schedule.is_due(at));
            schedule.sent(at);
            times.push(millis(at - start));
        }
        times
    }

    #[test]
    fn probes_come_every_millisecond_at_first_and_slow_down() {
        let times = unanswered(60);
        for (number, at) in times.iter().take(10).enumerate() {
            assert!((at - number as f64).abs() < 1e-6, "{number}: {at}");
        }
        let gaps: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.windows(2).all(|pair| pair[1] >= pair[0] - 1e-6));
        assert!((gaps[58] - 50.0).abs() < 1e-6, "{}", gaps[58]);
        // A SYN lost at any time is made up for long before the kernel's own retry.
        assert!(gaps.iter().all(|gap| *gap < 50.001));
    }

    #[test]
    fn a_late_loop_does_not_fire_a_volley() {
        let start = Instant::now();
        let mut schedule = Schedule::new(Hedge::default(), start);
        schedule.sent(start);
        let late = start + Duration::from_secs(1);
        assert!(schedule.is_due(late));
        schedule.sent(late);
        assert!(!schedule.is_due(late));
    }

    #[test]
    fn a_refusal_brings_the_next_probe_forward_and_a_connection_puts_it_off() {
        let start = Instant::now();
        let mut schedule = Schedule::new(Hedge::default(), start);
        let mut now = start;
        for _ in 0..60 {
            now = schedule.next_at();
            schedule.sent(now);
        }
        schedule.turned_down(now);
        assert!((millis(schedule.next_at() - now) - 1.0).abs() < 1e-6);
        for _ in 0..20 {
            now = schedule.next_at();
            schedule.sent(now);
            schedule.turned_down(now);
        }
        let refused = millis(schedule.next_at() - now);
        assert!((refused - 5.0).abs() < 1e-6, "{refused}");

        let mut schedule = Schedule::new(Hedge::default(), start);
        schedule.sent(start);
        let mut gaps = Vec::new();
        for _ in 0..5 {
            schedule.connected(start);
            gaps.push(millis(schedule.next_at() - start));
        }
        assert_eq!(gaps, [25.0, 50.0, 100.0, 200.0, 250.0]);
    }

    #[test]
    fn the_answer_limit_outgrows_every_guest() {
        let hedge = Hedge::default();
        let guest = Duration::from_secs(7);
        // Probes that connect later than the guest's own time are given long enough.
        let waited = Duration::from_secs(8);
        assert!(hedge.answer_limit(waited) > guest);
        assert_eq!(hedge.answer_limit(Duration::ZERO), hedge.answer_floor);
    }

    #[test]
    fn probes_kept_are_of_all_ages() {
        let mut kept: Vec<u64> = Vec::new();
        for number in 1..=1000_u64 {
            if kept.len() == 12 {
                let pairs = kept.iter().copied().enumerate();
                let victim = give_up(pairs).unwrap();
                assert_ne!(kept[victim], number - 1, "the newest was given up");
                kept.remove(victim);
            }
            kept.push(number);
        }
        kept.sort_unstable();
        assert_eq!(kept.last(), Some(&1000));
        assert!(kept[0] <= 512, "{kept:?}");
        assert!(kept.iter().any(|n| (513..=980).contains(n)), "{kept:?}");
        assert_eq!(give_up(std::iter::empty()), None);
        assert_eq!(give_up([(3, 9)].into_iter()), Some(3));
    }
}
