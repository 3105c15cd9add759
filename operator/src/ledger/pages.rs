//! Pages as the broker's actor uses them: in tasks of its own, so that it never waits. A trait, so that the actor can be
//! tried against a store that loses answers.

use std::sync::Arc;
use std::time::Duration;

use spaceport_core::ids::{AccountName, Epoch, NodeName};
use spaceport_core::page::Page;
use spaceport_shell::error_chain;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::display::Display;
use super::seen::AccountSeen;
use super::store::{CreateError, PageStore, PageTarget, TermBegun, TermError, WriteOutcome};
use crate::fault::{self, Fault};
use crate::kubeapi::{ApiError, pause};

/// Waits between two tries to read a page; the last is repeated until it is read, for quota and place of an unknown
/// outcome stay taken meanwhile (L2).
const READ_WAITS_MS: [u64; 5] = [0, 50, 200, 1_000, 5_000];

/// Where pages are.
pub trait Pages: Clone + Send + Sync + 'static {
    /// See [`PageStore::write`].
    fn write(&self, target: &PageTarget, page: &Page, display: Display) -> impl Future<Output = WriteOutcome> + Send;

    /// See [`PageStore::read`].
    fn read(&self, name: &AccountName) -> impl Future<Output = Result<Option<AccountSeen>, ApiError>> + Send;

    /// Makes an account whose tier follows from its name, or reads the one that is there. See [`PageStore::create`].
    fn create(&self, name: &AccountName) -> impl Future<Output = Result<AccountSeen, CreateError>> + Send;

    /// See [`PageStore::begin_term`].
    fn begin_term(&self, above: Epoch) -> impl Future<Output = Result<TermBegun, TermError>> + Send;
}

impl Pages for PageStore {
    async fn write(&self, target: &PageTarget, page: &Page, display: Display) -> WriteOutcome {
        Self::write(self, target, page, display).await
    }

    async fn read(&self, name: &AccountName) -> Result<Option<AccountSeen>, ApiError> {
        Self::read(self, name).await
    }

    async fn create(&self, name: &AccountName) -> Result<AccountSeen, CreateError> {
        Self::create(self, name, None, Vec::new()).await
    }

    async fn begin_term(&self, above: Epoch) -> Result<TermBegun, TermError> {
        Self::begin_term(self, above, || spaceport_core::ids::ulid_text(ulid::Ulid::generate().0)).await
    }
}

/// Why a page is read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wanted {
    /// A write of it met another revision, or has an unknown outcome (L2).
    Outcome,
    /// This node has leases of its account that no known page holds (L7).
    Leases(NodeName),
    /// The watch shows another object of the name than the one that is known: which of them is there now.
    Object,
}

/// A read, and what was known when it began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Whose page.
    pub account: AccountName,
    /// The object of that name that was known.
    pub uid: Option<String>,
    /// Why.
    pub wanted: Wanted,
}

/// What came back from a task.
pub enum Done {
    /// A write ended.
    Written {
        /// Whose page.
        account: AccountName,
        /// Of the write.
        write_id: String,
        /// What it expected.
        target: PageTarget,
        /// How it ended.
        outcome: WriteOutcome,
    },
    /// A page was read, or its account is gone.
    Read {
        /// What was asked.
        asked: Asked,
        /// The account.
        found: Option<Box<AccountSeen>>,
    },
    /// The account of a first call was made or found; None if it does not exist, or the reason.
    FirstSeen {
        /// Whose.
        account: AccountName,
        /// The account.
        found: Result<Option<Box<AccountSeen>>, String>,
    },
    /// The term ended meanwhile.
    Stopped,
}

/// Writes a page, once: what an unknown outcome means is the ledger's to decide (L2).
pub async fn write<P: Pages>(store: P, target: PageTarget, page: Arc<Page>, display: Display) -> Done {
    let mut outcome = store.write(&target, &page, display).await;
    if fault::is(Fault::GrantsFromMemory) {
        outcome = believed(&target, outcome);
    }
    match &outcome {
        WriteOutcome::Refused { reason } => error!(account = %target.name, reason, "A page write was refused"),
        WriteOutcome::Unknown { reason } => {
            warn!(account = %target.name, reason, "Nobody knows whether a page was written; quota and place stay taken");
        }
        WriteOutcome::Written { .. } | WriteOutcome::Conflict | WriteOutcome::Gone => {}
    }
    Done::Written { account: target.name.clone(), write_id: page.write_id.clone(), target, outcome }
}

/// What became of a write, to who takes each for done. Its page stays behind from then on: the next `seq` is not one above the
/// stored one, so that later writes are refused too (L5), and believed.
fn believed(target: &PageTarget, outcome: WriteOutcome) -> WriteOutcome {
    match outcome {
        WriteOutcome::Written { .. } | WriteOutcome::Gone => outcome,
        WriteOutcome::Conflict | WriteOutcome::Refused { .. } | WriteOutcome::Unknown { .. } => {
            WriteOutcome::Written { resource_version: target.resource_version.clone() }
        }
    }
}

/// Reads a page until it is read. One that cannot be used is read again too: an admin has to repair it, and until then
/// nothing is decided about its account.
pub async fn read<P: Pages>(store: P, asked: Asked, stop: CancellationToken) -> Done {
    let account = &asked.account;
    let mut tries = 0;
    loop {
        let wait_ms = READ_WAITS_MS.get(tries).or(READ_WAITS_MS.last()).copied().unwrap_or_default();
        if !pause(Duration::from_millis(wait_ms), &stop).await {
            return Done::Stopped;
        }
        match store.read(account).await {
            Ok(None) => return Done::Read { asked, found: None },
            Ok(Some(seen)) => match &seen.page {
                Ok(_) => return Done::Read { asked, found: Some(Box::new(seen)) },
                Err(problem) => error!(%account, error = %error_chain(problem), "A page cannot be used"),
            },
            Err(error) => warn!(%account, error = %error_chain(&error), "A page cannot be read; it is tried again"),
        }
        tries = (tries + 1).min(READ_WAITS_MS.len());
    }
}

/// Makes the account of a first call, or only looks for it. Once: the call's client tries again.
pub async fn first_see<P: Pages>(store: P, account: AccountName, make: bool) -> Done {
    let found = if make {
        store.create(&account).await.map(Some).map_err(|error| error_chain(&error))
    } else {
        store.read(&account).await.map_err(|error| error_chain(&error))
    };
    Done::FirstSeen { account, found: found.map(|found| found.map(Box::new)) }
}
