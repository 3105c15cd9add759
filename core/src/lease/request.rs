//! Requests: the checks on arrival (docs/rules.md, Admission), leaving, refusals, and what is told to those who wait.

use std::sync::Arc;

use super::Moment;
use super::change::PageChange;
use super::command::{Budget, Request};
use super::event::Event;
use super::mutant::Mutant;
use super::promise;
use super::state::{Account, Stage, State};
use crate::ids::{AccountName, IdSeed, LeaseId, LedgerTime, NodeName, Size, SpaceKey, Ticket};
use crate::page::{DenialRow, Outcome};
use crate::protocol::{CallerClass, Denial, QueueOf, UnauthenticatedReason, human_message};
use crate::queue::{Function, Turn, Waiting, WaitsFor};
use crate::quota::{self, Demand};
use crate::slots;

/// Orders for one request that a node may refuse, or a store may not take, before it is told PlatformFault. A first order
/// can meet a node that changed a moment ago; a third one that fails has another reason.
pub const ATTEMPTS_MAX: u32 = 3;

/// Root tokens whose budget is remembered at once: some megabytes. More live calls than that are no honest load.
const ROOTS_MAX: usize = 65_536;

/// A refusal, with all that has to be remembered of it.
pub(super) struct Refusal<'a> {
    pub ticket: &'a Ticket,
    pub node: &'a NodeName,
    pub space: &'a SpaceKey,
    pub account: Option<&'a AccountName>,
    pub boundary: &'static str,
}

pub(super) fn request(at: Moment, state: &State, request: Request) -> Vec<Event> {
    if let Some(known) = known(state, &request.ticket) {
        return known;
    }
    let refusal = Refusal {
        ticket: &request.ticket,
        node: &request.node,
        space: &request.space,
        account: request.caller.as_ref().ok(),
        boundary: "Requested",
    };
    match check(at, state, &request) {
        Err(denial) => refusal.events(at, state, denial),
        Ok((account, name, demand)) => {
            let turn = turn(at, state, account, &request, &demand);
            let blocked = account.is_blocked(state.page_of(account), at.steady);
            let mut events = Vec::new();
            if let Some(budget) = &request.budget {
                let (root, expires) = (budget.root.clone(), budget.expires);
                events.push(Event::BudgetTaken { root, calls: 1, ms: demand.needed_ms(), expires });
            }
            events.push(Event::Queued(Arc::new(Waiting {
                ticket: request.ticket,
                place: state.next_place,
                node: request.node,
                account: name,
                space: request.space,
                demand,
                turn,
                caller: account.policy.caller,
                via: if request.budget.is_some() { "token" } else { "space" }.into(),
                root: request.budget.map(|budget| budget.root),
                since: at.wall,
                arrived: at.steady,
                attempts: 0,
                told: None,
                promise: None,
                waits_for: if blocked { WaitsFor::Account } else { WaitsFor::Node },
                lease: None,
                unconfirmed: None,
            })));
            events
        }
    }
}

/// L15: the ticket is the idempotency key. None if it waits for nothing: it is new, or its lease was given up before its
/// agent heard of it.
fn known(state: &State, ticket: &Ticket) -> Option<Vec<Event>> {
    let waits = state.queue.get(ticket).is_some() || lease_of(state, ticket).is_some();
    waits.then(|| vec![Event::Confirmed { ticket: ticket.clone() }])
}

fn lease_of<'a>(state: &'a State, ticket: &Ticket) -> Option<&'a LeaseId> {
    let lease = state.tickets.get(ticket)?;
    let found = state.leases.get(lease)?;
    (found.stage < Stage::Settling).then_some(lease)
}

/// What decides when it is its turn.
fn turn(at: Moment, state: &State, account: &Account, request: &Request, demand: &Demand) -> Turn {
    let settings = state.settings(&request.node);
    let function =
        Function { space_uid: request.space.uid.clone(), size: demand.size, declared_ms: demand.declared_ms };
    let expected_ms = state.history.expected_ms(&function);
    let page = state.page_of(account);
    let standing = page.standing(&account.policy.allowance, page.time(at.wall));
    let used_ms = standing.limit_ms.saturating_sub(standing.left_ms);
    let class = account.policy.priority;
    Turn {
        class,
        key: settings.lanes.key(class, expected_ms, demand.weight, used_ms, standing.limit_ms),
        expected_ms,
        held_ms: settings.limits.held_ms(demand.declared_ms),
        slots: slots_of(state, &request.node, demand.size),
    }
}

/// How many slots of the node's cards a lease takes.
pub(super) fn slots_of(state: &State, node: &NodeName, size: Size) -> u64 {
    let cards = state.nodes.get(node).map(|node| node.cards.as_slice()).unwrap_or_default();
    match size {
        Size::Large => 1,
        Size::Xlarge => cards.iter().map(|card| u64::from(card.large_slots)).max().unwrap_or(1),
    }
}

fn check<'a>(at: Moment, state: &'a State, request: &Request) -> Result<(&'a Account, AccountName, Demand), Denial> {
    if let Some(ms) = state.clock_off_ms {
        return Err(Denial::ClockSkew { ms });
    }
    let unauthenticated = |reason| Denial::Unauthenticated { reason };
    let name = request.caller.clone().map_err(unauthenticated)?;
    let account = state.accounts.get(&name).ok_or(unauthenticated(UnauthenticatedReason::UnknownAccount))?;
    if account.policy.deleting {
        return Err(Denial::AccountDeleting);
    }
    let settings = state.settings(&request.node);
    let demand = Demand {
        size: request.size,
        weight: settings.weight(request.size),
        declared_ms: request.declared_ms,
        duration_factor_percent: settings.duration_factor_percent,
    };
    let page = state.page_of(account);
    let time = page.time(at.wall);
    quota::check_legal(page, &account.policy.allowance, time, &demand)?;
    if let Some(budget) = &request.budget {
        check_budget(state, budget, demand.needed_ms())?;
    }
    // Fast refusal: what the account has waiting counts as taken, but nothing is reserved for it.
    let queued_ms = state.queue.needed_ms(&name);
    let frees_in_ms = frees_in_ms(state, account, time);
    quota::admit(page, &account.policy.allowance, time, &demand, queued_ms, frees_in_ms)?;
    let node = state.nodes.get(&request.node).filter(|node| node.joined);
    if node.is_some_and(|node| !slots::possible(&node.cards, request.size)) {
        return Err(Denial::NoCapacity { size: request.size });
    }
    match state.queue.full(&request.node, &request.space, &name, &settings.queue) {
        Some((QueueOf::Account, _)) if account.is_blocked(page, at.steady) => {
            Err(Denial::ConcurrencyExceeded { limit: u64::from(account.policy.concurrent) })
        }
        Some((of, bound)) => Err(Denial::QueueFull { bound, of }),
        None => Ok((account, name, demand)),
    }
}

/// Invariant 10: a Space can spend its caller's quota only within the budget of the call.
fn check_budget(state: &State, budget: &Budget, needed_ms: u64) -> Result<(), Denial> {
    if state.has(Mutant::BudgetIgnored) {
        return Ok(());
    }
    let exhausted = Err(Denial::Unauthenticated { reason: UnauthenticatedReason::Exhausted });
    match state.roots.get(&budget.root) {
        None if state.roots.len() >= ROOTS_MAX => Err(Denial::QueueFull { bound: ROOTS_MAX as u64, of: QueueOf::Pool }),
        None if budget.max_calls < 1 || needed_ms > budget.max_ms => exhausted,
        Some(used) if used.calls >= budget.max_calls || used.ms.saturating_add(needed_ms) > budget.max_ms => exhausted,
        None | Some(_) => Ok(()),
    }
}

/// When the first of the account's reservations ends at the latest.
pub(super) fn frees_in_ms(state: &State, account: &Account, time: LedgerTime) -> u64 {
    let holds = state.page_of(account).holds.iter();
    holds
        .map(|hold| hold.since.plus(state.limits_of(&hold.lease, &hold.node).held_ms(hold.declared_ms)).since(time))
        .min()
        .unwrap_or_default()
}

pub(super) fn dequeue(at: Moment, state: &State, ticket: &Ticket) -> Vec<Event> {
    if let Some(waiting) = state.queue.get(ticket) {
        return left(at, state, waiting, "the visitor left while waiting");
    }
    // Its order is on its way; the node refuses it, or the hold is voided when it is durable.
    lease_of(state, ticket).map(|lease| Event::Abandoned { lease: lease.clone() }).into_iter().collect()
}

/// A request goes without a lease and without a refusal.
pub(super) fn left(at: Moment, state: &State, waiting: &Waiting, why: &str) -> Vec<Event> {
    let mut events = vec![Event::Left { ticket: waiting.ticket.clone() }];
    events.extend(give_back(waiting, waiting.demand.needed_ms(), true));
    let waited_ms = at.steady.since(waiting.arrived);
    let message = format!("{why}, after {}.{:03} s", waited_ms / 1000, waited_ms % 1000);
    events.extend(outcome(at, state, &waiting.account, &waiting.ticket, "CallerGone", "Queued", message));
    events
}

/// Returns to a call's budget what it did not use.
pub(super) fn give_back(waiting: &Waiting, ms: u64, call: bool) -> Option<Event> {
    let root = waiting.root.clone()?;
    Some(Event::BudgetReturned { root, calls: u64::from(call), ms })
}

/// The request returns to its place, unless it can not be served any more.
pub(super) fn again(at: Moment, state: &State, waiting: &Waiting, wanted: bool) -> Vec<Event> {
    let attempts = waiting.attempts.saturating_add(1);
    let waiting = Waiting { attempts, told: None, lease: None, waits_for: WaitsFor::Node, ..waiting.clone() };
    if !wanted || waiting.unconfirmed.is_some_and(|confirm_by| confirm_by <= at.steady) {
        return left(at, state, &waiting, "the visitor left before the GPU was ready");
    }
    if waiting.attempts >= ATTEMPTS_MAX {
        let mut events: Vec<Event> = give_back(&waiting, waiting.demand.needed_ms(), true).into_iter().collect();
        events.extend(Refusal::of(&waiting).events(at, state, Denial::PlatformFault));
        return events;
    }
    if state.has(Mutant::ForgetsReturned) {
        return Vec::new();
    }
    vec![Event::Queued(Arc::new(waiting))]
}

fn outcome(
    at: Moment,
    state: &State,
    account: &AccountName,
    ticket: &Ticket,
    kind: &str,
    boundary: &str,
    message: String,
) -> Option<Event> {
    let found = state.accounts.get(account).filter(|_| !state.has(Mutant::NoOutcome))?;
    let outcome = Outcome {
        id: format!("{}/{}", ticket.agent_instance, ticket.number),
        kind: kind.to_owned(),
        boundary: boundary.to_owned(),
        message,
        at: found.working.time(at.wall),
    };
    Some(Event::Changed { account: account.clone(), change: PageChange::Outcome(Arc::new(outcome)), at: at.steady })
}

impl<'a> Refusal<'a> {
    /// Of a request that waited.
    pub fn of(waiting: &'a Waiting) -> Self {
        Self {
            ticket: &waiting.ticket,
            node: &waiting.node,
            space: &waiting.space,
            account: Some(&waiting.account),
            boundary: "Queued",
        }
    }

    /// The answer, and the rows that explain it later (invariant 12).
    pub fn events(&self, at: Moment, state: &State, denial: Denial) -> Vec<Event> {
        let found = self.account.and_then(|name| Some((name, state.accounts.get(name)?)));
        let caller = found.map_or(CallerClass::Guest, |(_, account)| account.policy.caller);
        let (ticket, node) = (self.ticket.clone(), self.node.clone());
        let mut events = vec![Event::Denied { ticket, node, caller, denial: denial.clone() }];
        if let Some((name, account)) = found {
            let row = DenialRow { denial, space: self.space.clone(), at: account.working.time(at.wall) };
            let (kind, message) = (row.denial.kind(), human_message(&row.denial));
            let change = PageChange::Denied(Arc::new(row));
            events.push(Event::Changed { account: name.clone(), change, at: at.steady });
            events.extend(outcome(at, state, name, self.ticket, kind, self.boundary, message));
        }
        events
    }
}

/// Those who wait and have not been told so, or for what.
pub(super) fn announce(at: Moment, ids: &mut IdSeed, state: &State) -> Vec<Event> {
    let mut announce = |waiting: &Waiting| {
        let lease = waiting.lease.clone().unwrap_or_else(|| LeaseId::new(ids.draw()));
        let promise = match waiting.waits_for {
            // Told once, it stays: a request that returns to its place keeps what it was promised.
            WaitsFor::Node => Some(waiting.promise.unwrap_or_else(|| promise::promise(at.steady, state, waiting))),
            WaitsFor::Account => None,
        };
        Event::Announced { ticket: waiting.ticket.clone(), lease, at: at.steady, promise }
    };
    state.queue.untold().map(&mut announce).collect()
}
