//! Calls: who pays, who was answered, and what is left of those who were not served.

use std::collections::BTreeMap;
use std::sync::Arc;

use spaceport_core::ids::{AccountName, Epoch, LeaseId, Steady, Ticket};
use spaceport_core::lease::{
    Account, Event, IdleWorker, Lease, ORDER_AGE_MAX_MS, Order, Outcome, PageChange, Place, Stage,
};
use spaceport_core::page::Hold;
use spaceport_core::protocol::{CallerClass, Denial, wire};
use spaceport_core::queue::{Lane, Waiting, WaitsFor};
use spaceport_core::quota::SHORTENED_MIN_MS;

use crate::coverage::Scenario;
use crate::violation::{Checked, Rule, Violation};
use crate::world::World;

/// Messages and page writes between one lease and the next take time that no promise counts.
const SLACK_MS: u64 = 1_000;

/// What the checks remember of calls.
#[derive(Default)]
pub struct CallsSeen {
    /// Outcomes that must be on the page of an account in the end, with the term that decided them.
    pub outcomes: Vec<(Epoch, AccountName, String)>,
    /// Requests that wait, with the world time at which they must be served at the latest, and their account.
    pub promised: BTreeMap<Ticket, Promise>,
    /// When each hold was decided, by its broker's clock of intervals; until its order leaves.
    pub decided: BTreeMap<LeaseId, Steady>,
}

/// What a waiting request was told.
#[derive(Clone, Debug)]
pub struct Promise {
    /// World time.
    pub latest: u64,
    /// Who waits.
    pub account: AccountName,
    /// In which Space.
    pub space: String,
}

/// Looks at what a command did.
///
/// # Errors
/// What must not be.
pub fn after(world: &mut World, number: u64, outcome: &Outcome) -> Checked {
    for event in &outcome.events {
        match event {
            Event::Denied { ticket, denial, caller, .. } => {
                worded(denial, *caller)?;
                evidence(world, number, outcome, ticket)?;
                world.seen_calls.promised.remove(ticket);
            }
            Event::Left { ticket, .. } => {
                evidence(world, number, outcome, ticket)?;
                world.seen_calls.promised.remove(ticket);
            }
            Event::Parked { waits_for: WaitsFor::Space, .. } => world.coverage.saw(Scenario::WaitedForSpace),
            Event::Reserved { waiting, lease, at, avoid, .. } => {
                world.seen_calls.decided.insert(lease.clone(), *at);
                if avoid.is_empty() && is_preferred(world, number, lease, waiting) {
                    world.coverage.saw(Scenario::PreferredForWorker);
                }
                let own =
                    |hold: &&Arc<Hold>| hold.cookie.as_ref().map(|window| &window.cookie) == waiting.cookie.as_ref();
                let full = |account: &Account| {
                    account.working.holds.iter().filter(own).count() >= account.policy.concurrent as usize
                };
                let payer = world.state(number).and_then(|state| state.accounts.get(&waiting.account));
                if payer.is_some_and(|account| full(account)) {
                    // Its other requests wait for their own account from now on.
                    world.seen_calls.promised.retain(|_, promise| promise.account != waiting.account);
                }
                if waiting.demand.shortened.is_some() {
                    world.coverage.saw(Scenario::Clamped);
                }
                if space_limit(world, number, &waiting.space.uid)? {
                    // The others of its Space wait for that.
                    world.seen_calls.promised.retain(|_, promise| promise.space != waiting.space.uid);
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Somebody waits on whose turn would have come before by key, and its own worker is kept (L16).
fn is_preferred(world: &World, number: u64, lease: &LeaseId, waiting: &Waiting) -> bool {
    let Some(state) = world.state(number) else { return false };
    let by_key = state.leases.get(lease).is_some_and(|lease| lease.lane == Some(Lane::Fast));
    let size = waiting.demand.size;
    let own = |idle: &IdleWorker| idle.worker.is_some() && idle.worker == waiting.worker && idle.size == size;
    let is_kept = state.nodes.get(&waiting.node).is_some_and(|node| node.idle.iter().any(own));
    let first = state.queue.lanes(&waiting.node).and_then(|lanes| lanes.get(lanes.first_of(size)?));
    let key = (waiting.turn.key, waiting.place);
    by_key && is_kept && first.is_some_and(|first| (first.key, first.place) < key)
}

/// L1: a broker lets no more leases of a Space begin than its owner chose, as far as it made them itself. True at the limit.
fn space_limit(world: &World, number: u64, uid: &str) -> Result<bool, Violation> {
    let (Some(state), Some(limit)) =
        (world.state(number), world.plan.chosen.get(uid).and_then(|chosen| chosen.concurrent))
    else {
        return Ok(false);
    };
    let of_space = |lease: &Lease| lease.space.as_deref() == Some(uid) && lease.stage < Stage::Settling;
    let open: Vec<&Lease> = state.leases().map(|(_, lease)| lease).filter(|lease| of_space(lease)).collect();
    let own = open.iter().filter(|lease| lease.request.is_some()).count();
    Rule::L(1).check(own <= limit as usize, || format!("{uid} has {own} leases of {limit}"))?;
    let counted = state.spaces.get(uid).map_or(0, |space| space.leases as usize);
    Rule::L(1)
        .check(counted == open.len(), || format!("{uid} has {} leases, and {counted} are counted", open.len()))?;
    Ok(open.len() >= limit as usize)
}

/// L18: a refusal for quota says when to try again, and that is not now.
fn worded(denial: &Denial, caller: CallerClass) -> Checked {
    if !matches!(denial, Denial::QuotaExceeded { .. } | Denial::PendingOverquota { .. }) {
        return Ok(());
    }
    let body: serde_json::Value = serde_json::from_slice(&wire(denial, caller).body).unwrap_or_default();
    let wait = body.get("wait").and_then(serde_json::Value::as_i64).unwrap_or_default();
    Rule::L(18).check(wait >= 1, || format!("{} waits {wait} s", denial.kind()))
}

/// Invariant 12: a request that dies leaves a row of its account, if it has one.
fn evidence(world: &mut World, number: u64, outcome: &Outcome, ticket: &Ticket) -> Checked {
    let id = format!("{}/{}", ticket.agent_instance, ticket.number);
    let Some(account) = world.clients.calls.get(ticket).and_then(|call| call.request.caller.clone().ok()) else {
        return Ok(());
    };
    // Of an account that is not there, or is going at this moment, there is no page to write on.
    let dropped = outcome.events.iter().any(|event| matches!(event, Event::AccountDropped { .. }));
    let epoch = world.state(number).filter(|state| state.accounts.contains_key(&account)).map(|state| state.epoch);
    let Some(epoch) = epoch.filter(|_| !dropped) else { return Ok(()) };
    // One that goes while its hold is on the way is answered by its lease's row instead.
    let is_row =
        |event: &Event| matches!(event, Event::Changed { change: PageChange::Outcome(row), .. } if row.id == id);
    let found = outcome.events.iter().any(is_row);
    Rule::Invariant(12).check(found, || format!("{id} died without a row on the page of {account}"))?;
    world.seen_calls.outcomes.push((epoch, account, id));
    Ok(())
}

/// An order leaves: invariant 10, who pays is who asked, for what was asked.
///
/// # Errors
/// What must not be.
pub fn ordered(world: &World, order: &Order) -> Checked {
    let lease = &order.lease;
    let Some(call) = world.clients.calls.get(&order.ticket) else {
        return Err(Rule::Invariant(10).broken(format!("{lease} was ordered for a call that nobody made")));
    };
    let payer = world.store.held_ever.get(lease);
    let asked = &call.request;
    let chosen = world.plan.chosen.get(&asked.space.uid).copied().unwrap_or_default();
    let shortened = (chosen.clamp_to_remaining || chosen.learned_reservation)
        && (SHORTENED_MIN_MS..asked.declared_ms).contains(&order.declared_ms);
    let same = payer == asked.caller.as_ref().ok()
        && (order.size, &order.node) == (asked.size, &asked.node)
        && (order.declared_ms == asked.declared_ms || shortened);
    Rule::Invariant(10).check(same, || format!("{lease} is paid by {payer:?} and was asked for by {:?}", asked.caller))
}

/// L9: an order leaves soon after its hold was decided, for a later leader counts on it when it gives the lease up.
///
/// # Errors
/// How late it is.
pub fn soon(world: &mut World, order: &Order, now: Steady) -> Checked {
    let Some(decided) = world.seen_calls.decided.remove(&order.lease) else { return Ok(()) };
    let age_ms = now.since(decided);
    let lease = &order.lease;
    Rule::L(9)
        .check(age_ms <= ORDER_AGE_MAX_MS, || format!("{lease} is ordered {age_ms} ms after its hold was decided"))
}

/// A request is told its place: invariant 11, where nothing goes wrong the latest start is kept. Not of requests that wait
/// for their own account, now or later: how long that takes nobody promises.
///
/// # Errors
/// See [`keeps_place`].
pub fn queued(world: &mut World, number: u64, place: &Place) -> Checked {
    keeps_place(world, number, place)?;
    promised(world, place);
    Ok(())
}

/// L17: what a request was told once is its place under every leader: so nobody who was ahead of somebody comes behind.
fn keeps_place(world: &mut World, number: u64, place: &Place) -> Checked {
    let Some(agent) = world.agents.get(&place.node) else { return Ok(()) };
    let session = world.brokers.get(&number).and_then(|broker| broker.sessions.get(&place.node));
    // An agent listens to nobody but its leader.
    if session.is_none_or(|session| agent.leader != Some(session.link)) {
        return Ok(());
    }
    let Some(told) = agent.tickets.get(&place.ticket).and_then(|asked| asked.told) else { return Ok(()) };
    let ((before, was), (epoch, is)) = (told.place, place.place);
    if world.state(number).is_some_and(|state| before < state.epoch) {
        world.coverage.saw(Scenario::PlaceKept);
    }
    Rule::L(17).check(told.place == place.place, || {
        let request = place.ticket.number;
        format!("request {request} had place {was} of epoch {}, and is told {is} of epoch {}", before.0, epoch.0)
    })
}

fn promised(world: &mut World, place: &Place) {
    let Some(call) = world.clients.calls.get(&place.ticket) else { return };
    let (Ok(account), space) = (call.request.caller.clone(), call.request.space.uid.clone()) else { return };
    let Some(latest_start_ms) = place.latest_start_ms else {
        world.seen_calls.promised.remove(&place.ticket);
        world.seen_calls.promised.retain(|_, promise| promise.account != account);
        return;
    };
    let promise = Promise { latest: world.now + latest_start_ms, account, space };
    world.seen_calls.promised.entry(place.ticket.clone()).or_insert(promise);
}

/// Invariant 11: nobody waits beyond the latest start that was promised.
///
/// # Errors
/// Who does.
pub fn on_time(world: &World) -> Checked {
    match world.seen_calls.promised.iter().find(|(_, promise)| promise.latest + SLACK_MS < world.now) {
        Some((ticket, promise)) if world.plan.weather.is_calm() => {
            let number = ticket.number;
            let late_ms = world.now - promise.latest;
            Err(Rule::Invariant(11).broken(format!("request {number} waits {late_ms} ms beyond its latest start")))
        }
        _ => Ok(()),
    }
}
