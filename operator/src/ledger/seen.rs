//! The broker's objects as values: everything a watch delivers is parsed here, once, and what cannot be parsed is never
//! half-used.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use spaceport_core::ids::{AccountName, Epoch, LedgerTime, NodeName};
use spaceport_core::lease::SpaceSettings;
use spaceport_core::page::{Page, Unsound};
use spaceport_core::protocol::CallerClass;
use spaceport_core::queue::LaneSettings;
use spaceport_crds as crds;
use spaceport_crds::conditions::{ConditionStatus, GPUAccountCondition};
use spaceport_crds::names::BREAK_GLASS_ANNOTATION;

use super::convert::{PageError, page_of};

/// A GPUAccount. Of an event whose `page` is not newer than what is known only the rest is taken (L2).
#[derive(Clone, Debug, PartialEq)]
pub struct AccountSeen {
    /// Its name.
    pub name: AccountName,
    /// Which object of that name; the compare of every write.
    pub uid: String,
    /// Which revision; the compare of every write.
    pub resource_version: String,
    /// When it was made; of two accounts with one identity the older has it.
    pub created: Timestamp,
    /// `spec.tier`.
    pub tier: Option<String>,
    /// `spec.identities`.
    pub identities: Vec<crds::Identity>,
    /// Being deleted (L4): it waits for its finalizer and is granted nothing.
    pub deleting: bool,
    /// Its finalizers, ours and others'.
    pub finalizers: Vec<String>,
    /// Generation of its spec.
    pub generation: Option<i64>,
    /// Its condition `Ready` as stored; none if no write has shown one yet.
    pub ready: Option<ReadyShown>,
    /// The admin's reason for deleting it although something is open, if given.
    pub break_glass: Option<String>,
    /// Its page; the empty page for a new account. An error closes the account: nothing is granted, nothing written.
    pub page: Result<Page, MalformedAccount>,
}

/// A condition `Ready` as it stands on a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadyShown {
    /// Status is `True`.
    pub holds: bool,
    /// Its reason.
    pub reason: String,
}

/// Why an account has no usable page.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedAccount {
    /// The object does not have the form of a GPUAccount.
    #[error("the object cannot be read: {0}")]
    Object(String),
    /// A field of its status is wrong.
    #[error("the page cannot be read")]
    Page(#[source] PageError),
    /// Every field of its status can be read, and together they are no page that the ledger writes.
    #[error("the page is none that the ledger writes")]
    Unsound(#[source] Unsound),
}

/// The term page (L6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TermSeen {
    /// The term that was last begun.
    pub epoch: Epoch,
    /// Who began it: the write id that [`super::store::PageStore::begin_term`] returned, if it was us.
    pub write_id: String,
}

/// A GPUTier.
#[derive(Clone, Debug, PartialEq)]
pub struct TierSeen {
    /// Its name.
    pub name: String,
    /// Generation of its spec, repeated by ledger rows.
    pub generation: i64,
    /// When it was made; of equally specific rules the oldest tier's wins.
    pub created: Timestamp,
    /// Base quota of a window, weighted milliseconds.
    pub base_ms: u64,
    /// Quota of all visitors behind one address prefix together, if the tier has one, weighted milliseconds.
    pub address_prefix_ms: Option<u64>,
    /// Longest declared duration, unweighted milliseconds.
    pub longest_call_ms: u64,
    /// Most leases of an account at once.
    pub concurrent_leases: u32,
    /// Most runs in one window, if limited.
    pub runs_per_window: Option<u64>,
    /// Whether grants add to it.
    pub extendable: bool,
    /// Which callers it is for.
    pub callers: crds::Callers,
    /// What the client is told about the caller.
    pub class: CallerClass,
    /// Place in the queue.
    pub priority: crds::Priority,
    /// Rules that put identities into it.
    pub identities: Vec<crds::IdentityRule>,
}

/// A GPUPool.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolSeen {
    /// Its name.
    pub name: String,
    /// Generation of its spec.
    pub generation: i64,
    /// `large` is a whole card.
    pub large_is_whole: bool,
    /// Charged milliseconds for each of use, `large`.
    pub large_weight: u64,
    /// The same of `xlarge`.
    pub xlarge_weight: u64,
    /// Waiting requests in the pool at most.
    pub queue_per_pool: u64,
    /// Of one Space.
    pub queue_per_space: u64,
    /// Of one account.
    pub queue_per_account: u64,
    /// Their order.
    pub lanes: LaneSettings,
    /// From the grant to `/allow`, milliseconds (L9).
    pub allow_limit_ms: u64,
    /// From the declared end to the kill, milliseconds.
    pub grace_ms: u64,
    /// From the end to a free slot, milliseconds.
    pub clear_limit_ms: u64,
    /// Age at which a node refuses an order, milliseconds (L8).
    pub order_ttl_ms: u64,
    /// What the client multiplies durations of `large` by, percent (L19).
    pub duration_factor_percent: u64,
    /// Receipts are written while leases run, not only at their end.
    pub receipts_live: bool,
    /// Age at which a final receipt is removed, seconds.
    pub receipt_age_max_seconds: u64,
    /// Final receipts kept for one Space.
    pub receipts_kept: usize,
}

/// A GPUNode, as far as the broker needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSeen {
    /// Its name, which is that of the node.
    pub name: NodeName,
    /// The pool that its agent follows, by name; none if no pool selects the node.
    pub pool: Option<String>,
}

/// A GPUQuotaGrant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantSeen {
    /// Its name.
    pub name: String,
    /// Its uid; ledger rows name it by that.
    pub uid: String,
    /// The account that gets it.
    pub account: AccountName,
    /// Granted, weighted milliseconds.
    pub ms: u64,
    /// Unusable from here on.
    pub expires: LedgerTime,
}

/// A Space, as far as the broker needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceSeen {
    /// Its uid; leases name it by that.
    pub uid: String,
    /// What its owner chose for its calls.
    pub settings: SpaceSettings,
}

/// An object that the API server should never have accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}, which is out of range")]
pub struct OutOfRange {
    field: &'static str,
    value: i64,
}

fn natural<T: TryFrom<i64>>(field: &'static str, value: impl Into<i64>) -> Result<T, OutOfRange> {
    let value = value.into();
    T::try_from(value).map_err(|_| OutOfRange { field, value })
}

fn milliseconds(field: &'static str, seconds: impl Into<i64>) -> Result<u64, OutOfRange> {
    let value = seconds.into();
    let seconds: u64 = natural(field, value)?;
    seconds.checked_mul(1000).ok_or(OutOfRange { field, value })
}

fn created(metadata: &ObjectMeta) -> Timestamp {
    metadata.creation_timestamp.as_ref().map_or(Timestamp::MAX, |time| time.0)
}

// === impl AccountSeen ===

impl AccountSeen {
    /// Parses an account; a wrong page is part of the value.
    pub fn of(account: &crds::GPUAccount) -> Self {
        let page = match &account.status {
            Some(status) => page_of(status)
                .map_err(MalformedAccount::Page)
                .and_then(|page| page.sound().map_err(MalformedAccount::Unsound).map(|()| page)),
            None => Ok(Page::default()),
        };
        let tier = account.spec.tier.clone();
        let conditions = account.status.iter().flat_map(|status| &status.conditions);
        let ready = conditions
            .filter(|condition| condition.type_ == GPUAccountCondition::Ready.as_str())
            .map(|condition| ReadyShown {
                holds: condition.status == ConditionStatus::True.as_str(),
                reason: condition.reason.clone(),
            })
            .next();
        let identities = account.spec.identities.clone();
        Self { tier, identities, ready, ..Self::of_metadata(&account.metadata, page) }
    }

    /// An account of which only the metadata can be read.
    pub fn malformed(metadata: &ObjectMeta, error: String) -> Self {
        Self::of_metadata(metadata, Err(MalformedAccount::Object(error)))
    }

    fn of_metadata(metadata: &ObjectMeta, page: Result<Page, MalformedAccount>) -> Self {
        let annotations = metadata.annotations.as_ref();
        Self {
            name: AccountName::new(metadata.name.clone().unwrap_or_default()),
            uid: metadata.uid.clone().unwrap_or_default(),
            resource_version: metadata.resource_version.clone().unwrap_or_default(),
            created: created(metadata),
            tier: None,
            identities: Vec::new(),
            deleting: metadata.deletion_timestamp.is_some(),
            finalizers: metadata.finalizers.clone().unwrap_or_default(),
            generation: metadata.generation,
            ready: None,
            break_glass: annotations.and_then(|annotations| annotations.get(BREAK_GLASS_ANNOTATION).cloned()),
            page,
        }
    }
}

// === other kinds ===

impl TryFrom<&crds::GPUTier> for TierSeen {
    type Error = OutOfRange;

    fn try_from(tier: &crds::GPUTier) -> Result<Self, OutOfRange> {
        let spec = &tier.spec;
        Ok(Self {
            name: tier.metadata.name.clone().unwrap_or_default(),
            generation: tier.metadata.generation.unwrap_or(0),
            created: created(&tier.metadata),
            base_ms: milliseconds("gpuSecondsPerWindow", spec.gpu_seconds_per_window)?,
            address_prefix_ms: spec
                .gpu_seconds_per_address_prefix
                .map(|seconds| milliseconds("gpuSecondsPerAddressPrefix", seconds))
                .transpose()?,
            longest_call_ms: milliseconds("longestCallSeconds", spec.longest_call_seconds)?,
            concurrent_leases: natural("concurrentLeases", spec.concurrent_leases)?,
            runs_per_window: spec.runs_per_window.map(|runs| natural("runsPerWindow", runs)).transpose()?,
            extendable: spec.extendable_by_grants == crds::Extendable::Always,
            callers: spec.callers,
            class: match spec.authenticated_as {
                crds::AuthenticatedAs::Anonymous => CallerClass::Guest,
                crds::AuthenticatedAs::Regular => CallerClass::Regular,
                crds::AuthenticatedAs::Pro => CallerClass::Pro,
            },
            priority: spec.priority,
            identities: spec.identities.clone(),
        })
    }
}

fn lanes(queue: &crds::QueueBounds) -> Result<LaneSettings, OutOfRange> {
    let crds::PriorityClasses { low, medium, highest } = &queue.priorities;
    Ok(LaneSettings {
        age_percent: natural("queue.ageLanePercent", queue.age_lane_percent)?,
        weights: [
            natural("queue.priorities.low.weight", low.weight)?,
            natural("queue.priorities.medium.weight", medium.weight)?,
            natural("queue.priorities.highest.weight", highest.weight)?,
        ],
        floors: [
            natural("queue.priorities.low.floorPercent", low.floor_percent)?,
            natural("queue.priorities.medium.floorPercent", medium.floor_percent)?,
            natural("queue.priorities.highest.floorPercent", highest.floor_percent)?,
        ],
        ..LaneSettings::default()
    })
}

impl TryFrom<&crds::GPUPool> for PoolSeen {
    type Error = OutOfRange;

    fn try_from(pool: &crds::GPUPool) -> Result<Self, OutOfRange> {
        let spec = &pool.spec;
        Ok(Self {
            name: pool.metadata.name.clone().unwrap_or_default(),
            generation: pool.metadata.generation.unwrap_or(0),
            large_is_whole: spec.sizes.large == crds::LargeShare::Whole,
            large_weight: natural("weights.large", spec.weights.large)?,
            xlarge_weight: natural("weights.xlarge", spec.weights.xlarge)?,
            queue_per_pool: natural("queue.perPool", spec.queue.per_pool)?,
            queue_per_space: natural("queue.perSpace", spec.queue.per_space)?,
            queue_per_account: natural("queue.perAccount", spec.queue.per_account)?,
            lanes: lanes(&spec.queue)?,
            allow_limit_ms: milliseconds("allowLimitSeconds", spec.allow_limit_seconds)?,
            grace_ms: milliseconds("graceSeconds", spec.grace_seconds)?,
            clear_limit_ms: milliseconds("clearLimitSeconds", spec.clear_limit_seconds)?,
            order_ttl_ms: milliseconds("orderTTLSeconds", spec.order_ttl_seconds)?,
            duration_factor_percent: natural("durationFactorPercent", spec.duration_factor_percent)?,
            receipts_live: spec.receipts.timing == crds::ReceiptTiming::Live,
            receipt_age_max_seconds: natural("receipts.retentionSeconds", spec.receipts.retention_seconds)?,
            receipts_kept: natural("receipts.perSpace", spec.receipts.per_space)?,
        })
    }
}

impl TryFrom<&crds::GPUNode> for NodeSeen {
    type Error = OutOfRange;

    fn try_from(node: &crds::GPUNode) -> Result<Self, OutOfRange> {
        Ok(Self {
            name: NodeName::new(node.metadata.name.clone().unwrap_or_default()),
            pool: node.status.as_ref().and_then(|status| status.pool.clone()),
        })
    }
}

impl TryFrom<&crds::Space> for SpaceSeen {
    type Error = OutOfRange;

    fn try_from(space: &crds::Space) -> Result<Self, OutOfRange> {
        let spec = &space.spec;
        Ok(Self {
            uid: space.metadata.uid.clone().unwrap_or_default(),
            settings: SpaceSettings {
                concurrent: spec.concurrent_leases.map(|leases| natural("concurrentLeases", leases)).transpose()?,
                clamp_to_remaining: spec.clamp_to_remaining,
                learned_reservation: spec.reservation == crds::Reservation::Learned,
            },
        })
    }
}

impl TryFrom<&crds::GPUQuotaGrant> for GrantSeen {
    type Error = OutOfRange;

    fn try_from(grant: &crds::GPUQuotaGrant) -> Result<Self, OutOfRange> {
        Ok(Self {
            name: grant.metadata.name.clone().unwrap_or_default(),
            uid: grant.metadata.uid.clone().unwrap_or_default(),
            account: AccountName::new(&grant.spec.account),
            ms: milliseconds("gpuSeconds", grant.spec.gpu_seconds)?,
            expires: LedgerTime(grant.spec.expires_at.0.as_millisecond()),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn account_without_status_has_an_empty_page() {
        let account: crds::GPUAccount = serde_json::from_value(json!({
            "apiVersion": "spaceport.dev/v1alpha1", "kind": "GPUAccount",
            "metadata": {"name": "bob", "uid": "u1", "resourceVersion": "7", "creationTimestamp": "2026-11-21T12:00:00Z",
                         "deletionTimestamp": "2026-11-21T12:01:00Z",
                         "annotations": {"spaceport.dev/break-glass": "moved away"}},
            "spec": {"tier": "demo"}
        }))
        .unwrap();
        let seen = AccountSeen::of(&account);
        assert_eq!((seen.name.as_str(), seen.uid.as_str(), seen.resource_version.as_str()), ("bob", "u1", "7"));
        assert_eq!(
            (seen.tier.as_deref(), seen.deleting, seen.break_glass.as_deref()),
            (Some("demo"), true, Some("moved away"))
        );
        assert_eq!(seen.page, Ok(Page::default()));
    }

    #[test]
    fn account_with_a_wrong_page_says_so() {
        let account: crds::GPUAccount = serde_json::from_value(json!({
            "apiVersion": "spaceport.dev/v1alpha1", "kind": "GPUAccount", "metadata": {"name": "bob"}, "spec": {},
            "status": {"seq": -1, "writeId": "", "epoch": 0, "lastTimeMilliseconds": 0}
        }))
        .unwrap();
        assert!(matches!(AccountSeen::of(&account).page, Err(MalformedAccount::Page(_))));
    }

    #[test]
    fn seconds_become_milliseconds_and_nonsense_an_error() {
        let tier = |seconds: i64| {
            crds::GPUTier::new(
                "demo",
                crds::GPUTierSpec {
                    gpu_seconds_per_window: seconds,
                    longest_call_seconds: 50,
                    concurrent_leases: 2,
                    ..crds::GPUTierSpec::default()
                },
            )
        };
        let seen = TierSeen::try_from(&tier(60)).unwrap();
        assert_eq!((seen.base_ms, seen.longest_call_ms, seen.class), (60_000, 50_000, CallerClass::Regular));
        assert!(TierSeen::try_from(&tier(-1)).is_err());
        assert!(TierSeen::try_from(&tier(i64::MAX)).is_err());
    }

    #[test]
    fn what_an_owner_chose_for_the_calls_of_a_space() {
        let space = |choice: serde_json::Value| {
            let mut space = json!({
                "apiVersion": "spaceport.dev/v1alpha1", "kind": "Space", "metadata": {"name": "hello", "uid": "u"},
                "spec": {"source": {"inline": {"files": {"app.py": ""}}}}
            });
            space["spec"].as_object_mut().unwrap().extend(choice.as_object().unwrap().clone());
            SpaceSeen::try_from(&serde_json::from_value::<crds::Space>(space).unwrap())
        };
        let nothing = SpaceSeen { uid: "u".to_owned(), settings: SpaceSettings::default() };
        assert_eq!(space(json!({})), Ok(nothing));
        let chosen = json!({"clampToRemaining": true, "concurrentLeases": 3, "reservation": "Learned"});
        let settings = SpaceSettings { concurrent: Some(3), clamp_to_remaining: true, learned_reservation: true };
        assert_eq!(space(chosen).unwrap().settings, settings);
        assert!(space(json!({"concurrentLeases": -1})).is_err());
    }

    #[test]
    fn pool_has_the_limits_of_the_design() {
        let pool = PoolSeen::try_from(&crds::GPUPool::new("main", crds::GPUPoolSpec::default())).unwrap();
        assert_eq!(
            (pool.allow_limit_ms, pool.grace_ms, pool.clear_limit_ms, pool.order_ttl_ms),
            (30_000, 2000, 10_000, 5000)
        );
        assert_eq!((pool.large_weight, pool.xlarge_weight), (1, 2));
    }
}
