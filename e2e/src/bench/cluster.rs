//! The API server through the operator's HTTP client, for what kubectl does one by one and slowly: a thousand accounts.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt as _};
use serde_json::{Value, json};
use spaceport_crds::names::BREAK_GLASS_ANNOTATION;
use spaceport_crds::{GPUAccount, GPULease, LeasePhase};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::kubectl::setting;
use crate::story::NAMESPACE;
use crate::wait::now;

/// Pages are written by nobody else (policy spaceport-ledger-pages).
const OPERATOR: &str = "system:serviceaccount:spaceport-system:spaceport-operator";
/// Requests at the same time where their number is not what is measured: as many as the writers of the measurement.
pub(super) const AT_ONCE: usize = 16;
/// From the request to delete an account to its end: its receipts follow off the critical path, and several hundred may be
/// under way when the load ends.
const REMOVAL_LIMIT: Duration = Duration::from_secs(90);
/// Between two tries to remove what is left.
const REMOVAL_PAUSE: Duration = Duration::from_millis(500);

/// Clients of the API server, and what drives them beside the thread that waits.
pub(super) struct Cluster {
    runtime: Runtime,
    /// As whoever runs the benchmark.
    admin: Client,
    /// As the operator.
    operator: Client,
}

impl Cluster {
    pub(super) fn connect() -> Result<Self> {
        // Connections are driven beside the thread that waits, as in the operator, and live through its pauses.
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(2).enable_all().build().context("no runtime for the HTTP client")?;
        let (admin, operator) = runtime.block_on(async {
            let operator = client(Some(OPERATOR)).await;
            anyhow::Ok((client(None).await?, operator?))
        })?;
        Ok(Self { runtime, admin, operator })
    }

    /// The client that writes pages.
    pub(super) fn operator(&self) -> &Client {
        &self.operator
    }

    /// Waits for one request.
    pub(super) fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// The client of whoever runs the benchmark.
    pub(super) fn admin(&self) -> &Client {
        &self.admin
    }

    /// Does the work of each item, [`AT_ONCE`] of them at a time, and gives the results in any order. The first error
    /// ends it.
    pub(super) fn each<T, R, F>(&self, items: Vec<T>, work: impl Fn(T) -> F) -> Result<Vec<R>>
    where
        F: Future<Output = Result<R>> + Send + 'static,
        R: Send + 'static,
    {
        self.each_of(items, AT_ONCE, work)
    }

    /// The same with another number at a time.
    pub(super) fn each_of<T, R, F>(&self, items: Vec<T>, at_once: usize, work: impl Fn(T) -> F) -> Result<Vec<R>>
    where
        F: Future<Output = Result<R>> + Send + 'static,
        R: Send + 'static,
    {
        self.runtime.block_on(async {
            let mut items = items.into_iter();
            let mut under_way: JoinSet<Result<R>> = items.by_ref().take(at_once).map(&work).collect();
            let mut done = Vec::new();
            // Bounded by the items.
            while let Some(ended) = under_way.join_next().await {
                done.push(ended.context("a request died")??);
                if let Some(item) = items.next() {
                    under_way.spawn(work(item));
                }
            }
            Ok(done)
        })
    }

    /// Makes the accounts.
    pub(super) fn create(&self, accounts: Vec<Value>) -> Result<()> {
        let api = Api::<GPUAccount>::all(self.admin.clone());
        let create = |account: Value| {
            let api = api.clone();
            async move {
                let account: GPUAccount = serde_json::from_value(account)?;
                api.create(&PostParams::default(), &account).await?;
                Ok(())
            }
        };
        self.each(accounts, create).context("the accounts cannot be made")?;
        Ok(())
    }

    /// Names of the accounts that there are.
    pub(super) fn accounts(&self) -> Result<Vec<String>> {
        let api = Api::<GPUAccount>::all(self.admin.clone());
        let accounts = self.wait(api.list_metadata(&ListParams::default())).context("cannot list the accounts")?;
        Ok(accounts.items.iter().map(|account| account.name_any()).collect())
    }

    /// Removes the accounts that `is_ours` and their receipts.
    pub(super) fn remove(&self, is_ours: impl Fn(&str) -> bool) -> Result<()> {
        let receipts = Api::<GPULease>::namespaced(self.admin.clone(), NAMESPACE);
        let found = self.wait(receipts.list(&ListParams::default())).context("cannot list the receipts")?;
        let ours: Vec<GPULease> = found.items.into_iter().filter(|receipt| is_ours(&receipt.spec.account)).collect();
        self.end_open(&ours)?;
        let delete = |receipt: GPULease| {
            let receipts = receipts.clone();
            async move {
                gone(receipts.delete(&receipt.name_any(), &DeleteParams::default()).await.map(drop))?;
                Ok(())
            }
        };
        self.each(ours, delete).context("the receipts cannot be removed")?;
        self.remove_accounts(is_ours)
    }

    /// Ends the receipts of holds that the benchmark itself wrote on a page: nobody else does.
    fn end_open(&self, receipts: &[GPULease]) -> Result<()> {
        let open = receipts.iter().filter(|receipt| receipt.spec.phase == LeasePhase::Reserved);
        let names: Vec<String> = open.map(|receipt| receipt.name_any()).collect();
        let api = Api::<GPULease>::namespaced(self.operator.clone(), NAMESPACE);
        let patch = json!({ "spec": {
            "phase": "Expired", "outcome": "Expired",
            "usedMilliseconds": 0, "chargedMilliseconds": 0, "used": "0s", "charged": "0s",
        } });
        let end = |name: String| {
            let (api, patch) = (api.clone(), patch.clone());
            async move {
                api.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
                Ok(())
            }
        };
        self.each(names, end).context("an open receipt cannot be ended")?;
        Ok(())
    }

    fn remove_accounts(&self, is_ours: impl Fn(&str) -> bool) -> Result<()> {
        let api = Api::<GPUAccount>::all(self.admin.clone());
        let ours = || -> Result<Vec<String>> {
            let mut names = self.accounts()?;
            names.retain(|name| is_ours(name));
            Ok(names)
        };
        let break_glass = json!({ "metadata": { "annotations": { BREAK_GLASS_ANNOTATION: "end of a benchmark" } } });
        let delete = |name: String| {
            let (api, patch) = (api.clone(), break_glass.clone());
            async move {
                gone(api.patch_metadata(&name, &PatchParams::default(), &Patch::Merge(&patch)).await.map(drop))?;
                gone(api.delete(&name, &DeleteParams::default()).await.map(drop))?;
                Ok(())
            }
        };
        self.each(ours()?, delete).context("the accounts cannot be deleted")?;
        // A finalizer keeps an account until its window has ended, a day (L4). These were made to be thrown away, which
        // the API server allows as soon as nothing of them is open.
        let release = |name: String| {
            let api = api.clone();
            async move {
                let patch = json!({ "metadata": { "finalizers": null } });
                let patched = api.patch_metadata(&name, &PatchParams::default(), &Patch::Merge(&patch)).await;
                // Refused while something is open, with a reason that may be the last thing to tell.
                Ok(gone(patched.map(drop)).err().map(|error| format!("{name}: {error}")))
            }
        };
        let end = now() + REMOVAL_LIMIT;
        loop {
            let left = ours()?;
            if left.is_empty() {
                return Ok(());
            }
            let refused: Vec<String> = self.each(left, release)?.into_iter().flatten().collect();
            let limit = REMOVAL_LIMIT.as_secs();
            ensure!(now() < end, "accounts are still there after {limit} s: {:?}", refused.first());
            if !refused.is_empty() {
                std::thread::sleep(REMOVAL_PAUSE);
            }
        }
    }
}

/// What is not there need not be removed.
fn gone(result: Result<(), kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => other,
    }
}

async fn client(impersonated: Option<&str>) -> Result<Client> {
    let path = setting("KUBECONFIG")?;
    let file = Kubeconfig::read_from(&path).context("cannot read the kubeconfig")?;
    let mut config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    config.auth_info.impersonate = impersonated.map(str::to_owned);
    // A write that the client repeats by itself is not one write.
    config.default_retry = false;
    Client::try_from(config).context("cannot make a client from the kubeconfig")
}
