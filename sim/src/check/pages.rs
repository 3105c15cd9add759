//! Every page that is written, against the page before it.

use std::sync::Arc;

use spaceport_core::ids::{AccountName, LedgerTime};
use spaceport_core::page::{Closed, CookieRow, CookieWindow, Ending, Hold, Page, Source};
use spaceport_core::quota::fill;

use crate::coverage::{Coverage, Scenario};
use crate::store::Store;
use crate::violation::{Checked, Rule};

/// Looks at a write, and remembers what it holds and settles.
///
/// # Errors
/// What the page must not say.
pub fn audit(store: &mut Store, account: &AccountName, old: &Page, new: &Page, coverage: &mut Coverage) -> Checked {
    Rule::L(5).check(new.seq == old.seq + 1, || format!("seq {} after {}", new.seq, old.seq))?;
    Rule::L(20).check(new.last_time >= old.last_time, || "ledger time went back".to_owned())?;
    admitted(store, account, old, new)?;
    for hold in &old.holds {
        let kept = new.holds.iter().any(|open| open.lease == hold.lease);
        let closed = new.closed.iter().any(|closed| closed.hold.lease == hold.lease);
        Rule::Invariant(3).check(kept != closed, || format!("{} is held {kept} and settled {closed}", hold.lease))?;
    }
    let mut charged_ms = 0;
    for closed in &new.closed {
        let lease = &closed.hold.lease;
        if old.closed.iter().any(|known| known.hold.lease == *lease) {
            continue;
        }
        let open = old.holds.iter().any(|hold| hold.lease == *lease) && !store.settled.contains_key(lease);
        Rule::Invariant(3).check(open, || format!("{lease} is settled without an open hold"))?;
        charge(closed)?;
        charged_ms += closed.charged_ms;
        cover_settled(old, closed, coverage);
        store.spend(account, closed);
        store.settle(closed, coverage);
    }
    budgets(store, account, old, new)?;
    outbox(store, old, new)?;
    rows(store, old, new)?;
    cover(old, new, coverage);
    sums(old, new, charged_ms)?;
    // Last, so that what breaks a rule of its own is seen as that.
    new.sound().map_err(|unsound| Rule::L(1).broken(format!("{account}'s page: {unsound}")))
}

/// Invariant 1, at the revision that admits, and 3: no lease twice.
fn admitted(store: &mut Store, account: &AccountName, old: &Page, new: &Page) -> Checked {
    for hold in &new.holds {
        let lease = &hold.lease;
        let settled = store.settled.contains_key(lease);
        Rule::Invariant(3).check(!settled, || format!("{lease} is held after it was settled"))?;
        if old.holds.iter().any(|known| known.lease == *lease) {
            continue;
        }
        let first = store.held_ever.insert(lease.clone(), account.clone()).is_none();
        if new.epoch < store.term.0 {
            store.late_holds.insert(lease.clone());
        }
        Rule::Invariant(3).check(first, || format!("{lease} is held a second time"))?;
        for part in hold.parts.iter().filter(|part| part.ms > 0) {
            source(new, &part.source)?;
        }
        visitor(account, new, hold)?;
        if let Some(Source::Window(start)) = hold.parts.first().map(|part| &part.source) {
            within_tier(store, account, new, *start)?;
        }
        let ms: u64 = hold.parts.iter().map(|part| part.ms).sum();
        // Every pool here has the chart's weights.
        let (size, weight, due) = (hold.size, hold.weight, hold.size.weight());
        Rule::Invariant(5).check(weight == due, || format!("{lease} is {size:?} and weighs {weight}, not {due}"))?;
        let whole = weight * hold.declared_ms;
        Rule::Invariant(1).check(ms == whole, || format!("{lease} has reserved {ms} of {whole} ms"))?;
    }
    Ok(())
}

/// Invariant 10, over all terms: calls of one token take no more than it is worth, by what was charged for it and not by what
/// the page says of that.
fn budgets(store: &Store, account: &AccountName, old: &Page, new: &Page) -> Checked {
    let is_new = |hold: &&Arc<Hold>| !old.holds.iter().any(|known| known.lease == hold.lease);
    for budget in new.holds.iter().filter(is_new).filter_map(|hold| hold.budget.as_ref()) {
        let is_of = |hold: &Hold| hold.budget.as_ref().is_some_and(|other| other.root == budget.root);
        let spent = store.spent.get(&(account.clone(), budget.root.clone())).copied().unwrap_or_default();
        let held = new.holds.iter().filter(|hold| is_of(hold)).map(|hold| hold.weight * hold.declared_ms);
        let (calls, ms) = held.fold(spent, |(calls, ms), held_ms| (calls + 1, ms + held_ms));
        let (root, max_calls, max_ms) = (&budget.root, budget.max_calls, budget.max_ms);
        Rule::Invariant(10).check(calls <= max_calls && ms <= max_ms, || {
            format!("{root} has {calls} calls of {max_calls} and {ms} ms of {max_ms} ms")
        })?;
    }
    Ok(())
}

/// L1 and invariant 1: a hold of a guest counts in the row of its visitor as well, and nobody else's does.
fn visitor(account: &AccountName, page: &Page, hold: &Hold) -> Checked {
    let lease = &hold.lease;
    Rule::L(1).check(hold.cookie.is_some() == account.is_guests(), || format!("{lease} is of {:?}", hold.cookie))?;
    let Some(window) = &hold.cookie else { return Ok(()) };
    let row = page.cookies.iter().find(|row| row.is_of(window));
    let row = row.ok_or_else(|| Rule::L(12).broken(format!("{lease} has no row of its visitor")))?;
    let of_row = page.holds.iter().filter(|hold| hold.cookie.as_ref() == Some(window));
    let reserved_ms: u64 = of_row.flat_map(|hold| &hold.parts).map(|part| part.ms).sum();
    let (charged_ms, base_ms) = (row.charged_ms, row.base_ms);
    let fits = charged_ms + reserved_ms <= base_ms;
    Rule::Invariant(1).check(fits, || format!("{} has {charged_ms} + {reserved_ms} of {base_ms} ms", window.cookie))
}

/// Invariant 1, by what the tier ever gave and not by what the page says of it: of an address prefix all its visitors
/// together.
fn within_tier(store: &Store, account: &AccountName, page: &Page, start: LedgerTime) -> Checked {
    let Some(window) = page.windows.iter().find(|window| window.start == start) else { return Ok(()) };
    let taken_ms = window.charged_ms + page.reserved_ms(&Source::Window(start));
    let most_ms = store.highest_base_ms.get(account).copied().unwrap_or_default();
    Rule::Invariant(1).check(taken_ms <= most_ms, || {
        format!("{account} has taken {taken_ms} ms of the {most_ms} ms its tier ever gave")
    })
}

fn source(page: &Page, source: &Source) -> Checked {
    let found = match source {
        Source::Window(start) => {
            let window = page.windows.iter().find(|window| window.start == *start);
            window.map(|window| (window.base_ms, window.charged_ms))
        }
        Source::Grant(uid) => page.grants.iter().find(|row| row.uid == *uid).map(|row| (row.ms, row.used_ms)),
    };
    let (limit_ms, charged_ms) = found.ok_or_else(|| Rule::L(12).broken(format!("{source:?} is not on the page")))?;
    let reserved_ms = page.reserved_ms(source);
    let fits = charged_ms + reserved_ms <= limit_ms;
    Rule::Invariant(1).check(fits, || format!("{source:?} has {charged_ms} + {reserved_ms} of {limit_ms} ms"))
}

/// Invariants 4 and 5.
fn charge(closed: &Closed) -> Checked {
    let (hold, lease) = (&closed.hold, &closed.hold.lease);
    let bound_ms = hold.weight * closed.used_ms.min(hold.declared_ms);
    let charged_ms = closed.charged_ms;
    if is_free(closed.ending) {
        let ending = closed.ending;
        return Rule::Invariant(4)
            .check(charged_ms == 0, || format!("{lease} ended {ending:?} and pays {charged_ms} ms"));
    }
    Rule::Invariant(5)
        .check(charged_ms == bound_ms, || format!("{lease} pays {charged_ms} ms instead of {bound_ms} ms"))
}

/// Endings that cost nothing.
pub const fn is_free(ending: Ending) -> bool {
    match ending {
        Ending::Released | Ending::Failed | Ending::WorkerDied | Ending::Deadline | Ending::Cancelled => false,
        Ending::NeverAllowed
        | Ending::Undelivered
        | Ending::Refused
        | Ending::PlatformFault
        | Ending::NoDevice
        | Ending::Expired => true,
    }
}

/// L10: a settled row leaves only when its receipt is written.
fn outbox(store: &Store, old: &Page, new: &Page) -> Checked {
    for closed in &old.closed {
        let lease = &closed.hold.lease;
        let stays = new.closed.iter().any(|known| known.hold.lease == *lease);
        let written = store.receipts.contains_key(lease);
        Rule::L(10).check(stays || written, || format!("{lease} left the outbox without a receipt"))?;
    }
    Ok(())
}

/// L1, invariants 3 and 5 of the rows of a guest page: what each gained is what its visitor's leases were charged, and none with
/// a charge goes before its day is over.
fn rows(store: &Store, old: &Page, new: &Page) -> Checked {
    for row in &new.cookies {
        let before_ms = old.cookies.iter().find(|known| known.is_of(&of(row))).map_or(0, |known| known.charged_ms);
        let settled = new.closed.iter().filter(|closed| closed.hold.cookie.as_ref() == Some(&of(row)));
        let fresh = settled.filter(|closed| !old.closed.iter().any(|known| known.hold.lease == closed.hold.lease));
        let charged_ms: u64 = fresh.map(|closed| closed.charged_ms).sum();
        let (cookie, after_ms) = (&row.cookie, row.charged_ms);
        Rule::Invariant(3).check(before_ms + charged_ms == after_ms, || {
            format!("{cookie} had {before_ms} ms, was charged {charged_ms} ms and has {after_ms} ms")
        })?;
    }
    for row in &old.cookies {
        let kept = new.cookies.iter().any(|known| known.is_of(&of(row)));
        let over = row.charged_ms == 0 || new.last_time >= row.end();
        let settled = store.settled.values().filter(|closed| closed.hold.cookie.as_ref() == Some(&of(row)));
        let due_ms: u64 = settled.map(|closed| closed.charged_ms).sum();
        Rule::L(1).check(kept || over, || format!("the row of {} with {due_ms} ms is lost", row.cookie))?;
    }
    Ok(())
}

fn of(row: &CookieRow) -> CookieWindow {
    CookieWindow { cookie: row.cookie.clone(), start: row.start }
}

/// What windows and grants gained is what leases were charged.
fn sums(old: &Page, new: &Page, charged_ms: u64) -> Checked {
    let mut gained_ms = 0;
    let mut dropped = false;
    for window in &old.windows {
        match new.windows.iter().find(|found| found.start == window.start) {
            Some(found) => {
                Rule::L(5).check(found.charged_ms >= window.charged_ms, || "a window's charge fell".to_owned())?;
                gained_ms += found.charged_ms - window.charged_ms;
            }
            None => {
                dropped = true;
                let over = window.charged_ms == 0 || new.last_time >= window.end();
                Rule::L(12).check(over, || "a window with a charge was dropped before its end".to_owned())?;
            }
        }
    }
    for window in new.windows.iter().filter(|window| !old.windows.iter().any(|known| known.start == window.start)) {
        gained_ms += window.charged_ms;
    }
    for row in &old.grants {
        match new.grants.iter().find(|found| found.uid == row.uid) {
            Some(found) => {
                Rule::L(5).check(found.used_ms >= row.used_ms, || "a grant's use fell".to_owned())?;
                gained_ms += found.used_ms - row.used_ms;
            }
            None => dropped = true,
        }
    }
    for row in new.grants.iter().filter(|row| !old.grants.iter().any(|known| known.uid == row.uid)) {
        gained_ms += row.used_ms;
    }
    let adds_up = gained_ms <= charged_ms && (dropped || gained_ms == charged_ms);
    Rule::Invariant(3).check(adds_up, || format!("the page gained {gained_ms} ms, leases were charged {charged_ms} ms"))
}

fn cover_settled(old: &Page, closed: &Closed, coverage: &mut Coverage) {
    for (source, ms) in fill(&closed.hold.parts, closed.charged_ms) {
        match source {
            Source::Window(start) => {
                let window = old.windows.iter().find(|window| window.start == *start);
                if ms > 0 && window.is_some_and(|window| window.end() <= closed.at) {
                    coverage.saw(Scenario::SettledInOldWindow);
                }
            }
            Source::Grant(uid) => {
                if ms > 0 {
                    coverage.saw(Scenario::GrantPaid);
                }
                let row = old.grants.iter().find(|row| row.uid == *uid);
                if row.is_some_and(|row| row.expires <= closed.at) {
                    coverage.saw(Scenario::GrantExpiredMidLease);
                }
            }
        }
    }
    if closed.hold.cookie.is_some() && closed.charged_ms > 0 {
        coverage.saw(Scenario::GuestCharged);
    }
    match closed.ending {
        Ending::Expired => coverage.saw(Scenario::Expired),
        Ending::Cancelled => coverage.saw(Scenario::CancelledLease),
        Ending::Deadline => coverage.saw(Scenario::Deadline),
        Ending::NeverAllowed => coverage.saw(Scenario::NeverAllowed),
        _ => {}
    }
}

fn cover(old: &Page, new: &Page, coverage: &mut Coverage) {
    for window in &new.windows {
        let open = new.is_referenced(&Source::Window(window.start));
        if open && old.last_time < window.end() && window.end() <= new.last_time {
            coverage.saw(Scenario::RollOver);
        }
        let before = old.windows.iter().find(|known| known.start == window.start);
        if open && before.is_some_and(|before| before.base_ms > window.base_ms) {
            coverage.saw(Scenario::TierLoweredMidLease);
        }
    }
}
