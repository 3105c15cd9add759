//! Whether a request may join the queue at all: quota of its account and window, and the queue's bounds. The refusals
//! are the product's (docs/rules.md, L18).

use std::collections::HashMap;

use serde::Serialize;
use spaceport_core::queue::QueueBounds;
use spaceport_core::quota::WINDOW_MS;

use crate::request::{Request, Tier};

/// Which quota holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quota {
    /// None: everyone is let in.
    Off,
    /// That of the tiers, with their longest calls.
    Tiers,
    /// The same for everyone, milliseconds of half a card; no longest call but the quota itself.
    Each(u64),
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Refusal {
    /// Declares more than its tier's longest call, or more than the whole quota.
    IllegalDuration,
    /// Does not fit what is left.
    QuotaExceeded,
    /// Fits what is left, but not minus what the account holds and has queued.
    PendingOverquota,
    /// A bound of the queue.
    QueueFull,
}

/// What was taken from whom.
#[derive(Clone, Debug)]
pub struct Admission {
    quota: Quota,
    bounds: Option<QueueBounds>,
    accounts: Vec<Account>,
    nodes: Vec<usize>,
    spaces: HashMap<u64, usize>,
}

#[derive(Clone, Debug, Default)]
struct Account {
    /// End of its window, once it has one.
    window_end_ms: Option<u64>,
    charged_ms: u64,
    /// Held by its running leases.
    reserved_ms: u64,
    queued_ms: u64,
    queued: usize,
}

/// What a running lease holds of its account; settled where it came from.
#[derive(Clone, Copy, Debug)]
pub struct Hold {
    user: usize,
    window_end_ms: Option<u64>,
    needed_ms: u64,
}

// === impl Admission ===

impl Admission {
    /// Empty accounts and queues. Without `bounds` the queues have none.
    pub fn new(quota: Quota, bounds: Option<QueueBounds>, users: usize, nodes: usize) -> Self {
        Self { quota, bounds, accounts: vec![Account::default(); users], nodes: vec![0; nodes], spaces: HashMap::new() }
    }

    /// Lets a request into the queue of a node.
    ///
    /// # Errors
    /// The refusal, with nothing changed.
    pub fn arrive(
        &mut self,
        now_ms: u64,
        request: &Request,
        tier: Tier,
        node: usize,
        space: u64,
    ) -> Result<(), Refusal> {
        let account = &mut self.accounts[request.user];
        account.roll(now_ms);
        let needed_ms = needed_ms(request);
        if let Some(limit_ms) = limit_ms(self.quota, tier) {
            let too_long = self.quota == Quota::Tiers && request.declared_ms > tier.longest_ms();
            let left_ms = limit_ms.saturating_sub(account.charged_ms);
            if too_long || needed_ms > limit_ms {
                return Err(Refusal::IllegalDuration);
            }
            if needed_ms > left_ms {
                return Err(Refusal::QuotaExceeded);
            }
            if needed_ms > left_ms.saturating_sub(account.reserved_ms + account.queued_ms) {
                return Err(Refusal::PendingOverquota);
            }
        }
        let of_space = self.spaces.entry(space).or_default();
        if let Some(bounds) = self.bounds
            && (account.queued >= bounds.account || *of_space >= bounds.space || self.nodes[node] >= bounds.node)
        {
            return Err(Refusal::QueueFull);
        }
        account.queued += 1;
        account.queued_ms += needed_ms;
        *of_space += 1;
        self.nodes[node] += 1;
        Ok(())
    }

    /// A request leaves the queue for a slot.
    pub fn start(&mut self, now_ms: u64, request: &Request, node: usize, space: u64) -> Hold {
        let account = &mut self.accounts[request.user];
        account.roll(now_ms);
        let needed_ms = needed_ms(request);
        account.queued -= 1;
        account.queued_ms -= needed_ms;
        account.reserved_ms += needed_ms;
        let window_end_ms = *account.window_end_ms.get_or_insert(now_ms + WINDOW_MS);
        self.nodes[node] -= 1;
        if let Some(count) = self.spaces.get_mut(&space) {
            *count -= 1;
        }
        Hold { user: request.user, window_end_ms: Some(window_end_ms), needed_ms }
    }

    /// Its lease has ended; a hold of an earlier window leaves the present one alone.
    pub fn end(&mut self, hold: Hold, charged_ms: u64) {
        let account = &mut self.accounts[hold.user];
        if account.window_end_ms == hold.window_end_ms {
            account.reserved_ms -= hold.needed_ms;
            account.charged_ms += charged_ms;
        }
    }

    /// What an account has used, holds and has queued of its quota, percent, at most 100; 0 where no quota holds.
    pub fn used_percent(&self, user: usize, tier: Tier) -> u64 {
        let account = &self.accounts[user];
        let used_ms = account.charged_ms + account.reserved_ms + account.queued_ms;
        limit_ms(self.quota, tier).map_or(0, |limit_ms| (used_ms * 100 / limit_ms.max(1)).min(100))
    }
}

impl Account {
    fn roll(&mut self, now_ms: u64) {
        if self.window_end_ms.is_some_and(|end_ms| end_ms <= now_ms) {
            (self.window_end_ms, self.charged_ms, self.reserved_ms) = (None, 0, 0);
        }
    }
}

const fn needed_ms(request: &Request) -> u64 {
    request.declared_ms * request.slots()
}

const fn limit_ms(quota: Quota, tier: Tier) -> Option<u64> {
    match quota {
        Quota::Off => None,
        Quota::Tiers => Some(tier.quota_ms()),
        Quota::Each(limit_ms) => Some(limit_ms),
    }
}
