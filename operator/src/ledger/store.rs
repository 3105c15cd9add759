//! Pages on the API server: read, compare-and-swap, accounts on first use, the term page.
//!
//! The store retries nothing that could have happened (L2): it says what is known, and the broker decides. What it says
//! about a failed write is one of: another revision is there, the account is gone, it was refused, or nobody knows.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::DeserializeGuard;
use serde::Serialize;
use spaceport_core::ids::{AccountName, Epoch};
use spaceport_core::page::Page;
use spaceport_core::queue::EPOCH_MAX;
use spaceport_crds::names::{API_VERSION, LEDGER_FINALIZER, TERM_PAGE};
use spaceport_crds::{GPUAccount, GPUAccountSpec, GPUAccountStatus, Identity};
use spaceport_shell::error_chain;
use tokio::sync::Semaphore;

use super::convert::{KeptFields, PageError, status_of};
use super::display::Display;
use super::pressure::{Answer, PressureGauge};
use super::seen::{AccountSeen, MalformedAccount};
use crate::account::plan::is_kept;
use crate::clock;
use crate::kubeapi::{ApiError, KubeApi, Objects};
use crate::metrics::{Metrics, PageWrite};

/// Tries to begin a term. Each failed one means that another replica began one at the same moment.
const TERM_TRIES: usize = 8;

/// Page writes that are sent at once; the ledger has more under way, and those wait their turn here. A healthy server answers
/// thousands a second through so many. One that is at its limit answers no more for having more of them to answer: all of
/// them take longer, and with them the renewal of the leader's lease, which is then lost.
const SENT_MAX: usize = 16;
/// A write that is not answered for so long keeps nobody back any more: what hangs with one connection, or at a server that
/// is away, is not load.
const TURN_MAX: Duration = Duration::from_secs(1);

/// Pages on the API server. A cheap handle.
#[derive(Clone)]
pub struct PageStore {
    accounts: Objects<GPUAccount>,
    guarded: Objects<DeserializeGuard<GPUAccount>>,
    write_timeout: Duration,
    metrics: Metrics,
    pressure: PressureGauge,
    /// Turns of writes, first come, first served.
    turns: Arc<Semaphore>,
    /// What pages do not carry of the newest status seen or written, by account; only of accounts that have any. A std
    /// mutex: it is never held across an await.
    kept: Arc<Mutex<Kept>>,
}

/// What pages do not carry, of the newest status of each account.
#[derive(Default)]
struct Kept {
    by_name: HashMap<AccountName, KeptOf>,
}

/// Of one status of one object.
struct KeptOf {
    uid: String,
    seq: i64,
    fields: KeptFields,
}

/// The object and revision that a write is for: the compare of the compare-and-swap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageTarget {
    /// Name of the account.
    pub name: AccountName,
    /// Which object of that name.
    pub uid: String,
    /// Which revision of it.
    pub resource_version: String,
}

/// How a compare-and-swap ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    /// Written and durable.
    Written {
        /// The revision it made.
        resource_version: String,
    },
    /// Not written: another revision or another object is there. Read again (L2).
    Conflict,
    /// Not written: the account does not exist any more.
    Gone,
    /// Not written: the API server or our own form refused it. Written again it will be refused again.
    Refused {
        /// Why, for the log and `lastDenial`.
        reason: String,
    },
    /// Nobody knows. A read that shows the write id proves that it was written; only a later successful write of the page
    /// proves that it was not (L2).
    Unknown {
        /// What happened, for the log.
        reason: String,
    },
}

/// A term that this replica has begun. It starts when our own watch shows this write (L6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TermBegun {
    /// Its number, above every epoch that was given and above every term before.
    pub epoch: Epoch,
    /// Proves the write in the watch.
    pub write_id: String,
}

/// Why no term was begun.
#[derive(Debug, thiserror::Error)]
pub enum TermError {
    /// The API server did not do its part.
    #[error("cannot read or write the term page")]
    Api(#[source] ApiError),
    /// The term page cannot be read; without it there is no safe epoch (L6).
    #[error("the term page {TERM_PAGE} cannot be read; nothing is granted until an admin has repaired it")]
    Malformed(#[source] MalformedAccount),
    /// The write was refused.
    #[error("the term page cannot be written: {reason}")]
    Refused {
        /// Why.
        reason: String,
    },
    /// Places of later terms could not be told from each other (L17). Nobody begins this many.
    #[error(
        "no term can be begun after {}: the term page {TERM_PAGE}, another page or a node says that there was that many; \
         nothing is granted until an admin has repaired it", .epoch.0
    )]
    Exhausted {
        /// The highest there was.
        epoch: Epoch,
    },
    /// Others were always faster.
    #[error("gave up on beginning a term: the term page changed {TERM_TRIES} times meanwhile")]
    Contended,
}

/// Why an account was not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The API server did not do its part.
    #[error("cannot make account {name}")]
    Api {
        /// Its name.
        name: AccountName,
        /// What failed.
        #[source]
        source: ApiError,
    },
    /// It existed when it was to be made, and did not when it was to be read.
    #[error("account {name} comes and goes; try again")]
    Vanished {
        /// Its name.
        name: AccountName,
    },
}

/// What a PUT of a status needs; the API server takes nothing else from it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StatusBody<'a> {
    api_version: &'static str,
    kind: &'static str,
    metadata: StatusBodyMetadata<'a>,
    status: &'a GPUAccountStatus,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StatusBodyMetadata<'a> {
    name: &'a str,
    uid: &'a str,
    resource_version: &'a str,
}

// === impl TermError ===

impl TermError {
    /// True if trying again leads nowhere.
    pub const fn is_final(&self) -> bool {
        match self {
            Self::Malformed(_) | Self::Exhausted { .. } => true,
            Self::Api(_) | Self::Refused { .. } | Self::Contended => false,
        }
    }
}

// === impl PageTarget ===

impl PageTarget {
    /// The revision that was seen.
    pub fn of(seen: &AccountSeen) -> Self {
        Self { name: seen.name.clone(), uid: seen.uid.clone(), resource_version: seen.resource_version.clone() }
    }
}

// === impl PageStore ===

impl PageStore {
    /// A store whose writes are unknown after `write_timeout` without an answer.
    pub fn new(api: &KubeApi, write_timeout: Duration, metrics: Metrics) -> Self {
        Self {
            accounts: api.cluster(),
            guarded: api.cluster(),
            write_timeout,
            metrics,
            pressure: PressureGauge::default(),
            turns: Arc::new(Semaphore::new(SENT_MAX)),
            kept: Arc::default(),
        }
    }

    /// How hard writes of pages are for the API server, for whatever has to give way to them.
    pub fn pressure(&self) -> PressureGauge {
        self.pressure.clone()
    }

    /// Writes a page if the account still is as in `target`. The page carries its new `seq`, `write_id` and `epoch`
    /// already: who decides on pages must know them before the write (L2).
    pub async fn write(&self, target: &PageTarget, page: &Page, display: Display) -> WriteOutcome {
        let kept = self.lock_kept().by_name.get(&target.name).map(|kept| kept.fields.clone());
        let status = match status_of(page, display, kept.as_ref()) {
            Ok(status) => status,
            Err(error) => return self.not_stored(target, &error),
        };
        let body = StatusBody {
            api_version: API_VERSION,
            kind: "GPUAccount",
            metadata: StatusBodyMetadata {
                name: target.name.as_str(),
                uid: &target.uid,
                resource_version: &target.resource_version,
            },
            status: &status,
        };
        // Its wait for a turn is pressure as well.
        let under_way = self.pressure.write();
        // Nobody closes it; and were it closed, a write would be sent without a turn.
        let turn = self.turns.acquire().await.ok();
        let begin = clock::monotonic();
        let mut sent = pin!(self.accounts.put_status(target.name.as_str(), &body, self.write_timeout));
        let result = match tokio::time::timeout(TURN_MAX, sent.as_mut()).await {
            Ok(result) => result,
            Err(_) => {
                drop(turn);
                sent.await
            }
        };
        let time = clock::monotonic().saturating_duration_since(begin);
        let overloaded = result.as_ref().is_err_and(ApiError::is_overload);
        under_way.ended(if overloaded { Answer::Overloaded } else { Answer::Decided });
        let (outcome, counted) = match result {
            Ok(written) => match written.metadata.resource_version {
                Some(resource_version) => (WriteOutcome::Written { resource_version }, PageWrite::Written),
                None => {
                    let reason = "the API server's answer has no resourceVersion".to_owned();
                    (WriteOutcome::Unknown { reason }, PageWrite::Unknown)
                }
            },
            Err(ApiError::Conflict { .. }) => (WriteOutcome::Conflict, PageWrite::Conflict),
            Err(ApiError::NotFound { .. }) => (WriteOutcome::Gone, PageWrite::Gone),
            Err(error) => {
                let reason = error_chain(&error);
                if error.is_without_effect() {
                    (WriteOutcome::Refused { reason }, PageWrite::Refused)
                } else {
                    (WriteOutcome::Unknown { reason }, PageWrite::Unknown)
                }
            }
        };
        self.metrics.page_write(counted, time);
        if matches!(outcome, WriteOutcome::Written { .. }) {
            self.keep(&target.name, &target.uid, Some(&status));
        }
        outcome
    }

    fn not_stored(&self, target: &PageTarget, error: &PageError) -> WriteOutcome {
        tracing::error!(account = %target.name, %error, "A page cannot be stored");
        self.metrics.page_write(PageWrite::Refused, Duration::ZERO);
        WriteOutcome::Refused { reason: error.to_string() }
    }

    /// The account as it is now (a quorum read); none if there is none.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub async fn read(&self, name: &AccountName) -> Result<Option<AccountSeen>, ApiError> {
        let found = self.guarded.get(name.as_str()).await?;
        Ok(found.map(|account| self.see(account)))
    }

    /// Makes an account on first use, or reads the one that is there.
    ///
    /// # Errors
    /// See [`CreateError`].
    pub async fn create(
        &self,
        name: &AccountName,
        tier: Option<String>,
        identities: Vec<Identity>,
    ) -> Result<AccountSeen, CreateError> {
        let account = GPUAccount {
            metadata: ObjectMeta {
                name: Some(name.to_string()),
                // From its first moment on, so that it costs no write of its own (L4).
                finalizers: is_kept(name.as_str()).then(|| vec![LEDGER_FINALIZER.to_owned()]),
                ..ObjectMeta::default()
            },
            spec: GPUAccountSpec { identities, tier },
            status: None,
        };
        let failed = |source| CreateError::Api { name: name.clone(), source };
        match self.accounts.create(&account).await {
            Ok(account) => Ok(self.see(DeserializeGuard(Ok(account)))),
            Err(ApiError::Exists { .. }) => {
                let found = self.read(name).await.map_err(failed)?;
                found.ok_or_else(|| CreateError::Vanished { name: name.clone() })
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Begins a term above `above`, which must be the highest epoch seen in any page and any node's hello (L6). Every try
    /// takes a fresh id from `write_ids`.
    ///
    /// # Errors
    /// See [`TermError`]. A term that was begun without us knowing does no harm: the next is above it.
    pub async fn begin_term(
        &self,
        above: Epoch,
        mut write_ids: impl FnMut() -> String + Send,
    ) -> Result<TermBegun, TermError> {
        let name = AccountName::new(TERM_PAGE);
        for _ in 0..TERM_TRIES {
            let seen = match self.read(&name).await.map_err(TermError::Api)? {
                Some(seen) => seen,
                None => match self.create(&name, None, Vec::new()).await {
                    Ok(seen) => seen,
                    Err(CreateError::Api { source, .. }) => return Err(TermError::Api(source)),
                    Err(CreateError::Vanished { .. }) => continue,
                },
            };
            let target = PageTarget::of(&seen);
            let page = next_term(seen.page.map_err(TermError::Malformed)?, above, write_ids())?;
            let begun = TermBegun { epoch: page.epoch, write_id: page.write_id.clone() };
            match self.write(&target, &page, Display::default()).await {
                WriteOutcome::Written { .. } => return Ok(begun),
                WriteOutcome::Refused { reason } => return Err(TermError::Refused { reason }),
                // An unknown outcome is overtaken: the next try is above whatever is there.
                WriteOutcome::Unknown { reason } => tracing::warn!(reason, "Nobody knows whether a term was begun"),
                WriteOutcome::Conflict | WriteOutcome::Gone => {}
            }
        }
        Err(TermError::Contended)
    }

    /// Parses an account and remembers what a page does not carry.
    pub(super) fn see(&self, account: DeserializeGuard<GPUAccount>) -> AccountSeen {
        match account.0 {
            Ok(account) => {
                let seen = AccountSeen::of(&account);
                self.keep(&seen.name, &seen.uid, account.status.as_ref());
                seen
            }
            Err(invalid) => AccountSeen::malformed(&invalid.metadata, invalid.error),
        }
    }

    /// Forgets an account that is gone.
    pub(super) fn forget(&self, name: &AccountName) {
        self.lock_kept().by_name.remove(name);
    }

    fn keep(&self, name: &AccountName, uid: &str, status: Option<&GPUAccountStatus>) {
        self.lock_kept().keep(name, uid, status);
    }

    fn lock_kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// Takes a status that was seen or written, unless a newer one is known: the watch lags behind our own writes (L2).
    fn keep(&mut self, name: &AccountName, uid: &str, status: Option<&GPUAccountStatus>) {
        let fields = status.map(KeptFields::of).unwrap_or_default();
        let seq = status.map_or(0, |status| status.seq);
        if self.by_name.get(name).is_some_and(|kept| kept.uid == uid && kept.seq > seq) {
            return;
        }
        if fields == KeptFields::default() {
            self.by_name.remove(name);
        } else {
            self.by_name.insert(name.clone(), KeptOf { uid: uid.to_owned(), seq, fields });
        }
    }
}

/// The term page of the next term. Pure.
fn next_term(page: Page, above: Epoch, write_id: String) -> Result<Page, TermError> {
    let highest = page.epoch.max(above);
    if highest.0 >= EPOCH_MAX {
        return Err(TermError::Exhausted { epoch: highest });
    }
    Ok(Page { epoch: Epoch(highest.0.saturating_add(1)), seq: page.seq.saturating_add(1), write_id, ..page })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubeapi::fake::{FakeApi, failure};

    #[tokio::test]
    async fn a_page_write_that_is_sent_away_is_write_pressure() {
        let answered = serde_json::json!({"metadata": {"name": "bob", "resourceVersion": "8"}});
        let fake = FakeApi::answering([(200, answered), failure(429, "TooManyRequests")]);
        let store = PageStore::new(&fake.connect(), Duration::from_secs(5), Metrics::new());
        let target =
            PageTarget { name: AccountName::new("bob"), uid: "u".to_owned(), resource_version: "7".to_owned() };
        let page = Page { seq: 1, ..Page::default() };
        let written = store.write(&target, &page, Display::default()).await;
        assert_eq!(written, WriteOutcome::Written { resource_version: "8".to_owned() });
        assert!(!store.pressure().is_high(clock::monotonic()));
        let refused = store.write(&target, &page, Display::default()).await;
        assert!(matches!(refused, WriteOutcome::Refused { .. }), "{refused:?}");
        assert!(store.pressure().is_high(clock::monotonic()));
    }

    /// Of a server that answers nothing, and that was sent as much as it is sent at once.
    #[tokio::test]
    async fn writes_wait_for_their_turn_and_for_no_other_that_is_stuck() {
        let fake = FakeApi::silent();
        let store = PageStore::new(&fake.connect(), Duration::from_secs(60), Metrics::new());
        let mut writes = tokio::task::JoinSet::new();
        for number in 0..=SENT_MAX {
            let (store, name) = (store.clone(), AccountName::new(format!("a{number}")));
            writes.spawn(async move {
                let target = PageTarget { name, uid: "u".to_owned(), resource_version: "7".to_owned() };
                store.write(&target, &Page::default(), Display::default()).await
            });
        }
        while fake.asked().len() < SENT_MAX {
            tokio::task::yield_now().await;
        }
        assert_eq!(store.turns.available_permits(), 0);
        assert_eq!(fake.asked().len(), SENT_MAX, "one waits");
        let last_is_sent = async {
            while fake.asked().len() <= SENT_MAX {
                tokio::time::sleep(TURN_MAX / 20).await;
            }
        };
        tokio::time::timeout(TURN_MAX * 20, last_is_sent).await.unwrap();
    }

    #[test]
    fn next_term_is_above_everything_seen() {
        let page = Page { epoch: Epoch(4), seq: 9, ..Page::default() };
        let after = next_term(page.clone(), Epoch(2), "w".to_owned()).unwrap();
        assert_eq!((after.epoch, after.seq, after.write_id.as_str()), (Epoch(5), 10, "w"));
        let after = next_term(page, Epoch(7), "w".to_owned()).unwrap();
        assert_eq!(after.epoch, Epoch(8), "a node had seen a higher one");
    }

    #[test]
    fn after_the_last_term_none_is_begun() {
        let begin = |epoch| next_term(Page { epoch: Epoch(epoch), ..Page::default() }, Epoch(0), "w".to_owned());
        assert_eq!(begin(EPOCH_MAX - 1).unwrap().epoch, Epoch(EPOCH_MAX));
        let error = begin(EPOCH_MAX).unwrap_err();
        assert!(error.is_final() && error.to_string().contains("no term can be begun after 16777215"), "{error}");
    }

    #[test]
    fn what_pages_do_not_carry_is_of_the_newest_status() {
        let (bob, mut kept) = (AccountName::new("bob"), Kept::default());
        let status = |seq| GPUAccountStatus { seq, observed_generation: Some(seq), ..GPUAccountStatus::default() };
        let mut keep = |uid, seq| {
            kept.keep(&bob, uid, Some(&status(seq)));
            kept.by_name[&bob].fields.clone()
        };
        let newest = keep("first", 6);
        assert_eq!(keep("first", 5), newest, "the watch shows a page that is older than our own write");
        assert_ne!(keep("first", 7), newest);
        assert_eq!(keep("second", 1), KeptFields::of(&status(1)), "another object of the same name");
    }

    #[test]
    fn status_body_names_one_revision_of_one_object() {
        let status = GPUAccountStatus::default();
        let body = StatusBody {
            api_version: API_VERSION,
            kind: "GPUAccount",
            metadata: StatusBodyMetadata { name: "bob", uid: "u", resource_version: "7" },
            status: &status,
        };
        let json = serde_json::to_value(&body).unwrap();
        assert_eq!(json["apiVersion"], "spaceport.dev/v1alpha1");
        assert_eq!(json["metadata"], serde_json::json!({"name": "bob", "uid": "u", "resourceVersion": "7"}));
        assert!(json.get("spec").is_none(), "a status write cannot touch the spec");
    }
}
