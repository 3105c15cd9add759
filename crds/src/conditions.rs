//! Every condition type and every reason, a kind at a time (docs/rules.md).
//!
//! A reason says what is; the message beside it says what happened, to what, with the numbers, and the one next
//! action. [`condition`] and [`set`] build and merge the Kubernetes objects; both are pure, time is an argument.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

string_enum! {
    /// Conditions of a Space. The stage is derived from them and never stored on its own (docs/rules.md, Space).
    SpaceCondition {
        /// The source was fetched and its commit is known.
        SourceFetched = "SourceFetched",
        /// The locked environment or image exists.
        EnvironmentBuilt = "EnvironmentBuilt",
        /// The pod has a node.
        Scheduled = "Scheduled",
        /// The app's process runs.
        Started = "Started",
        /// The app answers on its port.
        Healthy = "Healthy",
        /// The gateway sends requests to it.
        Routed = "Routed",
        /// The model files asked for are in the cache.
        Preloaded = "Preloaded",
        /// `status.host` belongs to this Space alone.
        HostClaimed = "HostClaimed",
        /// No tier refuses a duration that the app's source declares (requirement A14). It stops nothing.
        DurationsAllowed = "DurationsAllowed",
        /// The summary: a visitor can use the app.
        Ready = "Ready",
    }
}

string_enum! {
    /// Reasons on a Space's conditions.
    SpaceReason {
        /// The step ended as it should.
        Succeeded = "Succeeded",
        /// The step is going on; the phase of the same name has its deadline.
        InProgress = "InProgress",
        /// An earlier step has not ended.
        WaitingForEarlierStep = "WaitingForEarlierStep",
        /// The source has no app file.
        NoAppFile = "NoAppFile",
        /// The front matter or the spec cannot be used as it is.
        InvalidConfiguration = "InvalidConfiguration",
        /// Secrets named in `requiredSecrets` are not set.
        MissingSecrets = "MissingSecrets",
        /// The source cannot be fetched.
        FetchFailed = "FetchFailed",
        /// The requirements cannot be resolved or installed.
        DependenciesFailed = "DependenciesFailed",
        /// The build ended with an error.
        BuildFailed = "BuildFailed",
        /// The builder has written nothing for too long.
        BuildStalled = "BuildStalled",
        /// The environment does not support the cards of the pool.
        GpuArchIncompatible = "GpuArchIncompatible",
        /// No node has room for the pod.
        Unschedulable = "Unschedulable",
        /// The image cannot be pulled.
        ImageUnavailable = "ImageUnavailable",
        /// The app ended by itself before it answered.
        AppExited = "AppExited",
        /// The app did not answer within its start limit.
        StartTimeout = "StartTimeout",
        /// The app was killed for its memory.
        OutOfMemory = "OutOfMemory",
        /// The app answered and does no longer.
        Unhealthy = "Unhealthy",
        /// A model file stands still or cannot be fetched.
        PreloadFailed = "PreloadFailed",
        /// Nobody used it for `sleepAfterSeconds`; a visitor wakes it.
        Idle = "Idle",
        /// `spec.paused` is set; only the owner or an admin resumes.
        Paused = "Paused",
        /// The hardware asked for is not allowed or does not exist here.
        HardwareRefused = "HardwareRefused",
        /// The owner has as many ZeroGPU Spaces as the tier allows.
        HostingLimit = "HostingLimit",
        /// The host name belongs to another Space.
        HostTaken = "HostTaken",
        /// Every duration that is declared in the source is legal in every tier.
        WithinEveryTier = "WithinEveryTier",
        /// Callers of at least one tier will be refused; the message says which, and what they are allowed.
        LongerThanTierAllows = "LongerThanTierAllows",
        /// Durations are computed when a function is called, so nothing can be said before.
        KnownAtCallOnly = "KnownAtCallOnly",
        /// The object is being deleted.
        Deleting = "Deleting",
        /// Our fault, not the app's: see the message.
        PlatformFault = "PlatformFault",
    }
}

string_enum! {
    /// Conditions of a SpaceBuild.
    SpaceBuildCondition {
        /// The source was fetched and its commit is known.
        SourceFetched = "SourceFetched",
        /// Every requirement has one version in the lock.
        Locked = "Locked",
        /// The environment or image exists.
        Built = "Built",
        /// The result is stored where any node can get it.
        Stored = "Stored",
        /// The summary: the build can be started.
        Complete = "Complete",
    }
}

string_enum! {
    /// Reasons on a SpaceBuild's conditions.
    SpaceBuildReason {
        /// The step ended as it should.
        Succeeded = "Succeeded",
        /// The step is going on.
        InProgress = "InProgress",
        /// Another build goes first.
        Queued = "Queued",
        /// The same lock was built before; nothing to do.
        Reused = "Reused",
        /// The source cannot be fetched.
        FetchFailed = "FetchFailed",
        /// The requirements contradict each other or do not exist.
        ResolveFailed = "ResolveFailed",
        /// A package cannot be installed or built.
        InstallFailed = "InstallFailed",
        /// The Dockerfile ended with an error.
        ImageBuildFailed = "ImageBuildFailed",
        /// The builder was killed for its memory.
        OutOfMemory = "OutOfMemory",
        /// No output for too long.
        Stalled = "Stalled",
        /// A newer build replaced it, or somebody cancelled it.
        Cancelled = "Cancelled",
        /// Its deadline passed.
        DeadlineExceeded = "DeadlineExceeded",
        /// Our fault: see the message.
        PlatformFault = "PlatformFault",
    }
}

string_enum! {
    /// How a lease ended: `outcome` of a GPULease and of a row in the account's outbox.
    LeaseOutcome {
        /// The function returned.
        Released = "Released",
        /// The function raised or its worker could not start; what was used is charged.
        Failed = "Failed",
        /// The worker died by itself; what was used is charged.
        WorkerDied = "WorkerDied",
        /// Killed at its declared end plus grace.
        Deadline = "Deadline",
        /// `/allow` did not come within the allow limit; charge 0.
        NeverAllowed = "NeverAllowed",
        /// The caller was gone before the grant reached it; charge 0.
        Undelivered = "Undelivered",
        /// Refused while it waited, or ended by the operator; charged what it used, 0 if it never ran.
        Cancelled = "Cancelled",
        /// The node refused the order; charge 0.
        Refused = "Refused",
        /// Card, gate or node failed; charge 0.
        PlatformFault = "PlatformFault",
        /// It failed without ever seeing a GPU; charge 0, bounded per Space and hour.
        NoDevice = "NoDevice",
        /// The node was silent beyond the bound of L9; charge 0.
        Expired = "Expired",
    }
}

string_enum! {
    /// Why a call was given less than it declares: `shortened.by` of a hold, `shortenedBy` of a GPULease.
    ShortenedReason {
        /// Its caller had no more left, and its Space has `clampToRemaining`.
        RemainingQuota = "RemainingQuota",
        /// Its function was never seen to need so much, and its Space has `reservation: Learned`.
        LearnedDuration = "LearnedDuration",
    }
}

string_enum! {
    /// Why a request was refused: `kind` of `lastDenial` (docs/rules.md). Never one for another.
    DenialKind {
        /// Weight x declared does not fit what is not yet charged.
        QuotaExceeded = "QuotaExceeded",
        /// The page of an address prefix has a row for as many visitors as it can hold.
        TooManyGuests = "TooManyGuests",
        /// The tier's number of runs in this window is used up.
        RunsExceeded = "RunsExceeded",
        /// Declared is above the longest call, or above the whole quota.
        IllegalDuration = "IllegalDuration",
        /// It would fit, but running leases have reserved what is left.
        PendingOverquota = "PendingOverquota",
        /// Too many requests of the account or Space wait for its limit of leases at once.
        ConcurrencyExceeded = "ConcurrencyExceeded",
        /// No healthy slot of that size on the Space's node.
        NoCapacity = "NoCapacity",
        /// The queue bound of node, Space or account is reached.
        QueueFull = "QueueFull",
        /// The caller's token is missing, foreign, expired or used up.
        Unauthenticated = "Unauthenticated",
        /// The account is being deleted.
        AccountDeleting = "AccountDeleting",
        /// The leader's clock is more than 5 s off the API server's (L20).
        ClockSkew = "ClockSkew",
        /// Card, gate or node failed three times before the grant could be used; nothing is charged.
        PlatformFault = "PlatformFault",
    }
}

string_enum! {
    /// Conditions of a GPUAccount.
    GPUAccountCondition {
        /// The account can get a GPU as far as its tier and quota allow: a tier applies, it is not being deleted, and its
        /// outbox has room.
        Ready = "Ready",
        /// Every settled lease has its receipt: `status.closed` is empty. Rows leave it with the next write of the page.
        OutboxDrained = "OutboxDrained",
    }
}

string_enum! {
    /// Reasons on a GPUAccount's conditions.
    GPUAccountReason {
        /// Nothing to report.
        AsExpected = "AsExpected",
        /// Another account, older than this one, has one of the identities.
        IdentityConflict = "IdentityConflict",
        /// `spec.tier` names a tier that does not exist.
        UnknownTier = "UnknownTier",
        /// No tier's rule matches and `spec.tier` is not set.
        NoTier = "NoTier",
        /// More grants than the page can hold; the rest wait.
        TooManyGrants = "TooManyGrants",
        /// Settled rows wait for their receipts.
        ReceiptsPending = "ReceiptsPending",
        /// It is being deleted and waits until nothing is open.
        Deleting = "Deleting",
    }
}

string_enum! {
    /// Conditions of a GPUTier.
    GPUTierCondition {
        /// Its rules apply.
        Accepted = "Accepted",
        /// Another tier that is older has the same rule and wins.
        Conflicted = "Conflicted",
    }
}

string_enum! {
    /// Reasons on a GPUTier's conditions.
    GPUTierReason {
        /// Nothing to report.
        AsExpected = "AsExpected",
        /// An older tier has an equally specific rule for the same identities.
        OverlappingRule = "OverlappingRule",
        /// Numbers that cannot be met here, for example a call longer than the pool's keys live (not in this version).
        InvalidLimits = "InvalidLimits",
    }
}

string_enum! {
    /// Conditions of a GPUQuotaGrant.
    GPUQuotaGrantCondition {
        /// It is in force: it counts to what its account may use.
        Applied = "Applied",
    }
}

string_enum! {
    /// Reasons on a GPUQuotaGrant's conditions.
    GPUQuotaGrantReason {
        /// It counts; its row comes onto the page with the first hold that takes from it.
        OnPage = "OnPage",
        /// The account does not exist yet.
        AccountMissing = "AccountMissing",
        /// The account's tier is not extendable by grants, or no tier applies to it.
        TierNotExtendable = "TierNotExtendable",
        /// The page has its maximum of grant rows.
        PageFull = "PageFull",
        /// Its time is over; what was not used is gone.
        Expired = "Expired",
        /// All of it was charged.
        UsedUp = "UsedUp",
    }
}

string_enum! {
    /// Conditions of a GPUPool.
    GPUPoolCondition {
        /// The pool is used for the nodes it selects.
        Accepted = "Accepted",
        /// Another pool that is older selects some of its nodes and wins there.
        Conflicted = "Conflicted",
        /// At least one of its nodes can grant a lease.
        Ready = "Ready",
    }
}

string_enum! {
    /// Reasons on a GPUPool's conditions.
    GPUPoolReason {
        /// Nothing to report.
        AsExpected = "AsExpected",
        /// An older pool selects the same node.
        OverlappingNodes = "OverlappingNodes",
        /// No node matches the selector.
        NoNodes = "NoNodes",
        /// No selected node reports a card.
        NoCards = "NoCards",
        /// No selected node is ready.
        NoReadyNode = "NoReadyNode",
    }
}

string_enum! {
    /// Conditions of a GPUNode.
    GPUNodeCondition {
        /// The node can grant leases.
        Ready = "Ready",
        /// Something else manages our cards; grants stop (N3).
        ForeignManager = "ForeignManager",
        /// No cgroup v2 tree, so there is no gate (N8).
        CgroupV2Missing = "CgroupV2Missing",
        /// The gate's program is attached.
        GateAttached = "GateAttached",
        /// A slice has less memory than the client believes in (N17).
        CardSmallerThanClientAssumes = "CardSmallerThanClientAssumes",
        /// A change of a card's use waits until nothing runs on it (N4).
        ModeChangePending = "ModeChangePending",
        /// The agent has compared its book with the broker's since it started (N19).
        Reconciled = "Reconciled",
        /// The node or cards of it are cordoned.
        Cordoned = "Cordoned",
    }
}

string_enum! {
    /// Reasons on a GPUNode's conditions.
    GPUNodeReason {
        /// Nothing to report.
        AsExpected = "AsExpected",
        /// The agent has started and is not done yet.
        Starting = "Starting",
        /// The agent waits for the broker.
        BrokerUnreachable = "BrokerUnreachable",
        /// The NVML library cannot be loaded.
        NvmlUnavailable = "NvmlUnavailable",
        /// NVML does not answer.
        NvmlHangs = "NvmlHangs",
        /// The node has no card.
        NoCards = "NoCards",
        /// No card is healthy.
        NoHealthyCard = "NoHealthyCard",
        /// Another device plugin serves our resources or cards.
        ForeignDevicePlugin = "ForeignDevicePlugin",
        /// A DRA driver prepares our cards.
        ForeignDraDriver = "ForeignDraDriver",
        /// A MIG manager changes our cards.
        ForeignMigManager = "ForeignMigManager",
        /// Only cgroup v1 is mounted.
        CgroupV1Only = "CgroupV1Only",
        /// The kernel refused the gate's program.
        AttachRefused = "AttachRefused",
        /// The slice's memory is below what the client assumes.
        SliceTooSmall = "SliceTooSmall",
        /// Pods or leases still use the card.
        CardInUse = "CardInUse",
        /// The checkpoint was lost or corrupt: gates closed, holders killed, nothing charged.
        CheckpointLost = "CheckpointLost",
        /// `spec.cordon` says so.
        CordonedByAdmin = "CordonedByAdmin",
        /// kubelet does not take our registration.
        KubeletUnavailable = "KubeletUnavailable",
    }
}

/// A condition at time `now`. `observed_generation` is the generation of the spec it was derived from.
pub fn condition(
    kind: &'static str,
    holds: ConditionStatus,
    reason: &'static str,
    message: impl Into<String>,
    observed_generation: Option<i64>,
    now: Timestamp,
) -> Condition {
    Condition {
        type_: kind.to_owned(),
        status: holds.as_str().to_owned(),
        reason: reason.to_owned(),
        message: message.into(),
        observed_generation,
        last_transition_time: Time(now),
    }
}

string_enum! {
    /// Status of a condition.
    ConditionStatus {
        /// It holds.
        True = "True",
        /// It does not hold.
        False = "False",
        /// Nobody can tell.
        Unknown = "Unknown",
    }
}

/// Puts `new` into `conditions` and says whether anything but time changed.
///
/// `lastTransitionTime` moves only when the status changes, as Kubernetes wants it. The list stays sorted by type, so
/// that two writers of the same facts write the same bytes.
pub fn set(conditions: &mut Vec<Condition>, mut new: Condition) -> bool {
    match conditions.iter_mut().find(|old| old.type_ == new.type_) {
        Some(old) => {
            if old.status == new.status {
                new.last_transition_time = old.last_transition_time.clone();
            }
            let changed = *old != new;
            *old = new;
            changed
        }
        None => {
            conditions.push(new);
            conditions.sort_by(|a, b| a.type_.cmp(&b.type_));
            true
        }
    }
}

/// Name and explanation, as the reference page prints them.
pub type Explained = (&'static str, &'static str);

/// Condition types and reasons of one kind.
pub struct Documented {
    /// The kind.
    pub kind: &'static str,
    /// Its condition types.
    pub types: Vec<Explained>,
    /// Heading of the reasons, and the reasons. A kind may have several vocabularies.
    pub reasons: Vec<(&'static str, Vec<Explained>)>,
}

macro_rules! explained {
    ($name:ident) => {
        $name::ALL.iter().map(|value| (value.as_str(), value.explanation().trim())).collect::<Vec<Explained>>()
    };
}

/// Every kind's conditions and reasons.
pub fn documented() -> Vec<Documented> {
    let kind = |kind, types, reasons| Documented { kind, types, reasons };
    let of_conditions = "Reasons of conditions";
    vec![
        kind("Space", explained!(SpaceCondition), vec![(of_conditions, explained!(SpaceReason))]),
        kind("SpaceBuild", explained!(SpaceBuildCondition), vec![(of_conditions, explained!(SpaceBuildReason))]),
        kind(
            "GPULease",
            Vec::new(),
            vec![
                ("Values of `spec.outcome`", explained!(LeaseOutcome)),
                ("Values of `spec.shortenedBy`", explained!(ShortenedReason)),
            ],
        ),
        kind(
            "GPUAccount",
            explained!(GPUAccountCondition),
            vec![
                (of_conditions, explained!(GPUAccountReason)),
                ("Values of `status.lastDenial.kind`", explained!(DenialKind)),
                ("Values of `status.closed[].outcome`", explained!(LeaseOutcome)),
            ],
        ),
        kind("GPUTier", explained!(GPUTierCondition), vec![(of_conditions, explained!(GPUTierReason))]),
        kind(
            "GPUQuotaGrant",
            explained!(GPUQuotaGrantCondition),
            vec![(of_conditions, explained!(GPUQuotaGrantReason))],
        ),
        kind("GPUPool", explained!(GPUPoolCondition), vec![(of_conditions, explained!(GPUPoolReason))]),
        kind("GPUNode", explained!(GPUNodeCondition), vec![(of_conditions, explained!(GPUNodeReason))]),
    ]
}
