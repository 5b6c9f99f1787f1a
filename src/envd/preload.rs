//! The memory preload as a state machine on the host's side, without any I/O.
//!
//! After a lazy restore the guest's agent walks all of its memory, so that every page is
//! there before the next snapshot is written. The trouble is that the agent's own state is
//! part of that memory: until an `/init` with a new lifecycle id was acknowledged, `done`
//! speaks of the life that was captured, and a snapshot taken on its word is full of holes
//! that read back as zeros, silently, one generation later. So:
//!
//! ```text
//! restore --> NeedInit --(/init, new id)--> Armed --(POST)--> Running --(done)--> Materialised
//!                                             ^                 |  |  |
//!                                             +-----(idle)------+  |  +--(stall, nonsense)--> Lost
//!             Spoiled <-------------------(failed | cancelled)-----+
//!                |                            404 | 415 to anything --> Unsupported
//!                +--(once: /init, new id)--> Armed           VMM exit --> Lost
//! ```
//!
//! [`Preload`] is told what happened and says what to do next ([`Preload::step`]); who asks
//! the guest is [`materialise`](super::materialise).

use std::fmt;
use std::time::{Duration, Instant};

use super::init::Lifecycle;
use super::reply::{PreloadStatus, WalkState};
use super::text::GuestText;
use crate::units::Bytes;

/// Where the guest's memory stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// All memory is the guest's own since its start: nothing to do, ever.
    ColdBoot,
    /// Restored; the agent still speaks of its captured life. Nothing it says counts.
    NeedInit,
    /// The new life has begun, no walk is known to run.
    Armed,
    /// A walk is under way.
    Running,
    /// All memory is there: a snapshot is safe.
    Materialised,
    /// This life's walk ended badly and cannot be repeated; a new life can.
    Spoiled,
    /// The agent has no preload: memory must be filled from the host's side.
    Unsupported,
    /// Nothing that could still happen makes a snapshot safe.
    Lost,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::ColdBoot => "cold boot",
            Self::NeedInit => "waiting for /init",
            Self::Armed => "armed",
            Self::Running => "running",
            Self::Materialised => "materialised",
            Self::Spoiled => "spoiled",
            Self::Unsupported => "unsupported",
            Self::Lost => "lost",
        })
    }
}

/// What led to [`State::Spoiled`], [`State::Unsupported`] or [`State::Lost`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// The agent could read its memory from no source.
    #[error("The walk failed in the guest: {0}")]
    Failed(GuestText),
    /// Somebody called `/memory/preload/cancel`.
    #[error("The walk was cancelled in the guest")]
    Cancelled,
    /// `done`, though far too little was touched for it.
    #[error("The guest says done, but touched {} of {ram}", touched.map_or_else(|| "an unknown part".to_owned(), |b| b.to_string()))]
    Implausible {
        /// What the guest says it touched, `None` where it does not say.
        touched: Option<Bytes>,
        /// The VM's memory.
        ram: Bytes,
    },
    /// The agent answered 404 or 415.
    #[error("The agent has no memory preload (HTTP status {0})")]
    NoPreload(u16),
    /// The agent refused in a way that repeating cannot help.
    #[error("The agent refused with HTTP status {0}")]
    Refused(u16),
    /// The agent's answer cannot be understood; nothing is guessed.
    #[error("The agent's answer cannot be understood")]
    Garbled,
    /// The walk stood still: the source of pages has stalled, and a thread that sits in such
    /// a fault cannot even be cancelled.
    #[error("The walk stood still at {pages} pages for {limit:?}")]
    Stalled {
        /// Pages touched.
        pages: u64,
        /// [`Limits::stall`].
        limit: Duration,
    },
    /// [`Limits::total`] is spent.
    #[error("The walk was not done after {0:?}")]
    OverBudget(Duration),
    /// The agent keeps forgetting that a walk was started.
    #[error("The agent went back to idle {0} times")]
    Forgetful(u32),
    /// The VM is gone.
    #[error("The VMM has exited")]
    VmmExited,
}

/// Limits of one walk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Longest time without progress.
    pub stall: Duration,
    /// Longest time in all, a renewal included.
    pub total: Duration,
    /// First pause between two polls; doubled after each, up to `slowest_poll`.
    pub first_poll: Duration,
    /// Longest pause between two polls.
    pub slowest_poll: Duration,
    /// How often a walk is started again that the agent forgot.
    pub restarts: u32,
    /// How often a spoiled life is replaced by a new one.
    pub renewals: u32,
    /// Share of the VM's memory, in percent, below which a `done` is not believed. What the
    /// firmware reserves is never walked, so this cannot be 100.
    pub plausible_percent: u8,
}

impl Limits {
    /// Limits for a VM with `ram`: 30 s without progress, 60 s and 30 s per GiB in all.
    #[must_use]
    pub fn of(ram: Bytes) -> Self {
        let gib = u32::try_from(ram.gib_rounded_up()).unwrap_or(u32::MAX);
        let per_gib = Duration::from_secs(30);
        Self {
            stall: Duration::from_secs(30),
            total: Duration::from_secs(60).saturating_add(per_gib.saturating_mul(gib)),
            first_poll: Duration::from_millis(50),
            slowest_poll: Duration::from_secs(1),
            restarts: 3,
            renewals: 1,
            plausible_percent: 75,
        }
    }
}

/// What one request to `/memory/preload` came to.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// 200 with a status that can be read.
    Status(PreloadStatus),
    /// Any other final status.
    Refused(u16),
    /// 200 with anything else, or no HTTP at all.
    Garbled,
    /// No answer: refused, reset, timed out, 502, 503, 504. Nothing was learned.
    Silent,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing: memory is all there.
    Rest,
    /// `/init` with a new lifecycle id, then [`Preload::init_acknowledged`].
    Init,
    /// `GET /memory/preload` at the given time, then [`Preload::answered`].
    Ask(Instant),
    /// `POST /memory/preload` at the given time, then [`Preload::answered`].
    Start(Instant),
    /// Nothing can be done; [`Preload::cause`] says why.
    Refuse,
}

/// The memory preload of one VM, as far as the host knows.
#[derive(Debug, Clone)]
pub struct Preload {
    state: State,
    ram: Bytes,
    limits: Limits,
    lifecycle: Option<Lifecycle>,
    cause: Option<Cause>,
    /// The agent was asked and knows the preload.
    asked: bool,
    /// A walk was seen, or believed, in this life.
    walked: bool,
    begun: Option<Instant>,
    next_at: Option<Instant>,
    gap: Duration,
    pages: u64,
    grown_at: Option<Instant>,
    restarts: u32,
    renewals: u32,
}

impl Preload {
    fn new(state: State, ram: Bytes, limits: Limits) -> Self {
        Self {
            state,
            ram,
            gap: limits.first_poll,
            limits,
            lifecycle: None,
            cause: None,
            asked: false,
            walked: false,
            begun: None,
            next_at: None,
            pages: 0,
            grown_at: None,
            restarts: 0,
            renewals: 0,
        }
    }

    /// A VM that was not restored lazily.
    #[must_use]
    pub fn cold_boot() -> Self {
        Self::new(State::ColdBoot, Bytes(0), Limits::of(Bytes(0)))
    }

    /// A VM with `ram`, lazily restored just now.
    #[must_use]
    pub fn restored(ram: Bytes, limits: Limits) -> Self {
        Self::new(State::NeedInit, ram, limits)
    }

    /// A VM found again by a restarted host, whose `/init` with `lifecycle` was acknowledged
    /// before (that must have been written down). A new `/init` would discard a walk that
    /// runs; asking and starting do not.
    #[must_use]
    pub fn adopted(ram: Bytes, limits: Limits, lifecycle: Lifecycle) -> Self {
        let mut preload = Self::new(State::Armed, ram, limits);
        preload.lifecycle = Some(lifecycle);
        preload
    }

    /// Where it stands.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// Why it is spoiled, unsupported or lost.
    #[must_use]
    pub const fn cause(&self) -> Option<&Cause> {
        self.cause.as_ref()
    }

    /// The life that was acknowledged last.
    #[must_use]
    pub const fn lifecycle(&self) -> Option<Lifecycle> {
        self.lifecycle
    }

    /// Pages touched so far, as the guest tells it.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// `/init` with `lifecycle` was answered with 204.
    ///
    /// A new id resets the agent: a walk that ran is over, and whatever was `done` is `idle`.
    /// The same id again (a retry) changes nothing.
    pub fn init_acknowledged(&mut self, lifecycle: Lifecycle) {
        if self.lifecycle == Some(lifecycle) {
            return;
        }
        self.lifecycle = Some(lifecycle);
        let renewal = self.state == State::Spoiled;
        if matches!(
            self.state,
            State::ColdBoot | State::Unsupported | State::Lost
        ) {
            return;
        }
        self.state = State::Armed;
        self.cause = None;
        self.walked = false;
        self.restarts = 0;
        self.next_at = None;
        self.reset_progress();
        if renewal {
            self.renewals += 1;
        } else {
            // After a live snapshot: the next walk is a matter of its own.
            self.renewals = 0;
            self.begun = None;
        }
    }

    /// What to do next. Checks the total budget first.
    pub fn step(&mut self, now: Instant) -> Step {
        match self.state {
            State::ColdBoot | State::Materialised => Step::Rest,
            State::Unsupported | State::Lost => Step::Refuse,
            State::NeedInit => Step::Init,
            State::Spoiled if self.renewals < self.limits.renewals => Step::Init,
            State::Spoiled => Step::Refuse,
            State::Armed | State::Running => {
                let begun = *self.begun.get_or_insert(now);
                if now.saturating_duration_since(begun) >= self.limits.total {
                    self.lose(Cause::OverBudget(self.limits.total));
                    return Step::Refuse;
                }
                let at = self.next_at.unwrap_or(now);
                if self.state == State::Running || !self.asked {
                    Step::Ask(at)
                } else {
                    Step::Start(at)
                }
            }
        }
    }

    /// The guest answered a GET or POST that was sent during `lifecycle`.
    ///
    /// Returns whether the answer counted. An answer to a question from an earlier life does
    /// not, and neither does one that arrives when nothing is waited for.
    pub fn answered(&mut self, now: Instant, lifecycle: Lifecycle, answer: Answer) -> bool {
        let waiting = matches!(self.state, State::Armed | State::Running);
        if self.lifecycle != Some(lifecycle) || !waiting {
            return false;
        }
        match answer {
            Answer::Status(status) => self.status(now, status),
            Answer::Refused(status @ (404 | 415)) => {
                self.state = State::Unsupported;
                self.cause = Some(Cause::NoPreload(status));
            }
            Answer::Refused(status) => self.lose(Cause::Refused(status)),
            Answer::Garbled => self.lose(Cause::Garbled),
            Answer::Silent => self.pace(now),
        }
        true
    }

    fn status(&mut self, now: Instant, status: PreloadStatus) {
        let first_question = !self.asked;
        self.asked = true;
        match status.state {
            WalkState::Running => self.running(now, status.pages),
            WalkState::Done => self.done(&status),
            WalkState::Failed => self.spoil(Cause::Failed(status.error.unwrap_or_default())),
            WalkState::Cancelled => self.spoil(Cause::Cancelled),
            // The first question found it idle, as it should be: start at once.
            WalkState::Idle if first_question && self.state == State::Armed => {
                self.next_at = None;
            }
            WalkState::Idle => self.forgotten(now),
        }
    }

    fn running(&mut self, now: Instant, pages: u64) {
        if self.state == State::Armed {
            self.state = State::Running;
            self.walked = true;
            self.reset_progress();
        }
        let grown_at = *self.grown_at.get_or_insert(now);
        if pages > self.pages {
            self.pages = pages;
            self.grown_at = Some(now);
        } else if now.saturating_duration_since(grown_at) >= self.limits.stall {
            let limit = self.limits.stall;
            return self.lose(Cause::Stalled { pages, limit });
        }
        self.pace(now);
    }

    /// `done` counts where the numbers allow it. A walk of gigabytes takes longer than one
    /// round trip, so a `done` that nobody saw running must bring its number of bytes.
    fn done(&mut self, status: &PreloadStatus) {
        let share = u128::from(self.ram.0) * u128::from(self.limits.plausible_percent);
        let plausible = match status.bytes {
            Some(touched) => u128::from(touched.0) * 100 >= share,
            None => self.walked,
        };
        if plausible {
            self.state = State::Materialised;
            self.walked = true;
            self.pages = self.pages.max(status.pages);
        } else {
            let (touched, ram) = (status.bytes, self.ram);
            self.spoil(Cause::Implausible { touched, ram });
        }
    }

    /// `idle` though a walk was started: somebody else's `/init`, or the agent began anew.
    fn forgotten(&mut self, now: Instant) {
        if self.restarts >= self.limits.restarts {
            return self.lose(Cause::Forgetful(self.restarts + 1));
        }
        self.restarts += 1;
        log::warn!("The guest's memory preload went back to idle; starting it again");
        self.state = State::Armed;
        self.pace(now);
    }

    /// The VMM has exited, in whatever state.
    pub fn vmm_exited(&mut self) {
        self.lose(Cause::VmmExited);
    }

    /// Makes a materialised state ask the guest again: somebody else's `/init` may have
    /// reset it since. Before every snapshot.
    pub fn doubt(&mut self) {
        if self.state == State::Materialised {
            self.state = State::Armed;
            self.asked = false;
            self.begun = None;
            self.next_at = None;
            self.restarts = 0;
            self.reset_progress();
        }
    }

    fn spoil(&mut self, cause: Cause) {
        self.state = State::Spoiled;
        self.cause = Some(cause);
    }

    fn lose(&mut self, cause: Cause) {
        self.state = State::Lost;
        self.cause = Some(cause);
    }

    fn reset_progress(&mut self) {
        self.pages = 0;
        self.grown_at = None;
        self.gap = self.limits.first_poll;
    }

    fn pace(&mut self, now: Instant) {
        self.next_at = now.checked_add(self.gap);
        self.gap = self.gap.saturating_mul(2).min(self.limits.slowest_poll);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: Bytes = Bytes::gib(1);

    /// A preload with a clock of its own.
    struct Table {
        preload: Preload,
        life: Lifecycle,
        now: Instant,
    }

    fn status(state: WalkState, pages: u64) -> Answer {
        Answer::Status(PreloadStatus {
            state,
            regions: 0,
            pages,
            bytes: Some(Bytes(pages * 4096)),
            elapsed: Duration::ZERO,
            source: GuestText::default(),
            error: None,
        })
    }

    fn bare(state: WalkState) -> Answer {
        let Answer::Status(status) = status(state, 0) else {
            unreachable!()
        };
        let bytes = None;
        Answer::Status(PreloadStatus { bytes, ..status })
    }

    const ALL: u64 = (1 << 30) / 4096;

    impl Table {
        fn need_init() -> Self {
            Self {
                preload: Preload::restored(RAM, Limits::of(RAM)),
                life: Lifecycle::random(),
                now: Instant::now(),
            }
        }
        fn armed() -> Self {
            let mut table = Self::need_init();
            table.preload.init_acknowledged(table.life);
            table
        }
        fn running() -> Self {
            let mut table = Self::armed();
            table.hear(status(WalkState::Idle, 0));
            table.hear(status(WalkState::Running, 0));
            assert_eq!(table.preload.state(), State::Running);
            table
        }
        fn materialised() -> Self {
            let mut table = Self::running();
            table.hear(status(WalkState::Done, ALL));
            assert_eq!(table.preload.state(), State::Materialised);
            table
        }
        fn spoiled() -> Self {
            let mut table = Self::running();
            table.hear(status(WalkState::Failed, 0));
            assert_eq!(table.preload.state(), State::Spoiled);
            table
        }
        fn hear(&mut self, answer: Answer) -> bool {
            self.preload.step(self.now);
            self.preload.answered(self.now, self.life, answer)
        }
        fn wait(&mut self, time: Duration) -> Step {
            self.now += time;
            self.preload.step(self.now)
        }
        fn new_life(&mut self) {
            self.life = Lifecycle::random();
            self.preload.init_acknowledged(self.life);
        }
    }

    #[test]
    fn each_observation_leads_where_the_table_says() {
        type Row = (&'static str, fn() -> Table, Answer, State);
        let rows: Vec<Row> = vec![
            (
                "armed: running",
                Table::armed,
                status(WalkState::Running, 0),
                State::Running,
            ),
            (
                "armed: idle",
                Table::armed,
                status(WalkState::Idle, 0),
                State::Armed,
            ),
            (
                "armed: plausible done",
                Table::armed,
                status(WalkState::Done, ALL),
                State::Materialised,
            ),
            (
                "armed: done of nothing",
                Table::armed,
                status(WalkState::Done, 0),
                State::Spoiled,
            ),
            (
                "armed: done of a little",
                Table::armed,
                status(WalkState::Done, ALL / 2),
                State::Spoiled,
            ),
            (
                "armed: done without numbers",
                Table::armed,
                bare(WalkState::Done),
                State::Spoiled,
            ),
            (
                "armed: failed",
                Table::armed,
                status(WalkState::Failed, 0),
                State::Spoiled,
            ),
            (
                "armed: cancelled",
                Table::armed,
                status(WalkState::Cancelled, 0),
                State::Spoiled,
            ),
            (
                "armed: 404",
                Table::armed,
                Answer::Refused(404),
                State::Unsupported,
            ),
            (
                "armed: 415",
                Table::armed,
                Answer::Refused(415),
                State::Unsupported,
            ),
            (
                "armed: 401",
                Table::armed,
                Answer::Refused(401),
                State::Lost,
            ),
            (
                "armed: 500",
                Table::armed,
                Answer::Refused(500),
                State::Lost,
            ),
            ("armed: garbled", Table::armed, Answer::Garbled, State::Lost),
            ("armed: silent", Table::armed, Answer::Silent, State::Armed),
            (
                "running: grows",
                Table::running,
                status(WalkState::Running, 9),
                State::Running,
            ),
            (
                "running: idle",
                Table::running,
                status(WalkState::Idle, 9),
                State::Armed,
            ),
            (
                "running: done",
                Table::running,
                status(WalkState::Done, ALL),
                State::Materialised,
            ),
            (
                "running: done without numbers",
                Table::running,
                bare(WalkState::Done),
                State::Materialised,
            ),
            (
                "running: done of a little",
                Table::running,
                status(WalkState::Done, 9),
                State::Spoiled,
            ),
            (
                "running: failed",
                Table::running,
                status(WalkState::Failed, 9),
                State::Spoiled,
            ),
            (
                "running: cancelled",
                Table::running,
                status(WalkState::Cancelled, 9),
                State::Spoiled,
            ),
            (
                "running: 404",
                Table::running,
                Answer::Refused(404),
                State::Unsupported,
            ),
            (
                "running: garbled",
                Table::running,
                Answer::Garbled,
                State::Lost,
            ),
            (
                "running: silent",
                Table::running,
                Answer::Silent,
                State::Running,
            ),
        ];
        for (name, begin, answer, end) in rows {
            let mut table = begin();
            assert!(table.hear(answer), "{name}");
            assert_eq!(table.preload.state(), end, "{name}");
        }
    }

    #[test]
    fn nothing_the_guest_says_before_init_counts() {
        for state in [WalkState::Done, WalkState::Running, WalkState::Idle] {
            let mut table = Table::need_init();
            assert_eq!(table.preload.step(table.now), Step::Init);
            assert!(!table.hear(status(state, ALL)), "{state:?}");
            assert_eq!(table.preload.state(), State::NeedInit, "{state:?}");
        }
    }

    #[test]
    fn answers_from_an_earlier_life_are_dropped() {
        let mut table = Table::running();
        let earlier = table.life;
        table.new_life();
        let answer = status(WalkState::Done, ALL);
        assert!(!table.preload.answered(table.now, earlier, answer));
        assert_eq!(table.preload.state(), State::Armed);
    }

    #[test]
    fn answers_that_nobody_waits_for_are_dropped() {
        let mut table = Table::materialised();
        assert!(!table.hear(status(WalkState::Failed, 0)));
        assert_eq!(table.preload.state(), State::Materialised);
    }

    #[test]
    fn a_cold_boot_has_nothing_to_do_whatever_happens() {
        let mut table = Table::armed();
        table.preload = Preload::cold_boot();
        assert_eq!(table.preload.step(table.now), Step::Rest);
        table.new_life();
        assert!(!table.hear(Answer::Garbled));
        assert_eq!(table.preload.step(table.now), Step::Rest);
        assert_eq!(table.preload.state(), State::ColdBoot);
    }

    #[test]
    fn asks_first_and_starts_only_what_is_idle() {
        let mut table = Table::armed();
        assert_eq!(table.preload.step(table.now), Step::Ask(table.now));
        table.hear(status(WalkState::Idle, 0));
        assert_eq!(table.preload.step(table.now), Step::Start(table.now));
        table.hear(status(WalkState::Running, 0));
        assert!(matches!(table.preload.step(table.now), Step::Ask(_)));
        table.hear(status(WalkState::Done, ALL));
        assert_eq!(table.preload.step(table.now), Step::Rest);
    }

    #[test]
    fn polls_slow_down_to_one_a_second() {
        let mut table = Table::running();
        let mut gaps = Vec::new();
        for pages in 1..=8 {
            let Step::Ask(at) = table.preload.step(table.now) else {
                panic!("no poll")
            };
            gaps.push((at - table.now).as_millis());
            table.now = at;
            table.hear(status(WalkState::Running, pages));
        }
        assert_eq!(gaps, [50, 100, 200, 400, 800, 1000, 1000, 1000]);
    }

    #[test]
    fn a_walk_that_stands_still_is_lost_and_one_that_creeps_is_not() {
        let mut table = Table::running();
        for pages in 1..=4 {
            table.wait(Duration::from_secs(14));
            table.hear(status(WalkState::Running, pages));
            assert_eq!(table.preload.state(), State::Running, "{pages}");
        }
        table.wait(Duration::from_secs(29));
        // Time without an answer is not time without progress.
        table.hear(Answer::Silent);
        assert_eq!(table.preload.state(), State::Running);
        table.wait(Duration::from_secs(1));
        table.hear(status(WalkState::Running, 4));
        assert_eq!(table.preload.state(), State::Lost);
        assert!(matches!(
            table.preload.cause(),
            Some(Cause::Stalled { pages: 4, .. })
        ));
    }

    #[test]
    fn the_total_budget_grows_with_memory_and_is_kept() {
        for (ram, seconds) in [
            (Bytes::mib(512), 90),
            (Bytes::gib(1), 90),
            (Bytes::gib(20), 660),
        ] {
            assert_eq!(Limits::of(ram).total.as_secs(), seconds, "{ram}");
        }
        assert!(Limits::of(Bytes(u64::MAX)).total > Duration::from_secs(1 << 32));
        let mut table = Table::running();
        for pages in 1..90 {
            assert_ne!(table.wait(Duration::from_secs(1)), Step::Refuse, "{pages}");
            table.hear(status(WalkState::Running, pages));
        }
        assert_eq!(table.wait(Duration::from_secs(1)), Step::Refuse);
        let limit = Duration::from_secs(90);
        assert_eq!(table.preload.cause(), Some(&Cause::OverBudget(limit)));
    }

    #[test]
    fn a_forgotten_walk_is_started_again_three_times() {
        let mut table = Table::running();
        for flap in 1..=3 {
            table.hear(status(WalkState::Idle, 0));
            assert!(
                matches!(table.preload.step(table.now), Step::Start(_)),
                "{flap}"
            );
            table.hear(status(WalkState::Running, 0));
        }
        table.hear(status(WalkState::Idle, 0));
        assert_eq!(table.preload.cause(), Some(&Cause::Forgetful(4)));
        // The same where the agent answers every start with `idle`.
        let mut table = Table::armed();
        for _ in 0..4 {
            table.hear(status(WalkState::Idle, 0));
            assert_eq!(table.preload.state(), State::Armed);
        }
        table.hear(status(WalkState::Idle, 0));
        assert_eq!(table.preload.state(), State::Lost);
    }

    #[test]
    fn a_spoiled_life_is_renewed_once_and_within_the_same_budget() {
        let mut table = Table::spoiled();
        let begun = table.preload.begun;
        assert_eq!(table.preload.step(table.now), Step::Init);
        table.new_life();
        assert_eq!(table.preload.state(), State::Armed);
        assert_eq!(table.preload.begun, begun);
        table.hear(status(WalkState::Cancelled, 0));
        assert_eq!(table.preload.step(table.now), Step::Refuse);
        assert_eq!(table.preload.cause(), Some(&Cause::Cancelled));
    }

    #[test]
    fn a_repeated_acknowledgement_of_the_same_id_disturbs_nothing() {
        let mut table = Table::running();
        table.hear(status(WalkState::Running, 7));
        table.preload.init_acknowledged(table.life);
        assert_eq!(table.preload.state(), State::Running);
        assert_eq!(table.preload.pages(), 7);
    }

    #[test]
    fn a_new_id_in_mid_walk_and_after_a_live_snapshot_arms_again() {
        for mut table in [Table::running(), Table::materialised()] {
            table.wait(Duration::from_secs(80));
            table.new_life();
            assert_eq!(table.preload.state(), State::Armed);
            // A budget of its own.
            assert_ne!(table.wait(Duration::from_secs(80)), Step::Refuse);
            table.hear(status(WalkState::Running, 1));
            table.hear(status(WalkState::Done, ALL));
            assert_eq!(table.preload.state(), State::Materialised);
        }
    }

    #[test]
    fn the_death_of_the_vmm_ends_every_state() {
        for mut table in [
            Table::need_init(),
            Table::armed(),
            Table::running(),
            Table::materialised(),
            Table::spoiled(),
        ] {
            table.preload.vmm_exited();
            assert_eq!(table.preload.state(), State::Lost);
            assert_eq!(table.preload.cause(), Some(&Cause::VmmExited));
            table.new_life();
            assert_eq!(table.preload.step(table.now), Step::Refuse);
        }
    }

    #[test]
    fn doubt_asks_the_guest_again_before_a_snapshot() {
        let mut table = Table::materialised();
        table.wait(Duration::from_secs(3600));
        table.preload.doubt();
        assert_eq!(table.preload.step(table.now), Step::Ask(table.now));
        // The walk was seen in this life, so the word alone is enough.
        table.hear(bare(WalkState::Done));
        assert_eq!(table.preload.state(), State::Materialised);
        // Somebody else's new lifecycle: a second walk.
        table.preload.doubt();
        table.hear(status(WalkState::Idle, 0));
        assert!(matches!(table.preload.step(table.now), Step::Start(_)));
        for mut other in [Table::need_init(), Table::spoiled()] {
            let before = other.preload.state();
            other.preload.doubt();
            assert_eq!(other.preload.state(), before);
        }
    }

    #[test]
    fn an_adopted_vm_needs_no_new_init() {
        let mut table = Table::need_init();
        table.preload = Preload::adopted(RAM, Limits::of(RAM), table.life);
        assert_eq!(table.preload.step(table.now), Step::Ask(table.now));
        table.hear(status(WalkState::Done, ALL));
        assert_eq!(table.preload.state(), State::Materialised);
    }

    #[test]
    fn causes_read_well() {
        let cause = Cause::Implausible {
            touched: None,
            ram: RAM,
        };
        assert_eq!(
            cause.to_string(),
            "The guest says done, but touched an unknown part of 1 GiB"
        );
    }
}
