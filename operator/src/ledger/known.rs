//! What the broker has been shown by watches and agents, apart from the ledger: kept over terms.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use spaceport_core::ids::{AccountName, Epoch, NodeName, Ticket};
use spaceport_core::lease::{Policy, SpaceSettings};
use spaceport_proto::nodelink::Card;
use spaceport_proto::nodelink::node_message::Message;

use super::grants::Grants;
use super::identities::Identities;
use super::policy::{self, NoPool};
use super::receipt::GivenCard;
use super::seen::{AccountSeen, GrantSeen, NodeSeen, PoolSeen, SpaceSeen, TierSeen};
use super::watches::{StoreEvent, Watched};
use crate::node_link::{BELIEVED_MAX, NodeEvent, Outbound, SessionId};

/// What was shown last of everything.
pub struct Known {
    /// Accounts.
    pub accounts: BTreeMap<AccountName, AccountSeen>,
    /// Who has which identity.
    identities: Identities,
    /// What owners of Spaces chose, by uid; only of those who chose anything.
    pub spaces: BTreeMap<String, SpaceSettings>,
    /// Tiers by name.
    pub tiers: BTreeMap<String, TierSeen>,
    /// Pools by name.
    pub pools: BTreeMap<String, PoolSeen>,
    /// Names of the pools that agents say they follow, by node; kept while an agent is away, for its leases run on.
    pub named_pools: BTreeMap<NodeName, String>,
    /// Grants.
    grants: Grants,
    /// Agents that are there.
    pub sessions: BTreeMap<NodeName, Session>,
    /// How far our clock is off, if that is too much (L20).
    pub clock_off_ms: Option<u64>,
    /// Kinds of which not everything was shown yet.
    pub unlisted: BTreeSet<Watched>,
    clock_skew_max: Duration,
}

/// A session of an agent.
pub struct Session {
    /// Its number.
    pub id: SessionId,
    /// The way to the agent.
    pub outbound: Outbound,
    /// Fresh at every start of the agent.
    pub agent_instance: String,
    /// Highest epoch that the node had accepted when it began (L6).
    pub highest_epoch: Epoch,
    /// Last stamp of the node's boot-time clock, echoed by orders (L8).
    pub boottime_ms: u64,
    /// UUIDs of its cards by index, as its last inventory has them; so no more than it has cards.
    pub card_uuids: BTreeMap<u32, String>,
}

/// All cards of a node, in messages that have them.
fn inventory(message: Option<&Message>) -> Option<&[Card]> {
    match message? {
        Message::Joined(joined) => Some(&joined.cards),
        Message::Heartbeat(heartbeat) if heartbeat.inventory_changed => Some(&heartbeat.cards),
        _ => None,
    }
}

impl Known {
    /// Nothing yet.
    pub fn new(clock_skew_max: Duration) -> Self {
        Self {
            accounts: BTreeMap::new(),
            identities: Identities::default(),
            spaces: BTreeMap::new(),
            tiers: BTreeMap::new(),
            pools: BTreeMap::new(),
            named_pools: BTreeMap::new(),
            grants: Grants::default(),
            sessions: BTreeMap::new(),
            clock_off_ms: None,
            unlisted: Watched::ALL.into_iter().collect(),
            clock_skew_max,
        }
    }

    /// The highest epoch of any page, and of any agent's hello that is believed.
    pub fn highest_epoch(&self) -> Epoch {
        let pages = self.accounts.values().filter_map(|account| account.page.as_ref().ok()).map(|page| page.epoch);
        let said = self.sessions.values().map(|session| session.highest_epoch).filter(|said| *said <= BELIEVED_MAX);
        pages.chain(said).max().unwrap_or_default()
    }

    /// Nodes that a new term waits for (L17): those with open holds and those whose agents are there.
    pub fn awaited(&self) -> BTreeSet<NodeName> {
        let pages = self.accounts.values().filter_map(|account| account.page.as_ref().ok());
        let holding = pages.flat_map(|page| page.holds.iter().map(|hold| hold.node.clone()));
        holding.chain(self.sessions.keys().cloned()).collect()
    }

    /// Takes what a watch shows.
    pub fn store(&mut self, event: StoreEvent) {
        match event {
            StoreEvent::Account(account) => self.take_account(*account),
            StoreEvent::AccountGone { name, uid } => {
                // Of an object before the known one the watch may tell late.
                if self.accounts.get(&name).is_some_and(|known| known.uid == uid) {
                    self.drop_account(&name);
                }
            }
            StoreEvent::Space(SpaceSeen { uid, settings }) if settings != SpaceSettings::default() => {
                self.spaces.insert(uid, settings);
            }
            StoreEvent::Space(SpaceSeen { uid, .. }) | StoreEvent::SpaceGone { uid } => {
                self.spaces.remove(&uid);
            }
            StoreEvent::Tier(tier) => {
                self.tiers.insert(tier.name.clone(), *tier);
            }
            StoreEvent::TierGone { name } => {
                self.tiers.remove(&name);
            }
            StoreEvent::Pool(pool) => {
                self.pools.insert(pool.name.clone(), *pool);
            }
            StoreEvent::PoolGone { name } => {
                self.pools.remove(&name);
            }
            StoreEvent::Node(NodeSeen { name, pool: Some(pool) }) => {
                self.named_pools.insert(name, pool);
            }
            StoreEvent::Node(NodeSeen { name, pool: None }) | StoreEvent::NodeGone { name } => {
                self.named_pools.remove(&name);
            }
            StoreEvent::Grant(grant) => self.grants.insert(grant),
            StoreEvent::GrantGone { uid } => self.grants.remove(&uid),
            StoreEvent::Clock(difference) => {
                let limit_ms = u64::try_from(self.clock_skew_max.as_millis()).unwrap_or(u64::MAX);
                // Only what certainly is too far off stops grants (L20).
                self.clock_off_ms = difference.exceeds(limit_ms).then_some(difference.ahead_ms.unsigned_abs());
            }
            StoreEvent::Listed(watched) => {
                self.unlisted.remove(&watched);
            }
            StoreEvent::Term(_) => {}
        }
    }

    /// An account as it is.
    pub fn take_account(&mut self, account: AccountSeen) {
        self.drop_account(&account.name.clone());
        self.identities.insert(&account);
        self.accounts.insert(account.name.clone(), account);
    }

    /// It does not exist any more. Gives the accounts that had an identity in common with it.
    pub fn drop_account(&mut self, name: &AccountName) -> BTreeSet<AccountName> {
        let Some(account) = self.accounts.remove(name) else { return BTreeSet::new() };
        self.identities.remove(&account);
        self.identities.sharing(&account)
    }

    /// Takes what happens on the link. A session that is replaced is closed.
    pub fn node(&mut self, event: NodeEvent) {
        match event {
            NodeEvent::Connected { session, node, hello, boottime_ms, outbound } => {
                let session = Session {
                    id: session,
                    outbound,
                    agent_instance: hello.agent_instance,
                    highest_epoch: Epoch(hello.highest_epoch),
                    boottime_ms,
                    card_uuids: BTreeMap::new(),
                };
                if let Some(old) = self.sessions.insert(node, session) {
                    old.outbound.close();
                }
            }
            NodeEvent::Message { session, node, message } => {
                if let Some(known) = self.sessions.get_mut(&node).filter(|known| known.id == session) {
                    known.boottime_ms = known.boottime_ms.max(message.boottime_ms);
                    if let Some(cards) = inventory(message.message.as_ref()) {
                        known.card_uuids = cards.iter().map(|card| (card.index, card.uuid.clone())).collect();
                    }
                }
            }
            NodeEvent::Disconnected { session, node } => {
                if self.is_current(&node, session) {
                    self.sessions.remove(&node);
                }
            }
        }
    }

    /// True if this is the node's session, and not an earlier one.
    pub fn is_current(&self, node: &NodeName, session: SessionId) -> bool {
        self.sessions.get(node).is_some_and(|known| known.id == session)
    }

    /// The idempotency key of an agent's request (L15).
    pub fn ticket(&self, node: &NodeName, number: u64) -> Option<Ticket> {
        let session = self.sessions.get(node)?;
        Some(Ticket { agent_instance: session.agent_instance.as_str().into(), number })
    }

    /// A card that a node says it gave to a lease.
    pub fn given_card(&self, node: &NodeName, index: u32) -> GivenCard {
        let uuid = self.sessions.get(node).and_then(|session| session.card_uuids.get(&index));
        GivenCard::new(index, uuid.map(String::as_str).unwrap_or_default())
    }

    /// What the account may do. The tier's name is empty if none applies: then nothing is granted.
    pub fn policy(&self, account: &AccountSeen) -> Policy {
        let grants = self.grants.of(&account.name);
        let policy = policy::policy_of(account, policy::tier_of(account, &self.tiers), &grants);
        Policy { conflict: self.identities.conflict(account), ..policy }
    }

    /// The grants of every account that is named by any, whether it exists or not.
    pub fn grants(&self) -> impl Iterator<Item = (&AccountName, Vec<&GrantSeen>)> {
        self.grants.by_account()
    }

    /// The pool of a node: everything that depends on a pool asks here.
    ///
    /// # Errors
    /// [`NoPool`]: the defaults apply.
    pub fn pool(&self, node: &NodeName) -> Result<&PoolSeen, NoPool> {
        policy::pool_of(self.named_pools.get(node).map(String::as_str), &self.pools)
    }

    /// True if receipts of leases on this node are written while they run; that is the default.
    pub fn receipts_live(&self, node: &NodeName) -> bool {
        self.pool(node).map_or(true, |pool| pool.receipts_live)
    }

    /// The node whose pool, as its agent names it, an event changes; looked up before it is taken. An agent writes its
    /// GPUNode up to once a second, its pool hardly ever.
    pub fn moved(&self, event: &StoreEvent) -> Option<NodeName> {
        let (node, pool) = match event {
            StoreEvent::Node(NodeSeen { name, pool }) => (name, pool.as_ref()),
            StoreEvent::NodeGone { name } => (name, None),
            _ => return None,
        };
        (self.named_pools.get(node) != pool).then(|| node.clone())
    }

    /// True for a tier, a pool or a grant of which no more than the status has changed, which the operator itself writes
    /// ([`crate::status`]): whenever somebody joins a tier, every account would be looked at again for nothing.
    pub fn is_old_news(&self, event: &StoreEvent) -> bool {
        match event {
            StoreEvent::Tier(tier) => self.tiers.get(&tier.name) == Some(&**tier),
            StoreEvent::Pool(pool) => self.pools.get(&pool.name) == Some(&**pool),
            StoreEvent::Grant(grant) => self.grants.get(&grant.uid) == Some(grant),
            _ => false,
        }
    }

    /// Accounts that an event may change the policy of, looked up before it is taken.
    pub fn concerned(&self, event: &StoreEvent) -> Vec<AccountName> {
        match event {
            StoreEvent::Account(account) => {
                let known = self.accounts.get(&account.name);
                let mut concerned = known.map(|known| self.identities.sharing(known)).unwrap_or_default();
                concerned.extend(self.identities.sharing(account));
                concerned.into_iter().chain([account.name.clone()]).collect()
            }
            StoreEvent::Grant(grant) => vec![grant.account.clone()],
            StoreEvent::GrantGone { uid } => {
                self.grants.get(uid).map(|grant| grant.account.clone()).into_iter().collect()
            }
            StoreEvent::Tier(_) | StoreEvent::TierGone { .. } => self.accounts.keys().cloned().collect(),
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use spaceport_crds::{GPUTier, GPUTierSpec};

    use super::*;

    fn tier(concurrent_leases: i32) -> StoreEvent {
        let spec = GPUTierSpec { concurrent_leases, ..GPUTierSpec::default() };
        StoreEvent::Tier(Box::new(TierSeen::try_from(&GPUTier::new("free", spec)).unwrap()))
    }

    #[test]
    fn a_tier_of_which_only_the_status_was_written_is_old_news() {
        let mut known = Known::new(Duration::from_secs(5));
        assert!(!known.is_old_news(&tier(1)));
        known.store(tier(1));
        assert!(known.is_old_news(&tier(1)));
        assert!(!known.is_old_news(&tier(2)));
        assert!(!known.is_old_news(&StoreEvent::TierGone { name: "free".to_owned() }));
    }
}
