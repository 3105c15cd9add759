//! The bare compare-and-swap of a page: what every durable grant pays at least once.
//!
//! The same request as the broker's (L2): PUT of the status with uid and resourceVersion, as the operator's
//! service account, through the operator's HTTP client, with every admission policy and CEL rule in force. The body is
//! made before the clock starts and the answer is parsed after it has stopped, so that it is the API server's time and
//! that of the connection alone.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::PostParams;
use kube::core::Request;
use kube::{Api, Client, Resource as _, ResourceExt as _};
use serde_json::json;
use spaceport_crds::conditions::LeaseOutcome;
use spaceport_crds::names::API_VERSION;
use spaceport_crds::{ClosedLease, GPUAccount, GPUAccountStatus, GpuSize, Hold, Part, RecentOutcome, Window};

use super::cluster::Cluster;
use crate::story::{NAMESPACE, SPACE};
use crate::wait::now;

/// As the operator's own limit of a page write: as long as etcd needs to elect a leader, twice over.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// Writes of others to one page that a run bears: the broker may settle once what it finds on a page that it did not
/// write. More means that it works on the page, and then nothing is measured that has a name.
const DISTURBED_MAX: usize = 10;
/// A node that never joins: the broker waits for it (L7, L9) longer than a benchmark takes.
const NO_NODE: &str = "bench-no-such-node";
/// Declared by the holds on the page: for that long nobody gives them up.
const DECLARED_MS: i64 = 3_600_000;
const DAY_MS: i64 = 24 * 3_600_000;
const BASE_MS: i64 = 2_400_000;
/// The hold that comes and goes with every write.
const MOVING_LEASE: &str = "01jd8x0000000000000000bench";

/// One page, and what is known of its writes.
pub(super) struct AccountPage {
    account: GPUAccount,
    bytes: usize,
    attempts: u64,
    disturbed: usize,
}

impl AccountPage {
    /// The page of this account as it is.
    pub(super) async fn read(client: &Client, name: &str) -> Result<Self> {
        let api = Api::<GPUAccount>::all(client.clone());
        let account = api.get(name).await.with_context(|| format!("cannot read account {name}"))?;
        Ok(Self::of(account))
    }

    /// The page of an account that was read or made just now.
    pub(super) fn of(account: GPUAccount) -> Self {
        Self { account, bytes: 0, attempts: 0, disturbed: 0 }
    }

    /// Writes the page that `next` makes of the present one, until that succeeds.
    pub(super) async fn become_page(
        &mut self,
        client: &Client,
        next: impl Fn(GPUAccountStatus, i64) -> GPUAccountStatus,
    ) -> Result<()> {
        // Bounded by DISTURBED_MAX.
        while self.write_next(client, &next).await?.is_none() {}
        Ok(())
    }

    /// One write of the page that `next` makes of the present one; see [`Self::write`].
    pub(super) async fn write_next(
        &mut self,
        client: &Client,
        next: impl Fn(GPUAccountStatus, i64) -> GPUAccountStatus,
    ) -> Result<Option<f64>> {
        let page = next(self.account.status.clone().unwrap_or_default(), now_ms());
        self.write(client, page).await
    }

    /// Milliseconds of one compare-and-swap; none if the page had changed meanwhile, which then is read again.
    async fn write(&mut self, client: &Client, status: GPUAccountStatus) -> Result<Option<f64>> {
        let name = self.account.name_any();
        let metadata = &self.account.metadata;
        let body = json!({
            "apiVersion": API_VERSION,
            "kind": "GPUAccount",
            "metadata": { "name": name, "uid": metadata.uid, "resourceVersion": metadata.resource_version },
            "status": status,
        });
        let body = serde_json::to_vec(&body)?;
        self.bytes = body.len();
        self.attempts += 1;
        let request = Request::new(GPUAccount::url_path(&(), None))
            .replace_subresource("status", &name, &PostParams::default(), body)
            .context("the write cannot be put into a request")?;
        let begin = now();
        let answer = tokio::time::timeout(WRITE_LIMIT, client.request_text(request)).await;
        let milliseconds = begin.elapsed().as_secs_f64() * 1000.0;
        match answer.context("a page write had no answer")? {
            Ok(text) => {
                self.account = serde_json::from_str(&text).context("the API server answered no GPUAccount")?;
                Ok(Some(milliseconds))
            }
            Err(kube::Error::Api(status)) if status.code == 409 => {
                self.disturbed += 1;
                ensure!(
                    self.disturbed <= DISTURBED_MAX,
                    "something else writes the page of {name}, on which only the benchmark works: {DISTURBED_MAX} conflicts"
                );
                self.account = Self::read(client, &name).await?.account;
                Ok(None)
            }
            Err(error) => Err(error).context("the API server refused a page write"),
        }
    }

    /// Writes that were sent, also those that met another's.
    pub(super) fn attempts(&self) -> u64 {
        self.attempts
    }

    /// Size of the last page that was sent.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Writes one page again and again.
pub(super) struct PageWriter<'a> {
    cluster: &'a Cluster,
    page: AccountPage,
}

impl<'a> PageWriter<'a> {
    /// Gives the callers' accounts a past, and the account of the writes its first page.
    ///
    /// The past makes the pages that grants write as large as the one that is written here: their size is what a write
    /// costs most by.
    pub(super) fn begin(cluster: &'a Cluster, page: &str, callers: &[String]) -> Result<Self> {
        give_a_past(cluster, callers)?;
        let page = cluster.wait(async {
            let mut page = AccountPage::read(cluster.operator(), page).await?;
            page.become_page(cluster.operator(), first_page).await?;
            anyhow::Ok(AccountPage { disturbed: 0, ..page })
        })?;
        Ok(Self { cluster, page })
    }

    /// Milliseconds of each write, after `warm_up` writes that do not count; none is begun after `end`. A write that met
    /// another's is no sample: the page is read again and the next one counts.
    pub(super) fn measure(
        &mut self,
        warm_up: usize,
        samples: usize,
        pause: Duration,
        end: Instant,
    ) -> Result<Vec<f64>> {
        let mut found = Vec::with_capacity(samples);
        let mut written = 0;
        // Bounded: each round writes or counts towards DISTURBED_MAX.
        while found.len() < samples && now() < end {
            let client = self.cluster.operator();
            if let Some(milliseconds) = self.cluster.wait(self.page.write_next(client, next_page))? {
                written += 1;
                if written > warm_up {
                    found.push(milliseconds);
                }
            }
            std::thread::sleep(pause);
        }
        Ok(found)
    }

    /// Leaves a page on which nothing is open, so that nobody waits for its holds.
    pub(super) fn close_page(&mut self) -> Result<()> {
        let client = self.cluster.operator();
        self.page.disturbed = 0;
        self.cluster.wait(self.page.become_page(client, |stored, now_ms| {
            let page = next_page(stored, now_ms);
            GPUAccountStatus { holds: Vec::new(), closed: Vec::new(), leases: 0, ..page }
        }))
    }

    /// Size of the last page that was sent.
    pub(super) fn bytes(&self) -> usize {
        self.page.bytes()
    }

    /// Writes of others to this page that were met.
    pub(super) fn disturbed(&self) -> usize {
        self.page.disturbed
    }
}

/// Makes the pages of these accounts as large as those of people who have used Spaces all day.
pub(super) fn give_a_past(cluster: &Cluster, accounts: &[String]) -> Result<()> {
    let give = |name: String| {
        let client = cluster.operator().clone();
        async move { AccountPage::read(&client, &name).await?.become_page(&client, page_with_a_past).await }
    };
    cluster.each(accounts.to_vec(), give)?;
    Ok(())
}

/// The page of somebody who has used Spaces all day: two windows, holds, rows without a receipt, endings that had none.
///
/// The broker sees this page in its watch like any other. Should it take up the rows of the outbox, it writes once; the
/// later pages are made from what is there then.
fn first_page(stored: GPUAccountStatus, now_ms: i64) -> GPUAccountStatus {
    let windows = windows(now_ms);
    let source = format!("window:{}", windows[1].start_milliseconds);
    let parts = |milliseconds| vec![Part { source: source.clone(), milliseconds }];
    let holds = (0..2).map(|number| hold(&format!("01jd8x00000000000000000h{number:03}"), &source, now_ms)).collect();
    let closed = (0..3)
        .map(|number: i64| ClosedLease {
            lease: format!("01jd8x00000000000000000c{number:03}"),
            space: space(),
            space_uid: "4f0e7f0a-2f5e-4a53-9a3e-1d6b3f6f2c11".to_owned(),
            node: NO_NODE.to_owned(),
            size: GpuSize::Large,
            weight: 1,
            declared_milliseconds: 60_000,
            used_milliseconds: 11_203 + number,
            charged_milliseconds: 11_203 + number,
            outcome: LeaseOutcome::Released.as_str().to_owned(),
            at_milliseconds: now_ms - 1_000,
            parts: parts(60_000),
            epoch: stored.epoch,
            since_milliseconds: now_ms - 13_000,
            generation: 1,
            via: "token".to_owned(),
            cookie: None,
            shortened: None,
        })
        .collect();
    GPUAccountStatus {
        seq: stored.seq + 1,
        write_id: write_id(),
        last_time_milliseconds: stored.last_time_milliseconds.max(now_ms),
        windows: windows.into(),
        holds,
        closed,
        recent_outcomes: outcomes(12, now_ms),
        tier: Some("bench".to_owned()),
        used: Some("412.3s".to_owned()),
        reserved: Some("7200s".to_owned()),
        left: Some("1987.6s".to_owned()),
        resets_at: Timestamp::from_millisecond(now_ms + DAY_MS).ok().map(Time),
        leases: 2,
        ..stored
    }
}

/// The window that has ended and the open one of somebody who has used Spaces all day.
fn windows(now_ms: i64) -> [Window; 2] {
    let window = |start_milliseconds, charged_milliseconds, runs| Window {
        start_milliseconds,
        base_milliseconds: BASE_MS,
        charged_milliseconds,
        runs,
        generation: 1,
    };
    [window(now_ms - DAY_MS - 3_600_000, 1_873_204, 93), window(now_ms - 3_500_000, 412_377, 41)]
}

/// A page on which nothing is open and whose broker has nothing to do: for writers whose number is what is measured. About
/// as large as the others, by the two windows and by endings.
pub(super) fn quiet_page(stored: GPUAccountStatus, now_ms: i64) -> GPUAccountStatus {
    GPUAccountStatus {
        windows: windows(now_ms).into(),
        tier: Some("bench".to_owned()),
        used: Some("412.3s".to_owned()),
        left: Some("1987.6s".to_owned()),
        resets_at: Timestamp::from_millisecond(now_ms + DAY_MS).ok().map(Time),
        ..page_with_a_past(stored, now_ms)
    }
}

/// A quiet page after one more charge.
pub(super) fn charged_page(stored: GPUAccountStatus, now_ms: i64) -> GPUAccountStatus {
    let mut page = written_again(stored, now_ms);
    if let Some(window) = page.windows.last_mut() {
        window.charged_milliseconds += 1;
        window.runs += 1;
        page.used = Some(format!("{:.1}s", window.charged_milliseconds as f64 / 1000.0));
    }
    page
}

/// The page of an account that is called with: nothing open, and endings enough that the pages of its grants are as large
/// as the page of the bare writes.
fn page_with_a_past(stored: GPUAccountStatus, now_ms: i64) -> GPUAccountStatus {
    GPUAccountStatus { recent_outcomes: outcomes(16, now_ms), ..written_again(stored, now_ms) }
}

/// The same page as another write of it.
pub(super) fn written_again(stored: GPUAccountStatus, now_ms: i64) -> GPUAccountStatus {
    GPUAccountStatus {
        seq: stored.seq + 1,
        write_id: write_id(),
        last_time_milliseconds: stored.last_time_milliseconds.max(now_ms),
        ..stored
    }
}

/// Endings without a receipt, a minute apart; 12 of them are more than half of a page.
fn outcomes(count: i64, now_ms: i64) -> Vec<RecentOutcome> {
    let outcome = |number| RecentOutcome {
        id: format!("01jd8x00000000000000000agent/{number}"),
        kind: "QuotaExceeded".to_owned(),
        boundary: "Requested".to_owned(),
        space: space(),
        at_milliseconds: now_ms - 60_000 * (count - number),
        message:
            "The call needs 120 s of GPU time and 87.6 s are left of 2400 s; 60 s of those are reserved by calls that \
                  run now. Declare a shorter duration or come back when the window ends."
                .to_owned(),
    };
    (0..count).map(outcome).collect()
}

/// The page after one more event: a lease takes its hold, or, the next time, ends and is charged.
fn next_page(stored: GPUAccountStatus, now_ms: i64) -> GPUAccountStatus {
    let mut page = written_again(stored, now_ms);
    let held = page.holds.len();
    page.holds.retain(|hold| hold.lease != MOVING_LEASE);
    if let Some(window) = page.windows.last_mut() {
        if page.holds.len() == held {
            let source = format!("window:{}", window.start_milliseconds);
            page.holds.push(hold(MOVING_LEASE, &source, now_ms));
        } else {
            window.charged_milliseconds += 731;
            window.runs += 1;
            page.used = Some(format!("{:.1}s", window.charged_milliseconds as f64 / 1000.0));
        }
    }
    page.leases = i32::try_from(page.holds.len()).unwrap_or(i32::MAX);
    page
}

/// A hold of [`DECLARED_MS`] that one window pays for, on a node that never joins.
pub(super) fn hold(lease: &str, source: &str, now_ms: i64) -> Hold {
    Hold {
        lease: lease.to_owned(),
        space: space(),
        space_uid: "4f0e7f0a-2f5e-4a53-9a3e-1d6b3f6f2c11".to_owned(),
        parts: vec![Part { source: source.to_owned(), milliseconds: DECLARED_MS }],
        node: NO_NODE.to_owned(),
        avoid: Vec::new(),
        size: GpuSize::Large,
        weight: 1,
        declared_milliseconds: DECLARED_MS,
        epoch: 0,
        since_milliseconds: now_ms,
        after: None,
        generation: 1,
        via: "token".to_owned(),
        cookie: None,
        shortened: None,
        budget: None,
    }
}

fn space() -> String {
    format!("{NAMESPACE}/{SPACE}")
}

fn write_id() -> String {
    ulid::Ulid::generate().to_string().to_lowercase()
}

#[allow(clippy::disallowed_methods)] // Pages carry real time; the schema lets it never go back.
fn now_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

#[cfg(test)]
mod tests {
    use spaceport_crds::gpu_account::{MAX_CLOSED, MAX_HOLDS, MAX_RECENT_OUTCOMES, MAX_WINDOWS};

    use super::*;

    const NOW: i64 = 1_800_000_000_000;

    #[test]
    fn the_first_page_is_of_real_size_and_within_its_bounds() {
        let page = first_page(GPUAccountStatus { seq: 4, epoch: 7, ..GPUAccountStatus::default() }, NOW);
        assert_eq!((page.seq, page.epoch), (5, 7));
        assert!(page.windows.len() <= MAX_WINDOWS && page.holds.len() < MAX_HOLDS);
        assert!(page.closed.len() <= MAX_CLOSED && page.recent_outcomes.len() <= MAX_RECENT_OUTCOMES);
        assert!(page.closed.iter().all(|row| page.holds.iter().all(|hold| hold.lease != row.lease)));
        assert!(page.closed.iter().all(|row| row.charged_milliseconds <= row.weight * row.declared_milliseconds));
        let bytes = serde_json::to_vec(&page).unwrap().len();
        assert!((5_000..12_000).contains(&bytes), "{bytes} bytes");

        let past = page_with_a_past(GPUAccountStatus { seq: 4, ..GPUAccountStatus::default() }, NOW);
        assert!(past.seq == 5 && past.windows.is_empty() && past.holds.is_empty() && past.closed.is_empty());
        assert!(past.recent_outcomes.len() <= MAX_RECENT_OUTCOMES);
        let past_bytes = serde_json::to_vec(&past).unwrap().len();
        // A window and one or two holds or closed rows come on top of it.
        assert!((bytes - 2_000..bytes).contains(&past_bytes), "{past_bytes} of {bytes} bytes");

        let quiet = quiet_page(GPUAccountStatus { seq: 4, ..GPUAccountStatus::default() }, NOW);
        assert!(quiet.seq == 5 && quiet.windows.len() == 2 && quiet.holds.is_empty() && quiet.closed.is_empty());
        let quiet_bytes = serde_json::to_vec(&quiet).unwrap().len();
        assert!((past_bytes..bytes).contains(&quiet_bytes), "{quiet_bytes} of {bytes} bytes");
        let charged = charged_page(quiet.clone(), NOW + 1);
        assert_eq!((charged.seq, charged.last_time_milliseconds), (6, NOW + 1));
        assert_eq!(charged.windows[1].charged_milliseconds, quiet.windows[1].charged_milliseconds + 1);
        assert_ne!(charged.write_id, quiet.write_id);
    }

    #[test]
    fn each_page_is_one_the_api_server_takes_after_the_one_before() {
        let mut page = first_page(GPUAccountStatus::default(), NOW);
        for step in 1..=10 {
            // A clock that steps back must not show.
            let next = next_page(page.clone(), NOW - step);
            assert_eq!(next.seq, page.seq + 1);
            assert_ne!(next.write_id, page.write_id);
            assert!(next.epoch >= page.epoch && next.last_time_milliseconds >= page.last_time_milliseconds);
            for (after, before) in next.windows.iter().zip(&page.windows) {
                assert_eq!(after.start_milliseconds, before.start_milliseconds);
                assert!(after.charged_milliseconds >= before.charged_milliseconds);
            }
            let is_held = next.holds.iter().any(|hold| hold.lease == MOVING_LEASE);
            assert_eq!(is_held, step % 2 == 1);
            assert_eq!(next.leases, if is_held { 3 } else { 2 });
            page = next;
        }
        assert_eq!(page.windows[1].charged_milliseconds, 412_377 + 5 * 731);
    }
}
