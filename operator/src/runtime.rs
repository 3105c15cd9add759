//! Starts everything, and ends everything: on SIGTERM in order, and as soon as one task dies, with its reason.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use backon::{ExponentialBuilder, Retryable as _};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::account::{self, WorkQueue};
use crate::admin::{self, Readiness};
use crate::args::{Args, LeaderArgs, LedgerArgs, LogArgs, LogFormat, NodeLinkArgs, PlaceArgs};
use crate::credentials::{self, CredentialsError, ServerCertificate};
use crate::identity::{self, KeySet, TokenVerifier};
use crate::kubeapi::KubeApi;
use crate::leader::{self, LeaderSettings};
use crate::ledger::actor;
use crate::ledger::ports::{ActorParts, Input};
use crate::ledger::receipt::{self, Receipts};
use crate::ledger::retention;
use crate::ledger::store::PageStore;
use crate::ledger::watches::{self, WatchParts};
use crate::metrics::Metrics;
use crate::node_link::{self, NodeLinkParts, NodeLinkSettings};
use crate::space::{self, SpaceArgs};
use crate::{clock, error_chain};

/// How long tasks may take to end after a stop; the pod's grace period is 30 s.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Inputs that may wait for the broker. It decides tens of thousands a second; when it falls behind, agents and watches
/// wait instead of memory growing.
const INPUT_QUEUE: usize = 4096;

/// A task's name and how it ended.
type Ended = (&'static str, anyhow::Result<()>);

/// The tasks of the process; a dead one ends it.
struct Tasks {
    set: JoinSet<Ended>,
    stop: CancellationToken,
}

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
        admin_listen,
        #[cfg(feature = "faults")]
        fault,
    } = args;
    start_log(&log)?;
    #[cfg(feature = "faults")]
    crate::fault::choose(fault);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(async {
        let stop = stop_signal()?;
        let metrics = Metrics::new();
        let readiness = Readiness::default();
        let mut tasks = Tasks { set: JoinSet::new(), stop: stop.clone() };
        let listener = admin::bind(admin_listen).await?;
        let serve = admin::serve(listener, metrics.clone(), readiness.clone(), stop.clone());
        tasks.spawn("admin endpoint", async move { Ok(serve.await?) });
        let settings = Settings { place, leader, ledger, node_link, space };
        let started = start(settings, metrics, readiness, &mut tasks).await;
        if started.is_err() {
            stop.cancel();
        }
        let ended = tasks.wait().await;
        started.and(ended)
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
    let (prepared, linked) = (readiness.gate("credentials"), readiness.gate("node-link"));

    let api = connect(kubeconfig).await?;
    let dns_names = dns_names(&namespace, nodelink_dns_names);
    let certificate = prepare_credentials(&api, &namespace, &dns_names, &tasks.stop).await?;
    prepared.open();

    let (leading_sender, leading) = watch::channel(false);
    let (keys_sender, keys) = watch::channel(Arc::new(KeySet::default()));
    let (events, inputs) = mpsc::channel::<Input>(INPUT_QUEUE);
    let stop = tasks.stop.clone();

    let watch_keys = identity::watch_keys(api.clone(), namespace.clone(), keys_sender, stop.clone());
    tasks.spawn("token keys", async move {
        watch_keys.await;
        Ok(())
    });
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
    tasks.spawn("node link", async move { Ok(serve.await?) });
    linked.open();

    let elect = leader::run(api.clone(), leader, leading_sender, stop.clone());
    tasks.spawn("leader election", async move { Ok(elect.await?) });
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
    tasks.spawn("ledger", lead);
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

/// Waits until this replica leads, then runs the ledger until `stop` or until a part of it ends.
async fn lead(parts: LeaderParts, mut leading: watch::Receiver<bool>, stop: CancellationToken) -> anyhow::Result<()> {
    let LeaderParts { api, store, metrics, events, inputs, verifier, clock_skew_max, space } = parts;
    tokio::select! {
        led = leading.wait_for(|leads| *leads) => if led.is_err() {
            return Ok(());
        },
        () = stop.cancelled() => return Ok(()),
    }
    metrics.set_leader(true);
    let receipts = Receipts::new();
    let accounts = WorkQueue::default();
    let (retention_sender, retention) = watch::channel(None);
    let mut tasks = Tasks { set: JoinSet::new(), stop: stop.child_token() };
    let stop = tasks.stop.clone();

    let parts = WatchParts {
        api: api.clone(),
        store: store.clone(),
        accounts: accounts.clone(),
        metrics: metrics.clone(),
        retention: retention_sender,
        events: events.clone(),
    };
    let watch_objects = watches::run(parts, stop.clone());
    tasks.spawn("watches", async move {
        watch_objects.await;
        Ok(())
    });
    let keep_accounts = account::run(api.clone(), accounts, clock_skew_max, stop.clone());
    tasks.spawn("accounts", async move {
        keep_accounts.await;
        Ok(())
    });
    let write_receipts = receipt::run(receipts.clone(), api.clone(), metrics.clone(), events.clone(), stop.clone());
    tasks.spawn("receipts", async move { Ok(write_receipts.await?) });
    let run_spaces = space::run(api.clone(), space, stop.clone());
    tasks.spawn("spaces", async move {
        run_spaces.await;
        Ok(())
    });
    let remove_receipts = retention::run(api, retention, stop.clone());
    tasks.spawn("receipt retention", async move {
        remove_receipts.await;
        Ok(())
    });
    let parts = ActorParts { inputs, store, receipts, verifier, metrics, clock_skew_max };
    let act = actor::run(parts, stop);
    tasks.spawn("broker", async move { Ok(act.await?) });
    tasks.wait().await
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

fn start_log(args: &LogArgs) -> anyhow::Result<()> {
    let LogArgs { log_format, log_filter } = args;
    let filter = EnvFilter::try_new(log_filter).with_context(|| format!("--log-filter {log_filter:?} is no filter"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match log_format {
        LogFormat::Json => builder.json().flatten_event(true).init(),
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).init(),
    }
    Ok(())
}

/// A token that is cancelled by SIGTERM or SIGINT.
fn stop_signal() -> anyhow::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let token = stop.clone();
    // Owned by the runtime: it ends with the process at the latest.
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!(signal = "SIGTERM", "Stopping"),
            _ = interrupt.recv() => tracing::info!(signal = "SIGINT", "Stopping"),
        }
        token.cancel();
    });
    Ok(stop)
}

// === impl Tasks ===

impl Tasks {
    fn spawn(&mut self, name: &'static str, task: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        self.set.spawn(async move { (name, task.await) });
    }

    /// Waits for the first task to end, stops the others and waits for them. The first reason is the result.
    async fn wait(mut self) -> anyhow::Result<()> {
        let mut result = match self.set.join_next().await {
            Some(first) => self.judge(first),
            None => Ok(()),
        };
        self.stop.cancel();
        let rest = async {
            while let Some(ended) = self.set.join_next().await {
                let judged = self.judge(ended);
                if result.is_ok() {
                    result = judged;
                }
            }
        };
        if tokio::time::timeout(STOP_LIMIT, rest).await.is_err() {
            tracing::warn!(limit = ?STOP_LIMIT, "Some tasks did not end in time; the process ends without them");
            return result.and(Err(anyhow!("tasks did not end within {} s", STOP_LIMIT.as_secs())));
        }
        result
    }

    /// A task that ends before it is told to is dead, even without an error.
    fn judge(&self, ended: Result<Ended, tokio::task::JoinError>) -> anyhow::Result<()> {
        let stopping = self.stop.is_cancelled();
        match ended {
            Ok((name, Ok(()))) if stopping => {
                tracing::debug!(task = name, "Task ended");
                Ok(())
            }
            Ok((name, Ok(()))) => Err(anyhow!("task {name:?} ended by itself")),
            Ok((name, Err(error))) => {
                tracing::error!(task = name, error = %error_chain(error.as_ref()), "Task failed");
                Err(error.context(format!("task {name:?} failed")))
            }
            Err(error) => Err(anyhow!(error).context("a task panicked")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tasks() -> Tasks {
        Tasks { set: JoinSet::new(), stop: CancellationToken::new() }
    }

    #[tokio::test]
    async fn a_dead_task_stops_the_others_and_is_the_reason() {
        let mut tasks = tasks();
        let stop = tasks.stop.clone();
        tasks.spawn("long", async move {
            stop.cancelled().await;
            Ok(())
        });
        tasks.spawn("dead", async { Err(anyhow!("no disk")) });
        let error = tasks.wait().await.unwrap_err();
        assert_eq!(format!("{error:#}"), "task \"dead\" failed: no disk");
    }

    #[tokio::test]
    async fn a_task_that_just_ends_is_dead_too() {
        let mut tasks = tasks();
        tasks.spawn("short", async { Ok(()) });
        assert_eq!(tasks.wait().await.unwrap_err().to_string(), "task \"short\" ended by itself");
    }

    #[tokio::test]
    async fn a_stop_ends_well() {
        let mut tasks = tasks();
        let stop = tasks.stop.clone();
        let told = stop.clone();
        tasks.spawn("long", async move {
            told.cancelled().await;
            Ok(())
        });
        stop.cancel();
        assert!(tasks.wait().await.is_ok());
    }
}
