//! Starts everything, and ends everything: on SIGTERM in order, and as soon as one task dies, with its reason.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use backon::{ExponentialBuilder, Retryable as _};
use spaceport_shell::admin::{self, AdminArgs};
use spaceport_shell::readiness::Readiness;
use spaceport_shell::signal::StopSignals;
use spaceport_shell::tasks::{TaskError, Tasks};
use spaceport_shell::{error_chain, log};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::account::{self, WorkQueue};
use crate::args::{Args, LeaderArgs, LedgerArgs, NodeLinkArgs, PlaceArgs};
use crate::clock;
use crate::credentials::{self, CredentialsError, ServerCertificate};
use crate::fault;
use crate::identity::{self, KeySet, TokenVerifier};
use crate::kubeapi::KubeApi;
use crate::leader::{self, LeaderSettings};
use crate::ledger::actor;
use crate::ledger::durations::Durations;
use crate::ledger::findings::Findings;
use crate::ledger::ports::{ActorParts, Input};
use crate::ledger::pressure::PressureGauge;
use crate::ledger::receipt::{self, Receipts};
use crate::ledger::retention::{self, Retention};
use crate::ledger::store::PageStore;
use crate::ledger::watches::{self, WatchParts};
use crate::metrics::Metrics;
use crate::node_link::{self, NodeLinkParts, NodeLinkSettings};
use crate::space::{self, SpaceArgs};
use crate::status::{self, observe::Observed};

/// How long tasks may take to end after a stop; the pod's grace period is 30 s.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// How long what writes may take to end with a term. All of it looks at the token; what does not is cut off, for another
/// leader may write already, and we may lead again after a second. Half a write is found again by the next who leads.
const STEP_DOWN_LIMIT: Duration = Duration::from_secs(2);
/// Inputs that may wait for the broker. It decides tens of thousands a second; when it falls behind, agents and watches
/// wait instead of memory growing.
const INPUT_QUEUE: usize = 4096;

/// Runs the operator until it is told to stop.
///
/// # Errors
/// The reason of the task that ended first, or what kept it from starting.
pub fn run(args: Args) -> anyhow::Result<()> {
    let Args {
        place,
        log,
        leader,
        ledger,
        node_link,
        space,
        admin: AdminArgs { admin_listen },
        #[cfg(feature = "faults")]
        fault,
    } = args;
    log::start(&log)?;
    #[cfg(feature = "faults")]
    fault::choose(fault);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(async {
        let stop = stop_signal()?;
        let metrics = Metrics::new();
        let readiness = Readiness::new(|gate, open| tracing::info!(gate, open, "Readiness changed"));
        let mut tasks = Tasks::new(stop.clone());
        let listener = admin::bind(admin_listen).await?;
        let counted = metrics.clone();
        let serve = admin::serve(listener, move || counted.encode(), readiness.clone(), fault::routes(), stop.clone());
        tasks.spawn_fallible("admin endpoint", serve);
        let settings = Settings { place, leader, ledger, node_link, space };
        let started = start(settings, metrics, readiness, &mut tasks).await;
        if started.is_err() {
            stop.cancel();
        }
        let ended = tasks.wait(STOP_LIMIT).await;
        started.and(ended.map_err(Into::into))
    })
}

struct Settings {
    place: PlaceArgs,
    leader: LeaderArgs,
    ledger: LedgerArgs,
    node_link: NodeLinkArgs,
    space: SpaceArgs,
}

/// Starts what every replica runs; what only the leader runs waits in a task of its own.
async fn start(settings: Settings, metrics: Metrics, readiness: Readiness, tasks: &mut Tasks) -> anyhow::Result<()> {
    let Settings { place, leader, ledger, node_link, space } = settings;
    let PlaceArgs { kubeconfig, namespace, replica } = place;
    let NodeLinkArgs { nodelink_listen, agent_service_account, nodelink_dns_names } = node_link;
    let LedgerArgs { page_write_timeout, clock_skew_max, token_issuer } = ledger;
    let space = space::Settings::read(space)?;
    let leader = leader_settings(leader, &namespace, &replica)?;
    let (prepared, linked) = (readiness.condition("credentials"), readiness.condition("node-link"));

    let api = connect(kubeconfig).await?.counted_by(metrics.clone());
    let dns_names = dns_names(&namespace, nodelink_dns_names);
    let certificate = prepare_credentials(&api, &namespace, &dns_names, tasks.stop_token()).await?;
    prepared.set(true);

    let (leading_sender, leading) = watch::channel(false);
    let (keys_sender, keys) = watch::channel(Arc::new(KeySet::default()));
    let (events, inputs) = mpsc::channel::<Input>(INPUT_QUEUE);
    let stop = tasks.stop_token().clone();

    let watch_keys = identity::watch_keys(api.clone(), namespace.clone(), keys_sender, stop.clone());
    tasks.spawn("token keys", watch_keys);
    let incoming = node_link::bind(nodelink_listen)?;
    let parts = NodeLinkParts {
        settings: NodeLinkSettings { agent: agent_service_account },
        certificate,
        api: api.clone(),
        metrics: metrics.clone(),
        leading: leading.clone(),
        events: events.clone(),
    };
    let serve = node_link::serve(incoming, parts, stop.clone());
    tasks.spawn_fallible("node link", serve);
    linked.set(true);

    let elect = leader::run(api.clone(), leader, leading_sender, stop.clone());
    tasks.spawn("leader election", elect);
    let store = PageStore::new(&api, page_write_timeout, metrics.clone());
    let parts = LeaderParts {
        api,
        store,
        metrics,
        events,
        inputs,
        verifier: TokenVerifier::new(token_issuer, keys),
        clock_skew_max,
        space,
    };
    let lead = lead(parts, leading, stop);
    tasks.spawn_fallible("ledger", lead);
    Ok(())
}

/// What the leader needs.
struct LeaderParts {
    api: KubeApi,
    store: PageStore,
    metrics: Metrics,
    events: mpsc::Sender<Input>,
    inputs: mpsc::Receiver<Input>,
    verifier: TokenVerifier,
    clock_skew_max: Duration,
    space: space::Settings,
}

/// Runs the ledger until `stop` or until a part of it ends. Every replica watches and keeps what it is shown, so that the
/// one that comes to lead has nothing to list; only the leader decides and writes.
async fn lead(parts: LeaderParts, leading: watch::Receiver<bool>, stop: CancellationToken) -> anyhow::Result<()> {
    let LeaderParts { api, store, metrics, events, inputs, verifier, clock_skew_max, space } = parts;
    let receipts = Receipts::new().giving_way_to(store.pressure());
    let pressure = store.pressure();
    let accounts = WorkQueue::default();
    let durations = Durations::default();
    let observed = Observed::default();
    let (findings_sender, findings) = watch::channel(None);
    let (retention_sender, retention) = watch::channel(None);
    let stop = stop.child_token();
    let mut always = Tasks::new(stop.clone());

    let parts = WatchParts {
        api: api.clone(),
        store: store.clone(),
        accounts: accounts.clone(),
        observed: observed.clone(),
        metrics: metrics.clone(),
        retention: retention_sender,
        events: events.clone(),
    };
    let watch_objects = watches::run(parts, stop.clone());
    always.spawn("watches", watch_objects);
    let parts = ActorParts {
        inputs,
        leading: leading.clone(),
        store,
        receipts: receipts.clone(),
        verifier,
        metrics: metrics.clone(),
        durations: durations.clone(),
        findings: findings_sender,
        clock_skew_max,
    };
    let act = actor::run(parts, stop.clone());
    always.spawn_fallible("broker", act);

    let parts = WriterParts {
        api,
        receipts,
        accounts,
        observed,
        findings,
        metrics,
        events,
        retention,
        pressure,
        durations,
        clock_skew_max,
        space,
    };
    let writers = parts.whenever_leading(leading, &stop);
    let mut writers = std::pin::pin!(writers);
    tokio::select! {
        written = &mut writers => {
            stop.cancel();
            Ok(written.and(always.wait(STOP_LIMIT).await)?)
        }
        // One of them ended, by `stop` or before its time.
        Some(ended) = always.next() => {
            stop.cancel();
            let (rest, written) = tokio::join!(always.wait(STOP_LIMIT), writers);
            Ok(ended.and(rest).and(written)?)
        }
    }
}

/// What writes, besides the broker.
struct WriterParts {
    api: KubeApi,
    receipts: Receipts,
    accounts: WorkQueue,
    observed: Observed,
    findings: watch::Receiver<Option<Arc<Findings>>>,
    metrics: Metrics,
    events: mpsc::Sender<Input>,
    retention: watch::Receiver<Option<Retention>>,
    pressure: PressureGauge,
    durations: Durations,
    clock_skew_max: Duration,
    space: space::Settings,
}

impl WriterParts {
    /// Writes whenever this replica leads, until `stop`.
    async fn whenever_leading(
        &self,
        mut leading: watch::Receiver<bool>,
        stop: &CancellationToken,
    ) -> Result<(), TaskError> {
        while !stop.is_cancelled() {
            tokio::select! {
                // When the election has ended, the process does.
                led = leading.wait_for(|leads| *leads) => if led.is_err() { return Ok(()) },
                () = stop.cancelled() => return Ok(()),
            }
            self.while_leading(&mut leading, stop).await?;
        }
        Ok(())
    }

    /// Writes until this replica does not lead any more, or until `stop`.
    async fn while_leading(
        &self,
        leading: &mut watch::Receiver<bool>,
        stop: &CancellationToken,
    ) -> Result<(), TaskError> {
        let Self {
            api,
            receipts,
            accounts,
            observed,
            findings,
            metrics,
            events,
            retention,
            pressure,
            durations,
            clock_skew_max,
            space,
        } = self;
        let mut tasks = Tasks::new(stop.child_token());
        let term = tasks.stop_token().clone();
        metrics.set_leader(true);
        tasks.spawn("accounts", account::run(api.clone(), accounts.clone(), *clock_skew_max, term.clone()));
        let write_receipts = receipt::run(receipts.clone(), api.clone(), metrics.clone(), events.clone(), term.clone());
        tasks.spawn_fallible("receipts", write_receipts);
        tasks.spawn("spaces", space::run(api.clone(), space.clone(), durations.clone(), term.clone()));
        let look_through_receipts =
            retention::run(api.clone(), retention.clone(), receipts.clone(), pressure.clone(), term.clone());
        tasks.spawn("receipt retention", look_through_receipts);
        let show = status::run(api.clone(), observed.clone(), findings.clone(), pressure.clone(), term.clone());
        tasks.spawn("statuses", show);
        let early = tokio::select! {
            _ = leading.wait_for(|leads| !*leads) => None,
            ended = tasks.next() => ended,
        };
        metrics.set_leader(false);
        let rest = tasks.end(STEP_DOWN_LIMIT).await;
        // Nobody here writes receipts any more.
        metrics.set_write_pressure(false);
        metrics.set_receipts_pending(0);
        early.unwrap_or(Ok(())).and(rest)
    }
}

async fn connect(kubeconfig: Option<PathBuf>) -> anyhow::Result<KubeApi> {
    KubeApi::connect(kubeconfig.as_deref()).await.context("cannot connect to the cluster")
}

/// Reads or makes the credentials. At the start of a cluster the API server may answer late and roles may follow the pod,
/// so this is tried for about two minutes before the process gives up with the reason.
async fn prepare_credentials(
    api: &KubeApi,
    namespace: &str,
    dns_names: &[String],
    stop: &CancellationToken,
) -> anyhow::Result<ServerCertificate> {
    let prepare = || async {
        credentials::ensure_token_key(api, namespace).await?;
        credentials::node_link_certificate(api, namespace, dns_names, clock::wall()).await
    };
    let backoff = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(500))
        .with_max_delay(Duration::from_secs(10))
        .with_max_times(15);
    let tried = prepare.retry(backoff).notify(|error: &CredentialsError, wait| {
        tracing::warn!(error = %error_chain(error), ?wait, "Cannot prepare credentials");
    });
    tokio::select! {
        prepared = tried => prepared.context("cannot prepare credentials"),
        () = stop.cancelled() => Err(anyhow!("stopped before it was started")),
    }
}

fn leader_settings(args: LeaderArgs, namespace: &str, replica: &str) -> anyhow::Result<LeaderSettings> {
    let LeaderArgs { lease_name, lease_duration, renew_deadline, retry_period } = args;
    let settings = LeaderSettings {
        namespace: namespace.to_owned(),
        name: lease_name,
        // A restarted replica is another candidate: it must not take over the lease of its former self, whose term is over.
        identity: format!("{replica}_{:08x}", rand::random::<u32>()),
        duration: lease_duration,
        renew_deadline,
        retry_period,
    };
    settings.validate()?;
    Ok(settings)
}

/// The names by which agents reach the operator. They dial each replica behind the headless Service by its address and
/// verify `spaceport-operator.<namespace>.svc`.
fn dns_names(namespace: &str, further: Vec<String>) -> Vec<String> {
    let of_service = |service: &str| {
        [
            service.to_owned(),
            format!("{service}.{namespace}"),
            format!("{service}.{namespace}.svc"),
            format!("{service}.{namespace}.svc.cluster.local"),
        ]
    };
    let names = ["spaceport-operator", "spaceport-operator-nodelink"].into_iter().flat_map(of_service);
    names.chain(further).collect()
}

/// A token that is cancelled by SIGTERM or SIGINT.
fn stop_signal() -> anyhow::Result<CancellationToken> {
    let mut signals = StopSignals::listen()?;
    let stop = CancellationToken::new();
    let token = stop.clone();
    // Owned by the runtime: it ends with the process at the latest.
    tokio::spawn(async move {
        let signal = signals.next().await;
        tracing::info!(signal, "Stopping");
        token.cancel();
    });
    Ok(stop)
}
