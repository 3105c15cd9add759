//! What somebody asked for, and what his tier allows (docs/rules.md, tiers).

use serde::Serialize;
use spaceport_core::ids::Size;
use spaceport_core::queue::Priority;

/// Most slots that one request takes: both halves of a card.
pub const SLOTS_MAX: u64 = 2;

/// One call of a decorated function. Times are milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// When it came, from the start of the trace.
    pub arrival_ms: u64,
    /// How long it runs if nobody stops it.
    pub duration_ms: u64,
    /// What its function declares: it is killed then.
    pub declared_ms: u64,
    /// Half a card or a whole one.
    pub size: Size,
    /// Index of its account in [`Trace::users`].
    pub user: usize,
    /// Which function it is, for what can be learned of its durations; None where the trace does not say.
    pub function: Option<u32>,
}

/// Requests in the order of their arrival, and who made them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// In the order of arrival.
    pub requests: Vec<Request>,
    /// The accounts.
    pub users: Vec<User>,
}

/// One account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// As the trace calls it.
    pub name: String,
    /// Its tier.
    pub tier: Tier,
}

/// The tiers whose calls reach the queue with different rules. `space` has the numbers of `guest`, `team` those of
/// `pro`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Without a token.
    Guest,
    /// Signed in.
    Free,
    /// Paying.
    Pro,
    /// Paying by contract.
    Enterprise,
}

// === impl Request ===

impl Request {
    /// Halves of a card that it takes.
    pub const fn slots(&self) -> u64 {
        self.size.weight()
    }

    /// How long it keeps its slots once started: until its end, or until it is killed.
    pub const fn served_ms(&self) -> u64 {
        if self.duration_ms < self.declared_ms { self.duration_ms } else { self.declared_ms }
    }

    /// True if it does not get to its end.
    pub const fn is_killed(&self) -> bool {
        self.duration_ms > self.declared_ms
    }
}

// === impl Trace ===

impl Trace {
    /// Slot-milliseconds that its requests use together.
    pub fn work_ms(&self) -> u64 {
        self.requests.iter().map(|request| request.served_ms() * request.slots()).sum()
    }

    /// The last arrival, milliseconds; 0 in an empty trace.
    pub fn last_arrival_ms(&self) -> u64 {
        self.requests.last().map_or(0, |request| request.arrival_ms)
    }

    /// Tier of who made a request.
    pub fn tier(&self, request: &Request) -> Tier {
        self.users[request.user].tier
    }
}

// === impl Tier ===

impl Tier {
    /// All of them, lowest first.
    pub const ALL: [Self; 4] = [Self::Guest, Self::Free, Self::Pro, Self::Enterprise];

    /// The name that traces and reports use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Free => "free",
            Self::Pro => "pro",
            Self::Enterprise => "enterprise",
        }
    }

    /// Quota of a window, milliseconds of half a card.
    pub const fn quota_ms(self) -> u64 {
        match self {
            Self::Guest => 120_000,
            Self::Free => 300_000,
            Self::Pro => 2_400_000,
            Self::Enterprise => 3_600_000,
        }
    }

    /// Longest call, declared milliseconds.
    pub const fn longest_ms(self) -> u64 {
        match self {
            Self::Guest => 60_000,
            Self::Free => 120_000,
            Self::Pro | Self::Enterprise => 300_000,
        }
    }

    /// Its place in the queue.
    pub const fn priority(self) -> Priority {
        match self {
            Self::Guest => Priority::Low,
            Self::Free => Priority::Medium,
            Self::Pro | Self::Enterprise => Priority::Highest,
        }
    }
}
