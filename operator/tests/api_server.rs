//! What only a real API server can show: compare-and-swap, terms, leader election, token review, receipts.
//!
//! `cargo xtask test api` runs them, with SPACEPORT_TEST_KUBECONFIG naming an API
//! server that no operator works on. The definitions are installed by the tests.
#![cfg(feature = "api-server")]
#![allow(clippy::unwrap_used, clippy::panic)] // A test fails by panicking, its helpers too.

#[path = "api_server/link.rs"]
mod link;
#[path = "api_server/pages.rs"]
mod pages;
#[path = "api_server/receipts.rs"]
mod receipts;
#[path = "api_server/replicas.rs"]
mod replicas;

use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use spaceport_operator::kubeapi::{ApiError, KubeApi};
use tokio::sync::mpsc;

/// Longest wait for anything that must happen.
const SOON: Duration = Duration::from_secs(20);

fn kubeconfig() -> PathBuf {
    #[allow(clippy::disallowed_methods)] // A test takes its cluster from the environment; it has no command line.
    std::env::var_os("SPACEPORT_TEST_KUBECONFIG").expect("SPACEPORT_TEST_KUBECONFIG names a kubeconfig").into()
}

/// A client for what the operator itself never does.
async fn client() -> kube::Client {
    let file = kube::config::Kubeconfig::read_from(kubeconfig()).unwrap();
    kube::Client::try_from(kube::Config::from_custom_kubeconfig(file, &Default::default()).await.unwrap()).unwrap()
}

/// A connection to an API server that has the definitions.
async fn connect() -> KubeApi {
    let api = KubeApi::connect(Some(&kubeconfig())).await.unwrap();
    let definitions = api.cluster::<CustomResourceDefinition>();
    for definition in spaceport_crds::all() {
        definitions.apply(&definition).await.unwrap();
    }
    let is_established = |definition: CustomResourceDefinition| {
        let conditions = definition.status.and_then(|status| status.conditions).unwrap_or_default();
        conditions.iter().any(|condition| condition.type_ == "Established" && condition.status == "True")
    };
    wait_for("definitions", async || {
        let found = definitions.list(None).await.unwrap();
        let ours = found.into_iter().filter(|definition| definition.spec.group == "spaceport.dev");
        (ours.filter(|definition| is_established(definition.clone())).count() == spaceport_crds::all().len())
            .then_some(())
    })
    .await;
    api
}

/// A name that no other run of the tests uses.
fn fresh(name: &str) -> String {
    format!("{name}-{:08x}", rand::random::<u32>())
}

/// A namespace of the test's own.
async fn namespace(api: &KubeApi) -> String {
    let name = fresh("test");
    let namespace = Namespace {
        metadata: ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() },
        ..Namespace::default()
    };
    match api.cluster::<Namespace>().create(&namespace).await {
        Ok(_) | Err(ApiError::Exists { .. }) => name,
        Err(error) => panic!("{}", spaceport_shell::error_chain(&error)),
    }
}

/// Looks again and again until there is something, for at most [`SOON`].
async fn wait_for<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(SOON, looking).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

/// The next event that fits, for at most [`SOON`]; others are passed over.
async fn next<E, T>(what: &str, events: &mut mpsc::Receiver<E>, mut fits: impl FnMut(E) -> Option<T>) -> T {
    let receiving = async {
        loop {
            let event = events.recv().await.unwrap_or_else(|| panic!("nobody is left to say {what}"));
            if let Some(found) = fits(event) {
                return found;
            }
        }
    };
    tokio::time::timeout(SOON, receiving).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}
