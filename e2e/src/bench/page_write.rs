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
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::Request;
use kube::{Api, Client, Config, Resource as _, ResourceExt as _};
use serde_json::json;
use spaceport_crds::conditions::LeaseOutcome;
use spaceport_crds::names::API_VERSION;
use spaceport_crds::{
    ClosedLease, GPUAccount, GPUAccountSpec, GPUAccountStatus, GpuSize, Hold, Part, RecentOutcome, Window,
};
use tokio::runtime::Runtime;

use crate::kubectl::setting;
use crate::story::{NAMESPACE, SPACE};
use crate::wait::now;

/// Pages are written by nobody else (policy spaceport-ledger-pages).
pub(super) const OPERATOR: &str = "system:serviceaccount:spaceport-system:spaceport-operator";
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

/// Writes one page again and again.
pub(super) struct PageWriter {
    runtime: Runtime,
    client: Client,
    account: GPUAccount,
    bytes: usize,
    disturbed: usize,
}

impl PageWriter {
    /// Connects as the operator, gives the callers' accounts a past, and the account of the writes its first page.
    ///
    /// The past makes the pages that grants write as large as the one that is written here: their size is what a write
    /// costs most by.
    pub(super) fn connect(page: &str, callers: &[String]) -> Result<Self> {
        // The connection is driven beside the thread that waits, as in the operator, and lives through the pauses.
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).enable_all().build().context("no runtime for the HTTP client")?;
        let client = runtime.block_on(client())?;
        let account = GPUAccount::new(page, GPUAccountSpec::default());
        let mut writer = Self { runtime, client, account, bytes: 0, disturbed: 0 };
        for name in callers {
            writer.take_up(name, page_with_a_past)?;
        }
        writer.take_up(page, first_page)?;
        Ok(writer)
    }

    /// Turns to the account of this name and writes a page made from its own.
    fn take_up(&mut self, name: &str, page: fn(GPUAccountStatus, i64) -> GPUAccountStatus) -> Result<()> {
        self.read(name)?;
        self.disturbed = 0;
        // Bounded by DISTURBED_MAX.
        while self.write(page(self.account.status.clone().unwrap_or_default(), now_ms()))?.is_none() {}
        Ok(())
    }

    fn read(&mut self, name: &str) -> Result<()> {
        let api = Api::<GPUAccount>::all(self.client.clone());
        self.account = self.runtime.block_on(api.get(name)).with_context(|| format!("cannot read account {name}"))?;
        Ok(())
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
            let page = next_page(self.account.status.clone().unwrap_or_default(), now_ms());
            if let Some(milliseconds) = self.write(page)? {
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
        let name = self.account.name_any();
        self.take_up(&name, |stored, now_ms| {
            let page = next_page(stored, now_ms);
            GPUAccountStatus { holds: Vec::new(), closed: Vec::new(), leases: 0, ..page }
        })
    }

    /// Size of the last page that was sent.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Writes of others to this page that were met.
    pub(super) fn disturbed(&self) -> usize {
        self.disturbed
    }

    /// Milliseconds of one compare-and-swap; none if the page had changed meanwhile, which then is read again.
    fn write(&mut self, status: GPUAccountStatus) -> Result<Option<f64>> {
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
        let request = Request::new(GPUAccount::url_path(&(), None))
            .replace_subresource("status", &name, &PostParams::default(), body)
            .context("the write cannot be put into a request")?;
        let client = self.client.clone();
        let (milliseconds, answer) = self.runtime.block_on(async {
            let begin = now();
            let answer = tokio::time::timeout(WRITE_LIMIT, client.request_text(request)).await;
            (begin.elapsed().as_secs_f64() * 1000.0, answer)
        });
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
                self.read(&name)?;
                Ok(None)
            }
            Err(error) => Err(error).context("the API server refused a page write"),
        }
    }
}

async fn client() -> Result<Client> {
    let path = setting("KUBECONFIG")?;
    let file = Kubeconfig::read_from(&path).context("cannot read the kubeconfig")?;
    let mut config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    config.auth_info.impersonate = Some(OPERATOR.to_owned());
    // A write that the client repeats by itself is not one write.
    config.default_retry = false;
    Client::try_from(config).context("cannot make a client from the kubeconfig")
}

/// The page of somebody who has used Spaces all day: two windows, holds, rows without a receipt, endings that had none.
///
/// The broker sees this page in its watch like any other. Should it take up the rows of the outbox, it writes once; the
/// later pages are made from what is there then.
fn first_page(stored: GPUAccountStatus, now_ms: i64) -> GPUAccountStatus {
    let before = Window {
        start_milliseconds: now_ms - DAY_MS - 3_600_000,
        base_milliseconds: BASE_MS,
        charged_milliseconds: 1_873_204,
        runs: 93,
        generation: 1,
    };
    let open = Window {
        start_milliseconds: now_ms - 3_500_000,
        base_milliseconds: BASE_MS,
        charged_milliseconds: 412_377,
        runs: 41,
        generation: 1,
    };
    let source = format!("window:{}", open.start_milliseconds);
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
        windows: vec![before, open],
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

/// The page of an account that is called with: nothing open, and endings enough that the pages of its grants are as large
/// as the page of the bare writes.
fn page_with_a_past(stored: GPUAccountStatus, now_ms: i64) -> GPUAccountStatus {
    GPUAccountStatus {
        seq: stored.seq + 1,
        write_id: write_id(),
        last_time_milliseconds: stored.last_time_milliseconds.max(now_ms),
        recent_outcomes: outcomes(16, now_ms),
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
    let mut page = GPUAccountStatus {
        seq: stored.seq + 1,
        write_id: write_id(),
        last_time_milliseconds: stored.last_time_milliseconds.max(now_ms),
        ..stored
    };
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

fn hold(lease: &str, source: &str, now_ms: i64) -> Hold {
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
