//! Why a call gets no GPU. One definition for the ledger page, nodelink, the wire and the words people read.

use serde::{Deserialize, Serialize};

use crate::ids::Size;

/// A refusal with its numbers (docs/rules.md). Each kind says one thing; none stands in for another (requirement A9).
///
/// Milliseconds of *quota* are weighted (weight x time), milliseconds of *duration* (`declared`, `largest_declared`,
/// the limit of [`Denial::IllegalDuration`]) are not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all_fields = "camelCase")]
pub enum Denial {
    /// Does not fit limit - charged: only the next window or another grant helps.
    QuotaExceeded {
        /// Declared duration.
        declared_ms: u64,
        /// What the call would be given of it, where its Space has it shortened; None: all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        given_ms: Option<u64>,
        /// Weight of the size asked for.
        weight: u64,
        /// weight x given, or weight x declared.
        needed_ms: u64,
        /// limit - charged - reserved.
        left_ms: u64,
        /// Reserved by the account's other calls.
        reserved_ms: u64,
        /// Base and grants together.
        limit_ms: u64,
        /// Until the next milliseconds come back.
        resets_in_ms: u64,
        /// Largest duration of this size that would pass now; 0 if none.
        largest_declared_ms: u64,
        /// Whose limit it is.
        #[serde(default, skip_serializing_if = "Limiter::is_account")]
        limiter: Limiter,
    },
    /// Fits limit - charged, but not minus what running calls have reserved: waiting for them helps.
    PendingOverquota {
        /// Declared duration.
        declared_ms: u64,
        /// What the call would be given of it, where its Space has it shortened; None: all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        given_ms: Option<u64>,
        /// Weight of the size asked for.
        weight: u64,
        /// weight x given, or weight x declared.
        needed_ms: u64,
        /// limit - charged - reserved.
        left_ms: u64,
        /// Reserved by the account's other calls.
        reserved_ms: u64,
        /// Base and grants together.
        limit_ms: u64,
        /// Until the first of those reservations ends at the latest.
        frees_in_ms: u64,
        /// Largest duration of this size that would pass now; 0 if none.
        largest_declared_ms: u64,
        /// Whose limit it is.
        #[serde(default, skip_serializing_if = "Limiter::is_account")]
        limiter: Limiter,
    },
    /// A guest page has a row for as many visitors as it can hold, and each is in use or within its window.
    TooManyGuests {
        /// Visitors within one window and address prefix.
        limit: u64,
        /// Until the first row can be given to somebody else.
        frees_in_ms: u64,
    },
    /// `runsPerWindow` of the tier is used up.
    RunsExceeded {
        /// Calls a window allows.
        limit: u64,
        /// Until the window ends.
        resets_in_ms: u64,
    },
    /// No window could ever admit this duration.
    IllegalDuration {
        /// Declared duration.
        declared_ms: u64,
        /// Largest duration that would be legal, for this size.
        limit_ms: u64,
        /// Which limit it breaks.
        what: DurationLimit,
        /// What would be legal (requirement A14); None from an older broker.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        legal: Option<Box<LegalDurations>>,
    },
    /// `concurrentLeases` is reached, and so is the bound of calls that may wait for it.
    ConcurrencyExceeded {
        /// Leases the account or Space may hold at a time.
        limit: u64,
        /// Whose limit it is: the account's or the Space's.
        #[serde(default = "account", skip_serializing_if = "is_account")]
        of: QueueOf,
    },
    /// No healthy slot of this size on the Space's node.
    NoCapacity {
        /// The size asked for.
        size: Size,
    },
    /// A queue is at its bound.
    QueueFull {
        /// Requests it holds.
        bound: u64,
        /// Whose queue.
        of: QueueOf,
    },
    /// A credential was presented and is bad: never a silent guest (invariant 10).
    Unauthenticated {
        /// What is wrong with it.
        reason: UnauthenticatedReason,
    },
    /// The account is on its way out (L4).
    AccountDeleting,
    /// The account's page is none of the ledger's; nothing is decided on it until it is repaired (L1).
    AccountUnusable,
    /// The leader's clock is off, so nothing is granted (L20).
    ClockSkew {
        /// How far, either way.
        ms: u64,
    },
    /// The lease broker did not answer. Nothing was granted.
    BrokerUnavailable,
    /// Card, gate or node failed before the grant could be used. Nothing is charged.
    PlatformFault,
}

/// Whose limit refused a call (requirement A10).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Limiter {
    /// The account's: base and grants.
    #[default]
    Account,
    /// One visitor's, by the signed cookie.
    Cookie,
    /// Of all visitors behind one address prefix together.
    AddressPrefix,
}

impl Limiter {
    /// The name, as on the page.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Account => "Account",
            Self::Cookie => "Cookie",
            Self::AddressPrefix => "AddressPrefix",
        }
    }

    /// For people: what the limit belongs to.
    const fn words(self) -> &'static str {
        match self {
            Self::Account => "",
            Self::Cookie => " for one visitor who is not signed in",
            Self::AddressPrefix => " for all visitors behind this address who are not signed in",
        }
    }

    #[allow(clippy::trivially_copy_pass_by_ref)] // Serde passes a reference.
    fn is_account(&self) -> bool {
        *self == Self::Account
    }
}

/// The longest durations that a caller's tier and quota can ever admit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LegalDurations {
    /// Name of the tier; empty if none applies.
    pub tier: String,
    /// The size asked for.
    pub size: Size,
    /// Longest of `large`.
    pub large_ms: u64,
    /// Longest of `xlarge`.
    pub xlarge_ms: u64,
}

const fn account() -> QueueOf {
    QueueOf::Account
}

#[allow(clippy::trivially_copy_pass_by_ref)] // Serde passes a reference.
fn is_account(of: &QueueOf) -> bool {
    *of == QueueOf::Account
}

/// Which limit an illegal duration breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DurationLimit {
    /// The tier's longest call.
    LongestCall,
    /// weight x declared is above base and grants together.
    WholeQuota,
    /// Nothing could ever be charged for a declared time of zero.
    Zero,
}

/// Whose queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum QueueOf {
    /// All of the pool.
    Pool,
    /// One Space.
    Space,
    /// One account.
    Account,
    /// One pod's device API, which keeps connections back for `/allow` and `/release`.
    Pod,
}

/// What is wrong with a credential (N15, docs/rules.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum UnauthenticatedReason {
    /// Not a token of the form that we mint.
    NotAToken,
    /// Signed with a key that is not ours, or no longer.
    UnknownKey,
    /// The signature does not fit.
    BadSignature,
    /// Its time is over.
    Expired,
    /// Minted for another Space.
    WrongAudience,
    /// Its account does not exist.
    UnknownAccount,
    /// An older account has one of its account's identities (L4).
    IdentityConflict,
    /// Its budget of calls or seconds is used up, or its visitor has left.
    Exhausted,
}

/// What `X-Authenticated` tells the client about the caller; it words its messages by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CallerClass {
    /// Guests and Spaces: no header.
    Guest,
    /// Tier free.
    Regular,
    /// Every other tier.
    Pro,
}

impl Denial {
    /// The kind's name, in CamelCase as in conditions and outcomes.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::QuotaExceeded { .. } => "QuotaExceeded",
            Self::PendingOverquota { .. } => "PendingOverquota",
            Self::TooManyGuests { .. } => "TooManyGuests",
            Self::RunsExceeded { .. } => "RunsExceeded",
            Self::IllegalDuration { .. } => "IllegalDuration",
            Self::ConcurrencyExceeded { .. } => "ConcurrencyExceeded",
            Self::NoCapacity { .. } => "NoCapacity",
            Self::QueueFull { .. } => "QueueFull",
            Self::Unauthenticated { .. } => "Unauthenticated",
            Self::AccountDeleting => "AccountDeleting",
            Self::AccountUnusable => "AccountUnusable",
            Self::ClockSkew { .. } => "ClockSkew",
            Self::BrokerUnavailable => "BrokerUnavailable",
            Self::PlatformFault => "PlatformFault",
        }
    }
}

/// One or two sentences with the numbers and the next step (docs/rules.md).
pub fn human_message(denial: &Denial) -> String {
    match denial {
        Denial::QuotaExceeded {
            declared_ms,
            given_ms,
            weight,
            needed_ms,
            left_ms,
            reserved_ms,
            limit_ms,
            resets_in_ms,
            largest_declared_ms,
            limiter,
        } => format!(
            "The call needs {} of quota ({} x weight {weight}) and {} of {}{} are left ({} reserved by other calls); {} in \
             {}.",
            seconds(*needed_ms),
            declared(*declared_ms, *given_ms),
            seconds(*left_ms),
            seconds(*limit_ms),
            limiter.words(),
            seconds(*reserved_ms),
            declare_or_wait(*largest_declared_ms),
            span(*resets_in_ms),
        ),
        Denial::PendingOverquota {
            declared_ms,
            given_ms,
            weight,
            needed_ms,
            left_ms,
            reserved_ms,
            limit_ms,
            frees_in_ms,
            largest_declared_ms,
            limiter,
        } => format!(
            "The call needs {} of quota ({} x weight {weight}) and {} of {}{} are left while other calls reserve {}, of \
             which the first part is back in {} at the latest; {} when they have ended.",
            seconds(*needed_ms),
            declared(*declared_ms, *given_ms),
            seconds(*left_ms),
            seconds(*limit_ms),
            limiter.words(),
            seconds(*reserved_ms),
            span(*frees_in_ms),
            declare_or_wait(*largest_declared_ms),
        ),
        Denial::TooManyGuests { limit, frees_in_ms } => format!(
            "{limit} visitors behind this address who are not signed in have used a GPU within the last day, and no more \
             are told apart; sign in, or try again in {}.",
            span(*frees_in_ms)
        ),
        Denial::RunsExceeded { limit, resets_in_ms } => {
            format!("All {limit} calls of the window are used; try again in {}.", span(*resets_in_ms))
        }
        Denial::IllegalDuration { declared_ms, limit_ms, what, legal } => {
            let declared = seconds(*declared_ms);
            let limit = seconds(*limit_ms);
            match (what, legal) {
                (_, Some(legal)) => illegal(&declared, &limit, *what, legal),
                (what, None) => match what {
                DurationLimit::LongestCall => {
                    format!("The call declares {declared}, the longest call of this tier is {limit}; declare less.")
                }
                DurationLimit::WholeQuota => format!(
                    "The call declares {declared}, but the whole quota is only worth {limit} at this size; declare less."
                ),
                DurationLimit::Zero => {
                    format!("The call declares {declared}; declare from 1 s to {limit}.")
                }
                },
            }
        }
        Denial::ConcurrencyExceeded { limit, of: QueueOf::Space } => format!(
            "This Space may hold {limit} GPU leases at a time and no more calls may wait for one; try again when a call \
             has ended."
        ),
        Denial::ConcurrencyExceeded { limit, .. } => format!(
            "The account may hold {limit} GPU leases at a time and no more calls may wait for one; try again when a \
             call has ended."
        ),
        Denial::NoCapacity { size } => format!(
            "The Space's node has no healthy slot of size {size}; try again later, or ask the cluster's administrator \
             about the node's cards."
        ),
        Denial::QueueFull { bound, of } => {
            let queue = match of {
                QueueOf::Pool => "The pool's queue",
                QueueOf::Space => "This Space's queue",
                QueueOf::Account => "The account's queue",
                QueueOf::Pod => "The queue of this Space's pod",
            };
            format!("{queue} is full at {bound} waiting calls; try again shortly.")
        }
        Denial::Unauthenticated { reason } => match reason {
            UnauthenticatedReason::NotAToken => {
                "The call's token is not one that this cluster mints; call through the Space's own address."
            }
            UnauthenticatedReason::UnknownKey => {
                "The call's token is signed with a key that is not in use here; reload the page and try again."
            }
            UnauthenticatedReason::BadSignature => {
                "The signature of the call's token does not fit; call through the Space's own address."
            }
            UnauthenticatedReason::Expired => "The call's token has expired; reload the page and try again.",
            UnauthenticatedReason::WrongAudience => {
                "The call's token was minted for another Space; call through this Space's own address."
            }
            UnauthenticatedReason::UnknownAccount => {
                "The account of the call's token does not exist any more; sign in again."
            }
            UnauthenticatedReason::IdentityConflict => {
                "An older account has one of the identities of the call's account; the cluster's administrator has to take \
                 it from one of them."
            }
            UnauthenticatedReason::Exhausted => {
                "The call's token has used up its calls or seconds, or its visitor has left; start a new call."
            }
        }
        .to_owned(),
        Denial::AccountDeleting => {
            "The account is being deleted and gets no more GPU; sign in with another account.".to_owned()
        }
        Denial::AccountUnusable => {
            "The page of the call's account cannot be used, so nothing was granted or charged; the cluster's administrator \
             has to repair it."
                .to_owned()
        }
        Denial::ClockSkew { ms } => format!(
            "The lease broker's clock is {} off the API server's, so it grants nothing; the cluster's administrator has \
             to set it.",
            seconds(*ms)
        ),
        Denial::BrokerUnavailable => {
            "The lease broker did not answer; nothing was granted or charged. Try again shortly.".to_owned()
        }
        Denial::PlatformFault => "The platform failed to hand over the GPU; nothing was charged. Try again.".to_owned(),
    }
}

/// What a call asks for: what its function declares, and what it would be given of that.
fn declared(declared_ms: u64, given_ms: Option<u64>) -> String {
    match given_ms {
        Some(given_ms) => format!("{} declared, shortened to {}", seconds(declared_ms), seconds(given_ms)),
        None => format!("{} declared", seconds(declared_ms)),
    }
}

/// What is wrong with a duration, and what each size could be at most for this caller.
fn illegal(declared: &str, limit: &str, what: DurationLimit, legal: &LegalDurations) -> String {
    let LegalDurations { tier, size, large_ms, xlarge_ms } = legal;
    if tier.is_empty() {
        return format!(
            "The call declares {declared}, but no tier applies to its account, so that nothing is granted; the cluster's \
             administrator has to put it into one."
        );
    }
    let why = match what {
        DurationLimit::LongestCall => format!("the longest call is {limit}"),
        DurationLimit::WholeQuota => format!("the whole quota is only worth {limit}"),
        DurationLimit::Zero => "which is no time at all".to_owned(),
    };
    format!(
        "The call declares {declared} of size {size}, {why}: tier {tier} allows at most {} of large and {} of xlarge; \
         declare a duration within that.",
        seconds(*large_ms),
        seconds(*xlarge_ms),
    )
}

fn declare_or_wait(largest_declared_ms: u64) -> String {
    if largest_declared_ms >= 1000 {
        // The client declares whole seconds.
        format!("declare at most {} s or try again", largest_declared_ms / 1000)
    } else {
        "try again".to_owned()
    }
}

/// Seconds with as many decimals as are not zero, at most 3 (requirement A5).
fn seconds(ms: u64) -> String {
    let (whole, rest) = (ms / 1000, ms % 1000);
    if rest == 0 {
        return format!("{whole} s");
    }
    let decimals = format!("{rest:03}");
    format!("{whole}.{} s", decimals.trim_end_matches('0'))
}

/// A time to wait, rounded up to what a person needs to know.
fn span(ms: u64) -> String {
    let seconds = ms.div_ceil(1000).max(1);
    if seconds < 120 {
        return format!("{seconds} s");
    }
    let minutes = seconds.div_ceil(60);
    if minutes < 120 {
        return format!("{minutes} min");
    }
    format!("{} h {} min", minutes / 60, minutes % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quota() -> Denial {
        Denial::QuotaExceeded {
            declared_ms: 50_000,
            given_ms: None,
            weight: 1,
            needed_ms: 50_000,
            left_ms: 44_750,
            reserved_ms: 0,
            limit_ms: 60_000,
            resets_in_ms: 86_340_001,
            largest_declared_ms: 44_750,
            limiter: Limiter::Account,
        }
    }

    #[test]
    fn messages_carry_numbers_and_the_next_step() {
        assert_eq!(
            human_message(&quota()),
            "The call needs 50 s of quota (50 s declared x weight 1) and 44.75 s of 60 s are left (0 s reserved by \
             other calls); declare at most 44 s or try again in 24 h 0 min."
        );
        let shortened = serde_json::to_string(&quota()).unwrap().replace(r#""weight""#, r#""givenMs":45000,"weight""#);
        let shortened: Denial = serde_json::from_str(&shortened).unwrap();
        assert!(human_message(&shortened).contains("(50 s declared, shortened to 45 s x weight 1)"));
        assert_eq!(
            human_message(&Denial::IllegalDuration {
                declared_ms: 300_000,
                limit_ms: 120_000,
                what: DurationLimit::LongestCall,
                legal: None
            }),
            "The call declares 300 s, the longest call of this tier is 120 s; declare less."
        );
        // Requirement A14: the limit of each size, and whose.
        let legal = |tier: &str| {
            let tier = tier.to_owned();
            Some(Box::new(LegalDurations { tier, size: Size::Xlarge, large_ms: 120_000, xlarge_ms: 60_000 }))
        };
        let illegal = |legal| Denial::IllegalDuration {
            declared_ms: 90_000,
            limit_ms: 60_000,
            what: DurationLimit::WholeQuota,
            legal,
        };
        assert_eq!(
            human_message(&illegal(legal("free"))),
            "The call declares 90 s of size xlarge, the whole quota is only worth 60 s: tier free allows at most 120 s of \
             large and 60 s of xlarge; declare a duration within that."
        );
        assert!(human_message(&illegal(legal(""))).contains("no tier applies"));
        let space = Denial::ConcurrencyExceeded { limit: 4, of: QueueOf::Space };
        assert!(human_message(&space).starts_with("This Space may hold 4 GPU leases"));
        let used_up = Denial::RunsExceeded { limit: 20, resets_in_ms: 3_000_000 };
        assert_eq!(human_message(&used_up), "All 20 calls of the window are used; try again in 50 min.");
    }

    #[test]
    fn stored_form_is_stable() {
        // Pages in etcd and messages of older agents hold this text.
        let text = serde_json::to_string(&quota()).unwrap();
        assert_eq!(
            text,
            r#"{"kind":"QuotaExceeded","declaredMs":50000,"weight":1,"neededMs":50000,"leftMs":44750,"reservedMs":0,"limitMs":60000,"resetsInMs":86340001,"largestDeclaredMs":44750}"#
        );
        assert_eq!(serde_json::from_str::<Denial>(&text).unwrap(), quota());
        let bad_token = Denial::Unauthenticated { reason: UnauthenticatedReason::WrongAudience };
        assert_eq!(
            serde_json::to_string(&bad_token).unwrap(),
            r#"{"kind":"Unauthenticated","reason":"WrongAudience"}"#
        );
        assert_eq!(serde_json::to_string(&Denial::AccountDeleting).unwrap(), r#"{"kind":"AccountDeleting"}"#);
    }

    #[test]
    fn times_are_rounded_for_people() {
        assert_eq!([seconds(0), seconds(1), seconds(1_500), seconds(60_000)], ["0 s", "0.001 s", "1.5 s", "60 s"]);
        assert_eq!([span(0), span(119_000), span(119_001), span(7_200_000)], ["1 s", "119 s", "2 min", "2 h 0 min"]);
        assert!(span(u64::MAX).ends_with("min"));
    }
}
