//! Requests: the checks on arrival (docs/rules.md, Admission), leaving, refusals, and what is told to those who wait.

use std::sync::Arc;

use super::Moment;
use super::change::PageChange;
use super::command::{NodeSettings, Request};
use super::event::{Departure, Event};
use super::mutant::Mutant;
use super::promise;
use super::state::{Account, Stage, State};
use crate::ids::{AccountName, CookieId, IdSeed, LeaseId, LedgerTime, NodeName, Size, SpaceKey, Ticket};
use crate::page::{Budget, DenialRow, Hold, Outcome, Page, ShortenedBy, Taken};
use crate::protocol::{CallerClass, Denial, LegalDurations, QueueOf, UnauthenticatedReason, human_message};
use crate::queue::{Function, Promise, Promised, QueueBounds, Turn, Waiting, WaitsFor, place_of};
use crate::quota::{self, Demand, FreesIn, Payer, Queued};
use crate::slots;

/// Orders for one request that a node may refuse, or a store may not take, before it is told PlatformFault. A first order
/// can meet a node that changed a moment ago; a third one that fails has another reason.
pub const ATTEMPTS_MAX: u32 = 3;

/// Requests that are told in one step what they wait for. More at once would be more messages than an agent's session takes,
/// and a step that others wait for; who is left is told in the next one, at the latest at the next tick.
pub const ANNOUNCED_MAX: usize = 128;

/// A refusal, with all that has to be remembered of it.
pub(super) struct Refusal<'a> {
    pub ticket: &'a Ticket,
    pub node: &'a NodeName,
    pub space: &'a SpaceKey,
    pub account: Option<&'a AccountName>,
    pub boundary: &'static str,
}

pub(super) fn request(at: Moment, state: &State, request: Request) -> Vec<Event> {
    if !state.joined(&request.node) {
        // It left for an earlier term of ours, or its session is gone. What its agent has waiting comes behind Joined, with
        // the places that it was told since (L17).
        return Vec::new();
    }
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
    let place = presented_place(state, &request);
    match check(at, state, &request, place.is_some()) {
        Err(denial) => refusal.events(at, state, denial),
        Ok((account, name, demand)) => {
            let turn = turn(at, state, account, &request, &demand);
            let waits_for = match () {
                () if account.is_blocked(state.page_of(account), request.cookie.as_ref(), at.steady) => {
                    WaitsFor::Account
                }
                () if state.is_space_full(&request.space.uid) => WaitsFor::Space,
                () => WaitsFor::Node,
            };
            let mut events = Vec::new();
            let promised = request.presented.filter(|_| place.is_some()).and_then(|presented| presented.promised);
            if let Some(over) = promised.filter(Promised::is_over) {
                let (ticket, node) = (request.ticket.clone(), request.node.clone());
                let (waited_ms, promised_ms) = (over.ago_ms, over.wait_ms);
                events.push(Event::PromiseOver { ticket, node, waited_ms, promised_ms });
            }
            let kept = promised.filter(|promised| !promised.is_over() && waits_for == WaitsFor::Node);
            events.push(Event::Queued(Arc::new(Waiting {
                ticket: request.ticket,
                place: place.unwrap_or(state.next_place),
                node: request.node,
                account: name,
                space: request.space,
                revision: request.revision,
                worker: request.worker,
                demand,
                turn,
                caller: account.policy.caller,
                via: match (&request.cookie, &request.budget) {
                    (Some(_), _) => "guest",
                    (None, Some(_)) => "token",
                    (None, None) => "space",
                }
                .into(),
                cookie: request.cookie,
                budget: request.budget,
                since: at.wall,
                arrived: at.steady,
                attempts: 0,
                told: None,
                promise: kept.map(|promised| Promise::presented(at.steady, &promised)),
                waits_for,
                lease: None,
                unconfirmed: None,
            })));
            events
        }
    }
}

/// L17: the place that the request presents, if it was told to somebody and is nobody else's now. Any other number would be
/// the agent's invention.
fn presented_place(state: &State, request: &Request) -> Option<u64> {
    let presented = request.presented.filter(|presented| presented.number > 0 && !state.has(Mutant::ForgetsPlaces))?;
    let place = place_of(presented.epoch, presented.number);
    let is_others = |of: &Arc<Waiting>| of.place == place && of.ticket != request.ticket;
    let is_taken = state.queue.at(&request.node, place).is_some_and(is_others)
        || state.leases_on(&request.node).any(|(_, lease)| lease.request.as_ref().is_some_and(is_others));
    (place < state.next_place && !is_taken).then_some(place)
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
    let expected_ms = state.history.expected_ms(&function(request, demand)).min(demand.declared_ms);
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

/// What the calls like it are known by.
fn function(request: &Request, demand: &Demand) -> Function {
    Function {
        space_uid: request.space.uid.clone(),
        revision: request.revision,
        size: demand.size,
        declared_ms: demand.asked_ms(),
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

/// `placed`: it waited before a fail-over, and was within these bounds then. Whoever came later and was faster to reach the
/// new leader does not push it out; that the node's queue has its bound is enough to keep all of them bounded.
fn check<'a>(
    at: Moment,
    state: &'a State,
    request: &Request,
    placed: bool,
) -> Result<(&'a Account, AccountName, Demand), Denial> {
    if let Some(ms) = state.clock_off_ms {
        return Err(Denial::ClockSkew { ms });
    }
    let unauthenticated = |reason| Denial::Unauthenticated { reason };
    let name = request.caller.clone().map_err(unauthenticated)?;
    let account = state.accounts.get(&name).ok_or(unauthenticated(UnauthenticatedReason::UnknownAccount))?;
    if account.policy.deleting {
        return Err(Denial::AccountDeleting);
    }
    if account.policy.conflict.is_some() {
        return Err(unauthenticated(UnauthenticatedReason::IdentityConflict));
    }
    let settings = state.settings(&request.node);
    let demand = Demand {
        size: request.size,
        weight: if state.has(Mutant::WeightIgnored) { 1 } else { settings.weight(request.size) },
        declared_ms: request.declared_ms,
        duration_factor_percent: settings.duration_factor_percent,
        shortened: None,
    };
    let page = state.page_of(account);
    let time = page.time(at.wall);
    let allowance = state.allowance_of(account);
    let payer = Payer { page, allowance: &allowance, cookie: request.cookie.as_ref(), at: time };
    // Fast refusal: what the account has waiting counts as taken, but nothing is reserved for it.
    let queued = if placed { Queued::default() } else { state.queue.needed(&name, request.cookie.as_ref()) };
    let demand = shorten(state, request, payer, demand, queued);
    let explained = |denial| explained(settings, &account.policy.tier, payer, &demand, denial);
    quota::check_legal(payer, &demand).map_err(explained)?;
    if let Some(budget) = &request.budget {
        // By the page's time (L20), as its row was kept: by a clock behind it the token could be worth something yet.
        if budget.expires <= time {
            return Err(unauthenticated(UnauthenticatedReason::Expired));
        }
        let waiting = state.queue.taken_of_budget(&name, &budget.root);
        check_budget(state, page, budget, waiting, demand.needed_ms())?;
    }
    let frees_in = frees_in(state, account, request.cookie.as_ref(), time);
    quota::admit(payer, &demand, queued, frees_in).map_err(explained)?;
    let node = state.nodes.get(&request.node);
    if node.is_some_and(|node| !slots::possible(&node.cards, request.size)) {
        return Err(Denial::NoCapacity { size: request.size });
    }
    let unbounded = QueueBounds { space: usize::MAX, account: usize::MAX, ..settings.queue };
    let bounds = if placed { unbounded } else { settings.queue };
    match state.queue.full(&request.node, &request.space, &name, &bounds) {
        Some((QueueOf::Account, _)) if account.is_blocked(page, request.cookie.as_ref(), at.steady) => {
            Err(Denial::ConcurrencyExceeded { limit: u64::from(account.policy.concurrent), of: QueueOf::Account })
        }
        Some((QueueOf::Space, _)) if state.is_space_full(&request.space.uid) => {
            let limit = u64::from(state.space_settings(&request.space.uid).concurrent.unwrap_or_default());
            Err(Denial::ConcurrencyExceeded { limit, of: QueueOf::Space })
        }
        Some((of, bound)) => Err(Denial::QueueFull { bound, of }),
        None => Ok((account, name, demand)),
    }
}

/// What the call is given of what it declares, as its Space has chosen.
fn shorten(state: &State, request: &Request, payer: Payer<'_>, demand: Demand, queued: Queued) -> Demand {
    let chosen = state.space_settings(&request.space.uid);
    let learned =
        if chosen.learned_reservation { state.history.suggested_ms(&function(request, &demand)) } else { None };
    let demand = match learned {
        Some(ms) => demand.shortened_to(ms, ShortenedBy::LearnedDuration),
        None => demand,
    };
    if chosen.clamp_to_remaining { quota::clamp(payer, demand, queued) } else { demand }
}

/// A refusal of a duration with what would be legal, for each size (requirement A14).
pub(super) fn explained(
    settings: NodeSettings,
    tier: &str,
    payer: Payer<'_>,
    demand: &Demand,
    denial: Denial,
) -> Denial {
    let Denial::IllegalDuration { declared_ms, limit_ms, what, .. } = denial else { return denial };
    let longest = |size| {
        let of_size = Demand { size, weight: settings.weight(size), ..*demand };
        quota::longest_legal_ms(payer, &of_size)
    };
    let legal = Box::new(LegalDurations {
        tier: tier.to_owned(),
        size: demand.size,
        large_ms: longest(Size::Large),
        xlarge_ms: longest(Size::Xlarge),
    });
    Denial::IllegalDuration { declared_ms, limit_ms, what, legal: Some(legal) }
}

/// Invariant 10: a Space can spend its caller's quota only within the budget of the call. What was taken of it is on the
/// page, so that the next leader knows it; what waits counts as taken.
fn check_budget(state: &State, page: &Page, budget: &Budget, waiting: Taken, needed_ms: u64) -> Result<(), Denial> {
    let taken = match () {
        () if state.has(Mutant::BudgetIgnored) => return Ok(()),
        () if state.has(Mutant::BudgetForgotten) => page.held_of_budget(&budget.root),
        () => page.taken_of_budget(&budget.root),
    };
    if page.remembers(budget) && budget.has(taken.and(waiting), Taken { calls: 1, ms: needed_ms }) {
        return Ok(());
    }
    Err(Denial::Unauthenticated { reason: UnauthenticatedReason::Exhausted })
}

/// The same when it has its turn: a hold of another leader may have become known meanwhile.
pub(super) fn check_turn(state: &State, page: &Page, waiting: &Waiting, needed_ms: u64) -> Result<(), Denial> {
    let Some(budget) = &waiting.budget else { return Ok(()) };
    let known = Taken { calls: 1, ms: needed_ms };
    if state.has(Mutant::BudgetIgnored)
        || state.has(Mutant::BudgetForgotten)
        || budget.has(page.taken_of_budget(&budget.root), known)
    {
        return Ok(());
    }
    Err(Denial::Unauthenticated { reason: UnauthenticatedReason::Exhausted })
}

/// When the first of the account's reservations ends at the latest, and the first of the visitor's on a guest page.
pub(super) fn frees_in(state: &State, account: &Account, cookie: Option<&CookieId>, time: LedgerTime) -> FreesIn {
    let holds = &state.page_of(account).holds;
    let left_ms = |hold: &Arc<Hold>| {
        hold.since.plus(state.limits_of(&hold.lease, &hold.node).held_ms(hold.declared_ms)).since(time)
    };
    let is_own = |hold: &&Arc<Hold>| hold.cookie.as_ref().map(|window| &window.cookie) == cookie;
    FreesIn {
        account_ms: holds.iter().map(left_ms).min().unwrap_or_default(),
        cookie_ms: holds.iter().filter(is_own).map(left_ms).min().unwrap_or_default(),
    }
}

pub(super) fn dequeue(at: Moment, state: &State, ticket: &Ticket) -> Vec<Event> {
    if let Some(waiting) = state.queue.get(ticket) {
        return left(at, state, waiting, Departure::CallerGone);
    }
    // Its order is on its way; the node refuses it, or the hold is voided when it is durable.
    lease_of(state, ticket).map(|lease| Event::Abandoned { lease: lease.clone() }).into_iter().collect()
}

/// A request goes without a lease and without a refusal.
pub(super) fn left(at: Moment, state: &State, waiting: &Waiting, why: Departure) -> Vec<Event> {
    let mut events = vec![Event::Left { ticket: waiting.ticket.clone(), why }];
    let waited_ms = at.steady.since(waiting.arrived);
    let message = format!("{}, after {}.{:03} s", why.words(), waited_ms / 1000, waited_ms % 1000);
    events.extend(outcome(at, state, &waiting.account, &waiting.ticket, why.as_str(), "Queued", message));
    events
}

/// The request returns to its place, unless it can not be served any more.
pub(super) fn again(at: Moment, state: &State, waiting: &Waiting, wanted: bool) -> Vec<Event> {
    let attempts = waiting.attempts.saturating_add(1);
    let waiting = Waiting { attempts, told: None, lease: None, waits_for: WaitsFor::Node, ..waiting.clone() };
    if !wanted {
        let agent = state.nodes.get(&waiting.node).map(|node| node.agent_instance.as_str());
        let restarted = agent.is_some_and(|agent| *agent != *waiting.ticket.agent_instance);
        return left(at, state, &waiting, if restarted { Departure::AgentRestarted } else { Departure::CallerGone });
    }
    if waiting.unconfirmed.is_some_and(|confirm_by| confirm_by <= at.steady) {
        return left(at, state, &waiting, Departure::NotPresented);
    }
    if waiting.attempts >= ATTEMPTS_MAX {
        return Refusal::of(&waiting).events(at, state, Denial::PlatformFault);
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
            WaitsFor::Account | WaitsFor::Space => None,
        };
        Event::Announced { ticket: waiting.ticket.clone(), lease, at: at.steady, promise }
    };
    state.queue.untold().take(ANNOUNCED_MAX).map(&mut announce).collect()
}
