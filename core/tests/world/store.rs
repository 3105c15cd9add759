//! The API server: pages by compare-and-swap, and the auditor who looks at every one that is written.

use std::collections::{BTreeMap, BTreeSet};

use spaceport_core::ids::{AccountName, LeaseId};
use spaceport_core::page::{Closed, Ending, Page, Source};

/// What the auditor knows.
#[derive(Default)]
pub struct Store {
    pub pages: BTreeMap<AccountName, Stored>,
    /// Every lease that was ever held on a durable page.
    pub held_ever: BTreeSet<LeaseId>,
    /// How each of them was settled.
    pub settled: BTreeMap<LeaseId, Closed>,
}

#[derive(Clone, Default)]
pub struct Stored {
    pub page: Page,
    /// Counts every write of the object.
    pub revision: u64,
    /// The page before, for watches that are late.
    pub previous: Page,
}

impl Store {
    pub fn page(&self, account: &AccountName) -> Page {
        self.pages.get(account).map(|stored| stored.page.clone()).unwrap_or_default()
    }

    pub fn is_held(&self, lease: &LeaseId) -> bool {
        self.pages.values().any(|stored| stored.page.holds.iter().any(|hold| hold.lease == *lease))
    }

    /// A compare-and-swap: true if it happened.
    pub fn swap(&mut self, account: &AccountName, revision: u64, page: &Page) -> Result<bool, String> {
        let stored = self.pages.get(account).cloned().unwrap_or_default();
        // The schema's own rules (L5) refuse what the store must never hold.
        if stored.revision != revision || page.epoch < stored.page.epoch {
            return Ok(false);
        }
        self.audit(&stored.page, page).map_err(|error| format!("{account}: {error}"))?;
        let next = Stored { page: page.clone(), revision: revision + 1, previous: stored.page };
        self.pages.insert(account.clone(), next);
        Ok(true)
    }

    fn audit(&mut self, old: &Page, new: &Page) -> Result<(), String> {
        if new.seq != old.seq + 1 {
            return Err(format!("L5: seq {} after {}", new.seq, old.seq));
        }
        if new.last_time < old.last_time {
            return Err("L20: ledger time went back".to_owned());
        }
        for hold in &new.holds {
            if self.settled.contains_key(&hold.lease) {
                return Err(format!("invariant 3: {} is held after it was settled", hold.lease));
            }
            if old.holds.iter().any(|known| known.lease == hold.lease) {
                continue;
            }
            if !self.held_ever.insert(hold.lease.clone()) {
                return Err(format!("invariant 3: {} is held a second time", hold.lease));
            }
            for part in hold.parts.iter().filter(|part| part.ms > 0) {
                check_source(new, &part.source)?;
            }
        }
        for hold in &old.holds {
            let kept = new.holds.iter().any(|open| open.lease == hold.lease);
            let closed = new.closed.iter().any(|closed| closed.hold.lease == hold.lease);
            if kept == closed {
                return Err(format!("invariant 3: {} is held {kept}, settled {closed}", hold.lease));
            }
        }
        let mut charged_ms = 0;
        for closed in &new.closed {
            let lease = &closed.hold.lease;
            if old.closed.iter().any(|known| known.hold.lease == *lease) {
                continue;
            }
            if !old.holds.iter().any(|hold| hold.lease == *lease) || self.settled.contains_key(lease) {
                return Err(format!("invariant 3: {lease} is settled without an open hold"));
            }
            check_charge(closed)?;
            charged_ms += closed.charged_ms;
            self.settled.insert(lease.clone(), closed.clone());
        }
        check_sums(old, new, charged_ms)
    }
}

/// Invariant 1, at the revision that admits.
fn check_source(page: &Page, source: &Source) -> Result<(), String> {
    let (limit_ms, charged_ms) = match source {
        Source::Window(start) => {
            let window = page.windows.iter().find(|window| window.start == *start).ok_or("no such window")?;
            (window.base_ms, window.charged_ms)
        }
        Source::Grant(uid) => {
            let row = page.grants.iter().find(|row| row.uid == *uid).ok_or("no such grant")?;
            (row.ms, row.used_ms)
        }
    };
    let reserved_ms = page.reserved_ms(source);
    if charged_ms + reserved_ms > limit_ms {
        return Err(format!("invariant 1: {source:?} has {charged_ms} + {reserved_ms} of {limit_ms} ms"));
    }
    Ok(())
}

/// Invariants 4 and 5.
fn check_charge(closed: &Closed) -> Result<(), String> {
    let (hold, lease) = (&closed.hold, &closed.hold.lease);
    let bound_ms = hold.weight * closed.used_ms.min(hold.declared_ms);
    if closed.charged_ms > bound_ms {
        return Err(format!("invariant 5: {lease} pays {} ms of at most {bound_ms} ms", closed.charged_ms));
    }
    let is_free = match closed.ending {
        Ending::Released | Ending::Failed | Ending::WorkerDied | Ending::Deadline | Ending::Cancelled => false,
        Ending::NeverAllowed
        | Ending::Undelivered
        | Ending::Refused
        | Ending::PlatformFault
        | Ending::NoDevice
        | Ending::Expired => true,
    };
    if is_free && closed.charged_ms > 0 {
        return Err(format!("invariant 4: {lease} ended {:?} and pays {} ms", closed.ending, closed.charged_ms));
    }
    if !is_free && closed.charged_ms != bound_ms {
        return Err(format!("invariant 5: {lease} pays {} ms instead of {bound_ms} ms", closed.charged_ms));
    }
    Ok(())
}

/// What windows and grants gained is what leases were charged.
fn check_sums(old: &Page, new: &Page, charged_ms: u64) -> Result<(), String> {
    let mut gained_ms = 0;
    let mut dropped = false;
    for window in &old.windows {
        match new.windows.iter().find(|found| found.start == window.start) {
            Some(found) if found.charged_ms < window.charged_ms => return Err("L5: a window's charge fell".to_owned()),
            Some(found) => gained_ms += found.charged_ms - window.charged_ms,
            None => {
                dropped = true;
                if window.charged_ms > 0 && new.last_time < window.end() {
                    return Err("L12: a window with a charge was dropped before its end".to_owned());
                }
            }
        }
    }
    for window in new.windows.iter().filter(|window| !old.windows.iter().any(|known| known.start == window.start)) {
        gained_ms += window.charged_ms;
    }
    for row in &old.grants {
        match new.grants.iter().find(|found| found.uid == row.uid) {
            Some(found) if found.used_ms < row.used_ms => return Err("L5: a grant's use fell".to_owned()),
            Some(found) => gained_ms += found.used_ms - row.used_ms,
            None => dropped = true,
        }
    }
    for row in new.grants.iter().filter(|row| !old.grants.iter().any(|known| known.uid == row.uid)) {
        gained_ms += row.used_ms;
    }
    if gained_ms > charged_ms || (!dropped && gained_ms != charged_ms) {
        return Err(format!("the page gained {gained_ms} ms, leases were charged {charged_ms} ms"));
    }
    Ok(())
}
