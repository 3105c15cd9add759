//! Three books of the same leases: what a caller was given, what the pages charge, what the receipts say. [`Verdict::of`]
//! compares them, purely.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Deserialize;
use serde_json::Value;
use spaceport_crds::LeasePhase;

use crate::kubectl::at;
use crate::story::NAMESPACE;
use crate::wait::now;
use crate::world::World;

/// Between two looks at all pages and receipts, which are megabytes.
const LOOK_PAUSE: Duration = Duration::from_secs(1);
/// Problems that are told in words; all are counted.
const PROBLEMS_TOLD: usize = 8;

/// What a caller knows of the leases of one account, as the programs in `e2e/clients` tell it.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub(crate) struct Told {
    /// Leases that ran and were released: each must be settled.
    pub(crate) settled: Vec<String>,
    /// Leases that no worker was let into: each must have ended without charge.
    pub(crate) free: Vec<String>,
    /// Leases that failed: each must have ended, charged or not.
    pub(crate) either: Vec<String>,
    /// The least that all of them together cost, weighted milliseconds.
    pub(crate) least_ms: i64,
    /// The most.
    pub(crate) most_ms: i64,
}

/// What a comparison found; sums over the accounts that were compared.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Verdict {
    /// Leases that callers were given.
    pub(crate) leases: u64,
    /// Leases of callers without an ended receipt or without their charge.
    pub(crate) lost: u64,
    /// Leases that are charged and no caller was given them, or that count twice.
    pub(crate) doubled: u64,
    /// Leases that ended without charge before a caller heard of them: visitors who left, orders that were refused.
    pub(crate) given_up: u64,
    /// Charged on the pages, weighted milliseconds.
    pub(crate) charged_ms: i64,
    /// Charged on the receipts.
    pub(crate) receipts_ms: i64,
    /// Why it is too early to judge: what is still open. Nothing of this is wrong yet.
    pub(crate) open: Vec<String>,
    /// What is wrong, in words; the first few.
    pub(crate) problems: Vec<String>,
}

impl Told {
    /// Leases in which a worker ran.
    pub(crate) fn ran(&self) -> usize {
        self.settled.len() + self.either.len()
    }

    /// What two callers of one account, or one in two loads, know together.
    pub(crate) fn extend(&mut self, more: &Self) {
        self.settled.extend_from_slice(&more.settled);
        self.free.extend_from_slice(&more.free);
        self.either.extend_from_slice(&more.either);
        self.least_ms += more.least_ms;
        self.most_ms += more.most_ms;
    }
}

impl Verdict {
    /// True if nothing is open and nothing is wrong.
    pub(crate) fn adds_up(&self) -> bool {
        self.open.is_empty() && self.lost == 0 && self.doubled == 0
    }

    /// Compares the books of every account: name, what its callers were told, its page. Receipts of others are passed over.
    pub(crate) fn of<'a>(
        accounts: impl IntoIterator<Item = (&'a str, &'a Told, &'a Value)>,
        receipts: &'a [Value],
    ) -> Self {
        let mut by_account: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
        for receipt in receipts {
            by_account.entry(at(receipt, "/spec/account").as_str().unwrap_or_default()).or_default().push(receipt);
        }
        let mut verdict = Self::default();
        for (name, told, page) in accounts {
            let own = by_account.get(name).map(Vec::as_slice).unwrap_or_default();
            verdict.compare(name, told, page, own);
        }
        verdict
    }

    fn compare(&mut self, name: &str, told: &Told, page: &Value, receipts: &[&Value]) {
        let holds = at(page, "/holds").as_array().map_or(0, Vec::len);
        if holds > 0 {
            self.open.push(format!("{name} holds {holds} leases"));
        }
        let mut ended: BTreeMap<&str, Ended> = BTreeMap::new();
        for receipt in receipts {
            let lease = at(receipt, "/spec/lease").as_str().unwrap_or_default();
            let phase = at(receipt, "/spec/phase").as_str().unwrap_or_default();
            if is_over(receipt) {
                let entry = ended.entry(lease).or_default();
                entry.times += 1;
                entry.settled |= phase == "Settled";
                entry.charged_ms += at(receipt, "/spec/chargedMilliseconds").as_i64().unwrap_or(0);
            } else {
                self.open.push(format!("{name}: lease {lease} is {phase}"));
            }
        }
        let (lost, doubled) = (self.lost, self.doubled);
        self.compare_leases(name, told, &ended);
        let receipts_ms: i64 = ended.values().map(|ended| ended.charged_ms).sum();
        let page_ms = charged_ms(page);
        self.leases += (told.ran() + told.free.len()) as u64;
        self.charged_ms += page_ms;
        self.receipts_ms += receipts_ms;
        // One lost or doubled lease shows in the sums, too; it is one.
        if (lost, doubled) == (self.lost, self.doubled) {
            self.compare_sums(name, told, page_ms, receipts_ms);
        }
    }

    fn compare_leases(&mut self, name: &str, told: &Told, ended: &BTreeMap<&str, Ended>) {
        let mut known = BTreeSet::new();
        let given = [(&told.settled, Want::Settled), (&told.free, Want::Free), (&told.either, Want::Ended)];
        for (lease, want) in given.into_iter().flat_map(|(leases, want)| leases.iter().map(move |lease| (lease, want)))
        {
            if !known.insert(lease.as_str()) {
                self.double(format!("{name}: lease {lease} was granted twice"));
                continue;
            }
            match ended.get(lease.as_str()) {
                None => self.lose(format!("{name}: lease {lease} has no ended receipt")),
                Some(ended) if want == Want::Settled && !ended.settled => {
                    self.lose(format!("{name}: lease {lease} ran and is not settled"));
                }
                Some(ended) if want == Want::Free && ended.charged_ms != 0 => {
                    let charged = ended.charged_ms;
                    self.double(format!("{name}: lease {lease} never ran and is charged {charged} ms"));
                }
                Some(_) => {}
            }
        }
        for (lease, ended) in ended {
            if ended.times > 1 {
                self.double(format!("{name}: lease {lease} has {} receipts", ended.times));
            } else if known.contains(lease) {
                continue;
            } else if ended.settled || ended.charged_ms != 0 {
                self.double(format!(
                    "{name}: lease {lease} was given to nobody and is charged {} ms",
                    ended.charged_ms
                ));
            } else {
                self.given_up += 1;
            }
        }
    }

    fn compare_sums(&mut self, name: &str, told: &Told, page_ms: i64, receipts_ms: i64) {
        let said = format!("{name}: {page_ms} ms are charged, the receipts say {receipts_ms} ms");
        if page_ms < receipts_ms {
            self.lose(said);
        } else if page_ms > receipts_ms {
            self.double(said);
        } else if page_ms < told.least_ms {
            self.lose(format!("{name}: {page_ms} ms are charged, its leases ran {} ms at least", told.least_ms));
        } else if page_ms > told.most_ms {
            self.double(format!("{name}: {page_ms} ms are charged, its leases ran {} ms at most", told.most_ms));
        }
    }

    fn lose(&mut self, problem: String) {
        self.lost += 1;
        self.tell(problem);
    }

    fn double(&mut self, problem: String) {
        self.doubled += 1;
        self.tell(problem);
    }

    fn tell(&mut self, problem: String) {
        if self.problems.len() < PROBLEMS_TOLD {
            self.problems.push(problem);
        }
    }
}

/// What receipts say about the end of one lease.
#[derive(Clone, Copy, Debug, Default)]
struct Ended {
    times: u64,
    settled: bool,
    charged_ms: i64,
}

/// How a lease must have ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Want {
    Settled,
    Free,
    Ended,
}

/// Compares until all adds up, at most for `limit`: receipts follow off the critical path. The last verdict, whatever it is.
///
/// # Errors
/// If an account is gone, or the cluster cannot be read.
pub(crate) fn judged(world: &World, told: &BTreeMap<String, Told>, limit: Duration) -> Result<Verdict> {
    let start = now();
    loop {
        // Receipts first: a page is never behind its receipts, so what is read later lacks nothing.
        let receipts = world.kubectl.items(&["--namespace", NAMESPACE, "get", "gpuleases"])?;
        let accounts = world.kubectl.items(&["get", "gpuaccounts"])?;
        let pages: BTreeMap<&str, &Value> = accounts
            .iter()
            .filter_map(|account| Some((at(account, "/metadata/name").as_str()?, at(account, "/status"))))
            .collect();
        let mut books = Vec::with_capacity(told.len());
        for (name, told) in told {
            let page = pages.get(name.as_str()).with_context(|| format!("account {name} is gone"))?;
            books.push((name.as_str(), told, *page));
        }
        let verdict = Verdict::of(books, &receipts);
        if verdict.adds_up() || start.elapsed() >= limit {
            return Ok(verdict);
        }
        std::thread::sleep(LOOK_PAUSE);
    }
}

/// Nothing more happens to the lease of this receipt.
pub(crate) fn is_over(receipt: &Value) -> bool {
    let phase = serde_json::from_value::<LeasePhase>(at(receipt, "/spec/phase").clone());
    phase.is_ok_and(LeasePhase::is_final)
}

/// All that a page charges: to its windows and to its grants, weighted milliseconds.
pub(crate) fn charged_ms(page: &Value) -> i64 {
    let sum = |list: &str, field: &str| -> i64 {
        at(page, list).as_array().into_iter().flatten().filter_map(|row| row.get(field)?.as_i64()).sum()
    };
    sum("/windows", "chargedMilliseconds") + sum("/grants", "usedMilliseconds")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn receipt(lease: &str, phase: &str, charged_ms: i64) -> Value {
        json!({ "spec": { "account": "a", "lease": lease, "phase": phase, "chargedMilliseconds": charged_ms } })
    }

    fn page(charged_ms: &[i64]) -> Value {
        let windows: Vec<Value> = charged_ms.iter().map(|ms| json!({ "chargedMilliseconds": ms })).collect();
        json!({ "windows": windows })
    }

    fn told() -> Told {
        let leases = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        Told {
            settled: leases(&["l1", "l2"]),
            free: leases(&["l3"]),
            either: leases(&["l4"]),
            least_ms: 25,
            most_ms: 40,
        }
    }

    fn receipts() -> Vec<Value> {
        let of_another =
            json!({ "spec": { "account": "b", "lease": "x", "phase": "Settled", "chargedMilliseconds": 9 } });
        vec![
            receipt("l1", "Settled", 10),
            receipt("l2", "Settled", 15),
            receipt("l3", "Refunded", 0),
            receipt("l4", "Settled", 5),
            // A visitor who left before the answer.
            receipt("l5", "Refunded", 0),
            of_another,
        ]
    }

    fn verdict(page: &Value, receipts: &[Value]) -> Verdict {
        Verdict::of([("a", &told(), page)], receipts)
    }

    #[test]
    fn three_books_that_agree_add_up() {
        let found = verdict(&page(&[10, 20]), &receipts());
        let expected = Verdict { leases: 4, given_up: 1, charged_ms: 30, receipts_ms: 30, ..Verdict::default() };
        assert_eq!(found, expected);
        assert!(found.adds_up());
        assert!(Verdict::of([("never", &Told::default(), &Value::Null)], &receipts()).adds_up());
    }

    #[test]
    fn a_lost_lease_is_seen_in_every_book() {
        let lost = |page: &Value, receipts: &[Value]| {
            let found = verdict(page, receipts);
            assert_eq!((found.lost, found.doubled), (1, 0), "{found:?}");
            assert!(!found.adds_up());
            found.problems[0].clone()
        };
        let mut missing = receipts();
        missing.remove(0);
        assert_eq!(lost(&page(&[30]), &missing), "a: lease l1 has no ended receipt");
        let mut refunded = receipts();
        refunded[1] = receipt("l2", "Refunded", 0);
        assert_eq!(lost(&page(&[15]), &refunded), "a: lease l2 ran and is not settled");
        assert_eq!(lost(&page(&[29]), &receipts()), "a: 29 ms are charged, the receipts say 30 ms");
        // Page and receipts agree, and both forgot what the caller used.
        let mut less = receipts();
        less[0] = receipt("l1", "Settled", 4);
        assert_eq!(lost(&page(&[24]), &less), "a: 24 ms are charged, its leases ran 25 ms at least");
    }

    #[test]
    fn a_doubled_lease_is_seen_in_every_book() {
        let doubled = |told: &Told, page: &Value, receipts: &[Value]| {
            let found = Verdict::of([("a", told, page)], receipts);
            assert_eq!((found.lost, found.doubled), (0, 1), "{found:?}");
            assert!(!found.adds_up());
            found.problems[0].clone()
        };
        let with = |more: Value| [receipts(), vec![more]].concat();
        let said = doubled(&told(), &page(&[33]), &with(receipt("l9", "Settled", 3)));
        assert_eq!(said, "a: lease l9 was given to nobody and is charged 3 ms");
        let said = doubled(&told(), &page(&[40]), &with(receipt("l1", "Settled", 10)));
        assert_eq!(said, "a: lease l1 has 2 receipts");
        assert!(doubled(&told(), &page(&[45]), &receipts()).contains("45 ms are charged, the receipts say 30 ms"));
        let mut more = receipts();
        more[0] = receipt("l1", "Settled", 21);
        assert_eq!(doubled(&told(), &page(&[41]), &more), "a: 41 ms are charged, its leases ran 40 ms at most");
        let mut charged = receipts();
        charged[2] = receipt("l3", "Refunded", 7);
        assert_eq!(doubled(&told(), &page(&[37]), &charged), "a: lease l3 never ran and is charged 7 ms");
        let mut twice = told();
        twice.settled.push("l1".to_owned());
        assert_eq!(doubled(&twice, &page(&[30]), &receipts()), "a: lease l1 was granted twice");
    }

    #[test]
    fn what_is_open_is_not_judged_yet() {
        let mut running = receipts();
        running.push(receipt("l6", "Running", 0));
        let found = verdict(&page(&[30]), &running);
        assert_eq!((found.open.as_slice(), found.lost), (&["a: lease l6 is Running".to_owned()][..], 0));
        let holding = json!({ "holds": [{}], "windows": [{ "chargedMilliseconds": 30 }] });
        assert_eq!(verdict(&holding, &receipts()).open, ["a holds 1 leases"]);
        assert!(!verdict(&holding, &receipts()).adds_up());
    }

    #[test]
    fn grants_are_charged_like_windows() {
        let page = json!({ "windows": [{ "chargedMilliseconds": 5 }], "grants": [{ "usedMilliseconds": 7 }] });
        assert_eq!(charged_ms(&page), 12);
        assert_eq!(charged_ms(&Value::Null), 0);
    }
}
