//! What really happened: a scenario that no seed reaches is not tested, whatever the checks say.

/// Declares the scenarios with what is printed for each.
macro_rules! scenarios {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Something that a history is there to meet: the scenarios of the ledger's design, faults, and plain successes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Scenario {
            $(#[doc = $text] $name,)*
        }

        impl Scenario {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// For the table.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

scenarios! {
    Granted = "order taken by its node",
    Charged = "lease charged",
    Settled = "lease settled",
    Denied = "request refused",
    DeniedQuota = "refused: QuotaExceeded",
    DeniedPending = "refused: PendingOverquota",
    DeniedCookie = "refused: limit of a visitor who is not signed in",
    DeniedPrefix = "refused: limit of an address prefix",
    DeniedRuns = "refused: RunsExceeded",
    DeniedIllegal = "refused: IllegalDuration",
    DeniedCapacity = "refused: NoCapacity",
    DeniedQueueFull = "refused: QueueFull or ConcurrencyExceeded",
    DeniedUnauthenticated = "refused: Unauthenticated",
    BudgetExhausted = "refused: the call's budget is exhausted",
    DeniedDeleting = "refused: AccountDeleting",
    DeniedClock = "refused: ClockSkew",
    DeniedFault = "refused: PlatformFault after three orders in vain",
    Waited = "request had to wait",
    WaitedForAccount = "request waited for its account's concurrency limit",
    WaitedForSpace = "request waited for its Space's limit of leases at once",
    GuestCharged = "lease of a guest charged",
    Clamped = "lease given what was left instead of what it declared",
    LateWriteLanded = "late CAS of an old leader happened",
    LateWriteRefused = "late CAS of an old leader was refused",
    WaitedTooLong = "lease refused because its slot was not clear within its order's limit",
    PlacePresented = "request presented its place to the next leader",
    PlaceKept = "request told the place that it had under an earlier leader",
    LateHoldFound = "lease of an old leader's late hold met on its node before its page was seen",
    Stranger = "lease on a node judged by its page to be nobody's",
    StalledOrder = "stalled order refused by its age",
    OldEpochOrder = "order of an old epoch refused or not listened to",
    AllowJustInTime = "/allow came within 20 ms before the allow limit",
    AllowJustTooLate = "/allow came within 20 ms after the allow limit",
    NeverAllowed = "lease never allowed",
    LostEnded = "Ended lost with its stream",
    LostFreed = "Freed lost with its stream",
    LostOrder = "order lost with its stream",
    DeadBeforeReceipt = "leader gone between settlement and receipt",
    UnknownHappened = "write of unknown outcome had happened",
    UnknownNever = "write of unknown outcome never happened",
    UnknownLater = "write of unknown outcome happened later",
    WriteConflict = "write met another revision",
    Nack = "order refused by its node",
    TwoLeaders = "two leaders decided at the same moment",
    TwoOrders = "two leaders had orders for one node under way",
    AccountDeletedMidLease = "account deleted with open holds",
    LateGone = "end of an account's object heard of when another one was known",
    ReadAgain = "rarely: read found an object that nobody could place",
    ShownAgain = "rarely: page that the watch had shown during a write taken behind an older answer",
    AccountGoneMidLease = "account object gone with open holds",
    RollOver = "window ended with open holds",
    SettledInOldWindow = "lease charged to a window that had ended",
    GrantExpiredMidLease = "grant expired with an open hold on it",
    GrantPaid = "grant paid for a lease",
    TierLoweredMidLease = "base lowered with open holds",
    BackAfterPartition = "node joined again with live leases",
    BackAfterReboot = "node back after a reboot with leases",
    BackWithoutCheckpoint = "node back without its checkpoint, with leases",
    ChargedAfterRestart = "lease charged whose node began anew between its end and its settlement",
    ReusedWorker = "idle worker reused",
    PreferredForWorker = "request preferred among equal keys because its worker is kept",
    IdleEvicted = "idle worker made room or ended",
    IdleWorkerDead = "idle worker dead before its reuse",
    RetriedCall = "call made again after a cut stream",
    RepeatedReport = "report arrived twice",
    UnknownReport = "report about an unknown lease",
    Handover = "order that waits for another lease's slot",
    HandoverSwapped = "waiting lease began on another slot than its predecessor's",
    Quarantined = "slot did not clear",
    Expired = "silent node's lease given up",
    CancelledLease = "rarely: lease cancelled by the broker",
    Deadline = "lease killed at its deadline",
    NodeAhead = "node had seen a later term",
    Deposed = "leader deposed",
    OldLeaderEndedByPage = "leader deposed by a page of a later term",
    StaleWatch = "watch showed an older page than is known",
    OutboxWaited = "settled row waited 10 s for its receipt",
    BrokerWallForward = "broker's wall clock stepped forward",
    BrokerWallBack = "broker's wall clock stepped back",
    ServerWallForward = "API server's clock stepped forward",
    ServerWallBack = "API server's clock stepped back",
    SteadyLost = "broker's steady clock stood still",
    BootClockReset = "node's BOOTTIME began anew",
    NightPassed = "24 hours passed",
}

/// How often each happened.
#[derive(Clone, Debug)]
pub struct Coverage {
    counts: Vec<u64>,
    seeds: Vec<u64>,
}

impl Default for Coverage {
    fn default() -> Self {
        Self { counts: vec![0; Scenario::ALL.len()], seeds: vec![0; Scenario::ALL.len()] }
    }
}

impl Coverage {
    /// It happened.
    pub fn saw(&mut self, scenario: Scenario) {
        if let Some(count) = self.counts.get_mut(scenario as usize) {
            *count += 1;
        }
    }

    /// How often it happened.
    pub fn count(&self, scenario: Scenario) -> u64 {
        self.counts.get(scenario as usize).copied().unwrap_or_default()
    }

    /// In how many histories it happened.
    pub fn seeds(&self, scenario: Scenario) -> u64 {
        self.seeds.get(scenario as usize).copied().unwrap_or_default()
    }

    /// Takes another history in.
    pub fn add(&mut self, history: &Self) {
        for (index, count) in history.counts.iter().enumerate() {
            self.counts[index] += count;
            self.seeds[index] += u64::from(*count > 0);
        }
    }

    /// Takes many histories in.
    pub fn merge(&mut self, part: &Self) {
        for (index, (count, seeds)) in part.counts.iter().zip(&part.seeds).enumerate() {
            self.counts[index] += count;
            self.seeds[index] += seeds;
        }
    }

    /// What never happened and should have. What happens once in thousands of histories has tests of its own.
    pub fn missing(&self) -> Vec<Scenario> {
        let expected = |scenario: &Scenario| !scenario.as_str().starts_with("rarely");
        Scenario::ALL.iter().copied().filter(|scenario| expected(scenario) && self.count(*scenario) == 0).collect()
    }
}
