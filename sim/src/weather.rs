//! Which faults a history meets, and how often.

use crate::random::Random;

/// Something that goes wrong outside of the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    // At random times: the strength is the mean gap in milliseconds.
    /// The leading broker dies.
    BrokerCrash,
    /// A new leader is elected while the old one goes on.
    FailOver,
    /// A broker's process stands still; its steady clock with it, or not.
    BrokerPause,
    /// The API server is out of a broker's reach.
    BrokerCutOff,
    /// A broker's watches show nothing new for a while.
    WatchStall,
    /// A broker's watch begins anew with a list.
    WatchRestart,
    /// A stream breaks.
    Cut,
    /// A node is out of reach of one broker or all.
    Partition,
    /// A node stands still.
    NodePause,
    /// An agent restarts; its checkpoint is kept.
    AgentRestart,
    /// An agent restarts and its checkpoint is lost.
    CheckpointLost,
    /// A node reboots, with or without its checkpoint.
    Reboot,
    /// A card is sick and comes back.
    CardSick,
    /// A tier or a grant changes.
    PolicyChange,
    /// An admin edits an account: another revision of the same page.
    AdminEdit,
    /// An account is deleted.
    AccountDeleted,
    /// A pool's limits change.
    PoolChange,
    /// A broker's wall clock is set.
    BrokerClock,
    /// The API server's clock is set.
    ServerClock,
    /// A day passes while nothing is under way.
    Night,
    // At any message: the strength is per mille.
    /// A page write never reaches the API server.
    WriteLost,
    /// The answer to a page write is lost.
    AnswerLost,
    /// A page write happens after its broker gave it up.
    WriteLate,
    /// The API server refuses a page write.
    WriteRefused,
    /// A receipt takes long.
    ReceiptLate,
    /// A message stalls in its socket, and all behind it.
    Stall,
    /// A report arrives twice.
    Repeat,
    /// A node reports about a lease that nobody knows.
    UnknownReport,
    /// A slot does not clear.
    SlotStuck,
}

/// How often each fault comes.
#[derive(Clone, Debug)]
pub struct Weather {
    strengths: Vec<u64>,
}

impl FaultKind {
    /// Those that come at random times.
    pub const TIMED: [Self; 20] = [
        Self::BrokerCrash,
        Self::FailOver,
        Self::BrokerPause,
        Self::BrokerCutOff,
        Self::WatchStall,
        Self::WatchRestart,
        Self::Cut,
        Self::Partition,
        Self::NodePause,
        Self::AgentRestart,
        Self::CheckpointLost,
        Self::Reboot,
        Self::CardSick,
        Self::PolicyChange,
        Self::AdminEdit,
        Self::AccountDeleted,
        Self::PoolChange,
        Self::BrokerClock,
        Self::ServerClock,
        Self::Night,
    ];

    /// Those that can come with any message.
    pub const BY_CHANCE: [Self; 9] = [
        Self::WriteLost,
        Self::AnswerLost,
        Self::WriteLate,
        Self::WriteRefused,
        Self::ReceiptLate,
        Self::Stall,
        Self::Repeat,
        Self::UnknownReport,
        Self::SlotStuck,
    ];

    /// All.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::TIMED.into_iter().chain(Self::BY_CHANCE)
    }

    /// How many there are.
    pub const COUNT: usize = Self::TIMED.len() + Self::BY_CHANCE.len();
}

impl Weather {
    /// No fault at all.
    pub fn calm() -> Self {
        Self { strengths: vec![0; FaultKind::COUNT] }
    }

    /// One seed in eight is calm, three are stormy in one way, three in a few, and one in all.
    pub fn draw(random: &mut Random) -> Self {
        let mut weather = Self::calm();
        let kinds: Vec<FaultKind> = FaultKind::all().collect();
        let chosen = match random.below(8) {
            0 => 0,
            1..=3 => 1,
            4..=6 => random.between(2, 6),
            _ => {
                for kind in kinds {
                    weather.add(kind, random);
                }
                return weather;
            }
        };
        for _ in 0..chosen {
            if let Some(kind) = random.pick(&kinds) {
                weather.add(*kind, random);
            }
        }
        weather
    }

    fn add(&mut self, kind: FaultKind, random: &mut Random) {
        let timed = FaultKind::TIMED.contains(&kind);
        self.strengths[kind as usize] = if timed { random.between(2_000, 20_000) } else { random.between(20, 200) };
    }

    /// Mean gap in milliseconds of a timed fault; None if it does not come.
    pub fn gap_ms(&self, kind: FaultKind) -> Option<u64> {
        Some(self.strengths[kind as usize]).filter(|gap| *gap > 0)
    }

    /// Times in a thousand of a fault by chance.
    pub fn per_mille(&self, kind: FaultKind) -> u64 {
        self.strengths[kind as usize]
    }

    /// True if no fault comes.
    pub fn is_calm(&self) -> bool {
        self.strengths.iter().all(|strength| *strength == 0)
    }
}
