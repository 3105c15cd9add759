//! The Space controller: from source to URL.
//!
//! Five steps, a file each: [`observe`] (reads), [`validate`] (pure), [`plan`] (pure, cannot fail), [`execute`] (writes),
//! [`status`] (pure, written only if it differs). The loop here decides only *when*: on every change of a Space, of its
//! Deployment or of its pods, of a tier or pool, when a phase's deadline comes, and for every Space once in a while.

pub mod declared;
pub mod durations;
pub mod events;
pub mod execute;
pub mod observe;
pub mod plan;
pub mod rules;
pub mod status;
pub mod validate;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::events::v1::Event;
use kube::ResourceExt as _;
use kube::core::DeserializeGuard;
use kube::runtime::watcher;
use serde_json::json;
use spaceport_crds::names::{API_VERSION, SPACE_LABEL};
use spaceport_crds::{GPUPool, GPUTier, Hardware, Space, SpaceStatus};
use spaceport_shell::error_chain;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::declared::{Report, Verdict};
use self::plan::LABEL_SPACE_UID;
use self::rules::Rules;
use self::status::Known;
use crate::clock;
use crate::kubeapi::{ApiError, KubeApi};
use crate::ledger::durations::Durations;
use crate::ledger::policy::{pool_of, settings_of};

/// Everything is looked at again this often, so that a lost event heals.
const RESYNC: Duration = Duration::from_secs(60);
/// First wait after a failed write or read; doubles up to the longest.
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// A cluster that is back after an outage is noticed within this time.
const BACKOFF_LAST: Duration = Duration::from_secs(60);
/// A status write is small; slower than this is an API server in trouble, and the next try comes anyway.
const STATUS_LIMIT: Duration = Duration::from_secs(10);

/// What Space pods are made of.
#[derive(Debug, Args)]
pub struct SpaceArgs {
    /// Python runtime image of Spaces.
    #[arg(long, env = "SPACEPORT_SPACE_PYTHON_IMAGE")]
    pub space_python_image: String,
    /// Image with spaceport-wait.
    #[arg(long, env = "SPACEPORT_SPACE_TOOLS_IMAGE")]
    pub space_tools_image: String,
    /// imagePullPolicy of both.
    #[arg(long, env = "SPACEPORT_SPACE_IMAGE_PULL_POLICY", default_value = "IfNotPresent")]
    pub space_image_pull_policy: String,
    /// Package index for environments; empty: the public one.
    #[arg(long, env = "SPACEPORT_SPACE_INDEX_URL", default_value = "")]
    pub space_index_url: String,
    /// Further package indexes for environments, separated by spaces.
    #[arg(long, env = "SPACEPORT_SPACE_EXTRA_INDEX_URLS", default_value = "")]
    pub space_extra_index_urls: String,
    /// Proxy for http:// while sources and environments are fetched; empty: none.
    #[arg(long, env = "SPACEPORT_SPACE_HTTP_PROXY", default_value = "")]
    pub space_http_proxy: String,
    /// The same for https://.
    #[arg(long, env = "SPACEPORT_SPACE_HTTPS_PROXY", default_value = "")]
    pub space_https_proxy: String,
    /// Hosts that are fetched from without a proxy, separated by commas.
    #[arg(long, env = "SPACEPORT_SPACE_NO_PROXY", default_value = "")]
    pub space_no_proxy: String,
    /// File with the CA bundle that environments are fetched with.
    #[arg(long, env = "SPACEPORT_SPACE_CA_BUNDLE")]
    pub space_ca_bundle: Option<PathBuf>,
    /// Domain below which every Space has its host.
    #[arg(long, env = "SPACEPORT_SPACE_DOMAIN", default_value = "spaces.example.com")]
    pub space_domain: String,
}

/// The same, read and ready.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Python runtime image.
    pub python_image: String,
    /// Image with spaceport-wait.
    pub tools_image: String,
    /// imagePullPolicy of both.
    pub image_pull_policy: String,
    /// Package index.
    pub index_url: Option<String>,
    /// Further package indexes, separated by spaces.
    pub extra_index_urls: Option<String>,
    /// Proxy for http:// while sources and environments are fetched.
    pub http_proxy: Option<String>,
    /// The same for https://.
    pub https_proxy: Option<String>,
    /// Hosts without a proxy, separated by commas.
    pub no_proxy: Option<String>,
    /// PEM text.
    pub ca_bundle: Option<String>,
    /// Domain of the hosts.
    pub domain: String,
}

/// The CA bundle cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the CA bundle {path}")]
pub struct CaBundleError {
    path: String,
    #[source]
    source: std::io::Error,
}

impl Settings {
    /// Reads what the flags name.
    ///
    /// # Errors
    /// The CA bundle cannot be read.
    pub fn read(arguments: SpaceArgs) -> Result<Self, CaBundleError> {
        let SpaceArgs {
            space_python_image,
            space_tools_image,
            space_image_pull_policy,
            space_index_url,
            space_extra_index_urls,
            space_http_proxy,
            space_https_proxy,
            space_no_proxy,
            space_ca_bundle,
            space_domain,
        } = arguments;
        let ca_bundle = space_ca_bundle
            .map(|path| {
                std::fs::read_to_string(&path)
                    .map_err(|source| CaBundleError { path: path.display().to_string(), source })
            })
            .transpose()?;
        // A chart sets every variable; an empty one is none.
        let given = |text: String| Some(text).filter(|text| !text.is_empty());
        Ok(Self {
            python_image: space_python_image,
            tools_image: space_tools_image,
            image_pull_policy: space_image_pull_policy,
            index_url: given(space_index_url),
            extra_index_urls: given(space_extra_index_urls),
            http_proxy: given(space_http_proxy),
            https_proxy: given(space_https_proxy),
            no_proxy: given(space_no_proxy),
            ca_bundle,
            domain: space_domain,
        })
    }
}

/// Namespace and name.
type Key = (String, String);

/// What the watches tell.
enum Change {
    /// All Spaces follow: at the start, and after a watch was too far behind.
    ListBegins,
    /// Those that did not are gone.
    ListEnds,
    Space(Box<Space>),
    SpaceGone(Key),
    Owned(Key),
    Tier(Box<watcher::Event<DeserializeGuard<GPUTier>>>),
    Pool(Box<watcher::Event<DeserializeGuard<GPUPool>>>),
}

struct Controller {
    api: KubeApi,
    settings: Settings,
    /// What the broker has learned; looked at with everything else of a Space.
    durations: Durations,
    /// What declared durations are judged by.
    rules: Rules,
    spaces: BTreeMap<Key, Space>,
    /// The Spaces of a list that is not complete yet.
    listing: Option<BTreeSet<Key>>,
    /// To be looked at, and when; one entry a Space.
    due: BTreeMap<Key, Instant>,
    backoff: BTreeMap<Key, Duration>,
}

/// Runs until it is told to stop. Only the leader runs it.
pub async fn run(api: KubeApi, settings: Settings, durations: Durations, stop: CancellationToken) {
    let mut changes = changes(&api);
    let mut controller = Controller::new(api, settings, durations);
    let mut resync = tokio::time::interval(RESYNC);
    loop {
        let next = controller.due.values().min().copied();
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            change = changes.next() => match change {
                Some(change) => controller.take(change),
                // The watches never end by themselves; if they did, nothing would be seen any more.
                None => return,
            },
            _ = resync.tick() => controller.everything(),
            () = sleep_until(next) => controller.reconcile_due(&stop).await,
        }
    }
}

async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

fn changes(api: &KubeApi) -> BoxStream<'static, Change> {
    fn owned<K: kube::Resource>(object: &K) -> Option<Change> {
        let name = object.meta().labels.as_ref()?.get(SPACE_LABEL)?.clone();
        Some(Change::Owned((object.meta().namespace.clone().unwrap_or_default(), name)))
    }
    fn seen<K>(event: watcher::Result<watcher::Event<K>>) -> Option<watcher::Event<K>> {
        event
            .inspect_err(
                |error| warn!(error = %error_chain(error), "a watch of the Space controller failed; it is tried again"),
            )
            .ok()
    }
    fn touched<K>(event: watcher::Result<watcher::Event<K>>) -> Option<K> {
        match seen(event)? {
            watcher::Event::Apply(object) | watcher::Event::InitApply(object) | watcher::Event::Delete(object) => {
                Some(object)
            }
            watcher::Event::Init | watcher::Event::InitDone => None,
        }
    }
    let spaces = api.cluster::<Space>().watch(watcher::Config::default()).filter_map(async |event| match event {
        Ok(watcher::Event::Init) => Some(Change::ListBegins),
        Ok(watcher::Event::InitDone) => Some(Change::ListEnds),
        Ok(watcher::Event::Delete(space)) => Some(Change::SpaceGone(key_of(&space))),
        other => touched(other).map(|space| Change::Space(Box::new(space))),
    });
    let labelled = watcher::Config::default().labels(SPACE_LABEL);
    let pods = watcher::Config::default().labels(LABEL_SPACE_UID);
    let deployments =
        api.cluster::<Deployment>().watch(labelled).filter_map(async |event| touched(event).as_ref().and_then(owned));
    let pods = api.cluster::<Pod>().watch(pods).filter_map(async |event| touched(event).as_ref().and_then(owned));
    let tiers = api.cluster::<DeserializeGuard<GPUTier>>().watch(watcher::Config::default());
    let tiers = tiers.filter_map(async |event| Some(Change::Tier(Box::new(seen(event)?))));
    let pools = api.cluster::<DeserializeGuard<GPUPool>>().watch(watcher::Config::default());
    let pools = pools.filter_map(async |event| Some(Change::Pool(Box::new(seen(event)?))));
    futures::stream::select_all([spaces.boxed(), deployments.boxed(), pods.boxed(), tiers.boxed(), pools.boxed()])
        .boxed()
}

fn key_of(space: &Space) -> Key {
    (space.namespace().unwrap_or_default(), space.name_any())
}

impl Controller {
    fn new(api: KubeApi, settings: Settings, durations: Durations) -> Self {
        let (spaces, due, backoff) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let (rules, listing) = (Rules::default(), Some(BTreeSet::new()));
        Self { api, settings, durations, rules, spaces, listing, due, backoff }
    }

    fn take(&mut self, change: Change) {
        match change {
            Change::ListBegins => self.listing = Some(BTreeSet::new()),
            Change::ListEnds => {
                let listed = self.listing.take().unwrap_or_default();
                for key in self.spaces.keys().filter(|key| !listed.contains(*key)).cloned().collect::<Vec<_>>() {
                    self.gone(&key);
                }
            }
            Change::Space(space) => {
                let key = key_of(&space);
                if let Some(listed) = &mut self.listing {
                    listed.insert(key.clone());
                }
                self.spaces.insert(key.clone(), *space);
                self.due.insert(key, clock::monotonic());
            }
            Change::SpaceGone(key) => self.gone(&key),
            Change::Owned(key) => {
                if self.spaces.contains_key(&key) {
                    self.due.insert(key, clock::monotonic());
                }
            }
            Change::Tier(event) => {
                if self.rules.take_tier(*event) {
                    self.judge_again();
                }
            }
            Change::Pool(event) => {
                if self.rules.take_pool(*event) {
                    self.judge_again();
                }
            }
        }
    }

    /// Whoever may declare a duration is looked at now: tiers and pools change seldom.
    fn judge_again(&mut self) {
        let now = clock::monotonic();
        for (key, _) in self.spaces.iter().filter(|(_, space)| space.spec.hardware == Hardware::ZeroGpu) {
            self.due.insert(key.clone(), now);
        }
    }

    /// A Space does not exist any more; what it was made of goes by its owner references.
    fn gone(&mut self, key: &Key) {
        self.spaces.remove(key);
        self.due.remove(key);
        self.backoff.remove(key);
    }

    fn everything(&mut self) {
        let now = clock::monotonic();
        // Leases of a Space that is gone end after it, and are learned from. While a list is incomplete nobody is missed.
        if self.listing.is_none() {
            let uids: BTreeSet<&str> = self.spaces.values().filter_map(|space| space.metadata.uid.as_deref()).collect();
            self.durations.keep(|uid| uids.contains(uid));
        }
        // Also those that wait for a deadline, which may be half an hour away: a lost event must not cost that. Who waits after
        // a failure waits no longer than this anyway.
        for key in self.spaces.keys() {
            self.due.insert(key.clone(), now);
        }
    }

    /// Looks at every Space whose time has come, one after the other: each costs a few small requests. Many of them, or an
    /// API server that does not answer, take longer than it may take to stop.
    async fn reconcile_due(&mut self, stop: &CancellationToken) {
        let now = clock::monotonic();
        let keys: Vec<Key> = self.due.iter().filter(|(_, due)| **due <= now).map(|(key, _)| key.clone()).collect();
        for key in keys {
            self.due.remove(&key);
            let Some(space) = self.spaces.get(&key).cloned() else { continue };
            let reconciled = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                reconciled = self.reconcile(&space) => reconciled,
            };
            match reconciled {
                Ok(status) => {
                    self.backoff.remove(&key);
                    if let Some(wake) = wake(&status) {
                        self.due.insert(key.clone(), clock::monotonic() + wake);
                    }
                    if let Some(space) = self.spaces.get_mut(&key) {
                        space.status = Some(status);
                    }
                }
                Err(error) => {
                    let wait = self.backoff.get(&key).map_or(BACKOFF_FIRST, |last| (*last * 2).min(BACKOFF_LAST));
                    warn!(namespace = key.0, space = key.1, retry_s = wait.as_secs(), error = %error_chain(&error), "cannot bring a Space further");
                    self.backoff.insert(key.clone(), wait);
                    self.due.insert(key, clock::monotonic() + wait);
                }
            }
        }
    }

    async fn reconcile(&self, space: &Space) -> Result<SpaceStatus, ApiError> {
        let namespace = space.namespace().unwrap_or_default();
        let name = space.name_any();
        let uid = space.uid().unwrap_or_default();
        let observed = observe::observe(&self.api, &namespace, &name, &uid).await?;
        let (learned, answering) = (self.durations.get(&uid), observed.answering());
        let mut known = Known { learned, answering, ..Known::default() };
        match self.claim(space) {
            Ok(host) => known.host = Some(host),
            Err(taken) => known.host_taken = Some(taken),
        }
        match validate::validate(space) {
            Err(invalid) => known.invalid = Some(invalid),
            Ok(valid) => {
                let plan = plan::plan(&valid, &self.settings);
                if space.metadata.deletion_timestamp.is_none() {
                    execute::execute(&self.api, &namespace, &plan).await?;
                }
                known.sdk = Some(valid.sdk);
                let pod = observed.current(&plan.revision);
                known.pod = pod.map(observe::progress);
                let report = known.pod.as_ref().and_then(|progress| progress.declared.as_ref());
                known.declared = match pod.zip(report) {
                    _ if !valid.zero_gpu => Verdict::Nothing,
                    Some((pod, report)) => self.judge(space, pod, report).await,
                    None => Verdict::Unseen,
                };
                known.older_answers = observed.older_answers(&plan.revision);
                known.revision = Some(plan.revision);
            }
        }
        let status = status::status(space, &known, clock::wall());
        if space.status.as_ref() != Some(&status) {
            self.write(space, &status).await?;
        }
        Ok(status)
    }

    /// What the tiers say about a report, on the cards of the pod's node. A node that cannot be read holds nothing up: what is
    /// shown stays until the next look.
    async fn judge(&self, space: &Space, pod: &Pod, report: &Report) -> Verdict {
        let Some((tiers, pools)) = self.rules.listed() else { return Verdict::Unseen };
        if report.is_empty() {
            return Verdict::Nothing;
        }
        let named = match observe::pool(&self.api, pod).await {
            Ok(named) => named,
            Err(error) => {
                warn!(space = space.name_any(), error = %error_chain(&error), "cannot read the node of a Space");
                return Verdict::Unseen;
            }
        };
        let settings = pool_of(named.as_deref(), pools).map(settings_of).unwrap_or_default();
        declared::judge(report, tiers.values(), settings, space.spec.clamp_to_remaining)
    }

    /// `<namespace>-<name>` if it is free and fits, else with six digits of the uid (docs/rules.md). A claim is never given up.
    fn claim(&self, space: &Space) -> Result<String, String> {
        if let Some(host) = space.status.as_ref().and_then(|status| status.host.clone()) {
            return Ok(host);
        }
        let taken: BTreeSet<&str> = self
            .spaces
            .values()
            .filter(|other| other.metadata.uid != space.metadata.uid)
            .filter_map(|other| other.status.as_ref()?.host.as_deref())
            .collect();
        let plain = format!("{}-{}", space.namespace().unwrap_or_default(), space.name_any());
        let digits: String = space.uid().unwrap_or_default().chars().filter(char::is_ascii_hexdigit).take(6).collect();
        // A DNS label has at most 63 characters.
        let short: String = plain.chars().take(63 - 1 - digits.len()).collect();
        let candidates = [plain, format!("{}-{digits}", short.trim_end_matches('-'))];
        candidates
            .iter()
            .filter(|label| label.len() <= 63)
            .map(|label| format!("{label}.{}", self.settings.domain))
            .find(|host| !taken.contains(host.as_str()))
            .ok_or_else(|| {
                format!("both {} and {} belong to other Spaces; rename this one", candidates[0], candidates[1])
            })
    }

    async fn write(&self, space: &Space, status: &SpaceStatus) -> Result<(), ApiError> {
        let namespace = space.namespace().unwrap_or_default();
        let name = space.name_any();
        let before = space.status.as_ref().map(|status| status.stage);
        if before != Some(status.stage) {
            info!(
                namespace,
                space = name,
                from = before.map_or("(new)", |stage| stage.as_str()),
                to = status.stage.as_str(),
                reason = status.reason.as_deref().unwrap_or_default(),
                "stage"
            );
        }
        let body = json!({
            "apiVersion": API_VERSION,
            "kind": "Space",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": space.metadata.uid,
                "resourceVersion": space.metadata.resource_version,
            },
            "status": status,
        });
        match self.api.namespace::<Space>(&namespace).put_status(&name, &body, STATUS_LIMIT).await {
            Ok(_) => {
                if let Some(message) = declared::turned_false(space.status.as_ref(), status) {
                    self.tell(&events::durations_refused(space, message, clock::wall())).await;
                }
                Ok(())
            }
            // The watch brings the newer object, and with it the next look.
            Err(ApiError::Conflict { .. } | ApiError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn tell(&self, event: &Event) {
        let namespace = event.metadata.namespace.clone().unwrap_or_default();
        if let Err(error) = self.api.namespace::<Event>(&namespace).create(event).await {
            warn!(namespace, error = %error_chain(&error), "an Event was not written");
        }
    }
}

/// When to look again without a change: at the next deadline of a phase that is awaited.
fn wake(status: &SpaceStatus) -> Option<Duration> {
    let deadline = status
        .phases
        .iter()
        .filter(|phase| phase.finished_at.is_none())
        .filter_map(|phase| phase.deadline.as_ref())
        .min()?;
    // A deadline that has passed was already acted on; the second keeps the loop from spinning on it.
    let left = deadline.0.as_millisecond().saturating_sub(clock::wall().as_millisecond());
    Some(Duration::from_millis(u64::try_from(left).unwrap_or(0)).max(Duration::from_secs(1)))
}

#[cfg(test)]
mod tests;
