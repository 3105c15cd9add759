//! Several replicas: one leads, and all have the same credentials.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use spaceport_operator::clock;
use spaceport_operator::credentials::{
    NODELINK_CA_CONFIG_MAP, TOKEN_KEY_SECRET, ensure_token_key, node_link_certificate,
};
use spaceport_operator::identity::{KeySet, TokenVerifier, watch_keys};
use spaceport_operator::kubeapi::KubeApi;
use spaceport_operator::leader::{self, LeaderSettings};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{SOON, connect, namespace};

struct Replica {
    leading: watch::Receiver<bool>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

fn replica(api: &KubeApi, namespace: &str, identity: &str) -> Replica {
    let settings = LeaderSettings {
        namespace: namespace.to_owned(),
        name: "operator".to_owned(),
        identity: identity.to_owned(),
        duration: Duration::from_secs(2),
        renew_deadline: Duration::from_millis(1500),
        retry_period: Duration::from_millis(300),
    };
    settings.validate().unwrap();
    let (sender, leading) = watch::channel(false);
    let stop = CancellationToken::new();
    let task = tokio::spawn(leader::run(api.clone(), settings, sender, stop.clone()));
    Replica { leading, stop, task }
}

impl Replica {
    async fn leads(&mut self) {
        tokio::time::timeout(SOON, self.leading.wait_for(|leads| *leads)).await.expect("it leads soon").unwrap();
    }
}

#[tokio::test]
async fn the_next_replica_leads_at_once_after_a_stop_and_after_the_lease_time_after_a_crash() {
    let api = connect().await;
    let namespace = namespace(&api).await;
    let mut first = replica(&api, &namespace, "first");
    first.leads().await;
    let mut second = replica(&api, &namespace, "second");
    let mut third = replica(&api, &namespace, "third");
    // Longer than the lease lasts: renewing keeps it.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(*first.leading.borrow() && !*second.leading.borrow() && !*third.leading.borrow());

    let stopped = clock::monotonic();
    first.stop.cancel();
    first.task.await.unwrap();
    tokio::select! {
        () = second.leads() => {}
        () = third.leads() => std::mem::swap(&mut second, &mut third),
    }
    assert!(stopped.elapsed() < Duration::from_secs(2), "it need not wait for the lease to end");

    let crashed = clock::monotonic();
    second.task.abort();
    third.leads().await;
    assert!(crashed.elapsed() >= Duration::from_millis(1600), "the lease of the dead has to end first");
    third.stop.cancel();
    third.task.await.unwrap();
}

#[tokio::test]
async fn a_leader_whose_lease_is_taken_stands_by_and_leads_again_when_the_thief_is_silent() {
    let api = connect().await;
    let namespace = namespace(&api).await;
    let mut first = replica(&api, &namespace, "first");
    first.leads().await;
    let leases = api.namespace::<k8s_openapi::api::coordination::v1::Lease>(&namespace);
    super::wait_for("the lease to be taken", async || {
        let mut lease = leases.get("operator").await.unwrap().unwrap();
        lease.spec.as_mut().unwrap().holder_identity = Some("thief".to_owned());
        leases.replace(&lease, SOON).await.ok()
    })
    .await;
    let stands_by = first.leading.wait_for(|leads| !*leads);
    tokio::time::timeout(SOON, stands_by).await.expect("it stands by soon").unwrap();
    // The thief never renews.
    first.leads().await;
    first.stop.cancel();
    first.task.await.unwrap();
    let lease = leases.get("operator").await.unwrap().unwrap();
    assert_eq!(lease.spec.unwrap().holder_identity.as_deref(), Some(""), "given back");
}

#[tokio::test]
async fn replicas_that_start_together_have_one_certificate_and_one_key() {
    let api = connect().await;
    let namespace = namespace(&api).await;
    let names = ["spaceport-operator".to_owned()];
    let make = || node_link_certificate(&api, &namespace, &names, clock::wall());
    let (one, two) = tokio::join!(make(), make());
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one, two);
    let map = api.namespace::<ConfigMap>(&namespace).get(NODELINK_CA_CONFIG_MAP).await.unwrap().unwrap();
    assert_eq!(map.data.unwrap()["ca.crt"], one.authority);

    let (one, two) = tokio::join!(ensure_token_key(&api, &namespace), ensure_token_key(&api, &namespace));
    one.unwrap();
    two.unwrap();
    ensure_token_key(&api, &namespace).await.unwrap();
}

#[tokio::test]
async fn a_token_signed_with_the_secret_is_good_and_no_longer_when_its_key_is_gone() {
    let api = connect().await;
    let namespace = namespace(&api).await;
    let stop = CancellationToken::new();
    let (sender, mut keys) = watch::channel(Arc::new(KeySet::default()));
    let watching = tokio::spawn(watch_keys(api.clone(), namespace.clone(), sender, stop.clone()));
    ensure_token_key(&api, &namespace).await.unwrap();

    let secret = api.namespace::<Secret>(&namespace).get(TOKEN_KEY_SECRET).await.unwrap().unwrap();
    let text = |key: &str| String::from_utf8(secret.data.as_ref().unwrap()[key].0.clone()).unwrap();
    let private = jsonwebtoken::EncodingKey::from_ed_pem(text("private.pem").as_bytes()).unwrap();
    let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::EdDSA);
    header.kid = Some(text("kid"));
    let now = clock::wall();
    let claims = serde_json::json!({"iss": "spaceport-gateway", "aud": "space-uid", "sub": "bob", "jti": "j", "root_jti": "j",
        "exp": now.as_second() + 60, "max_ms": 1000, "max_calls": 1});
    let token = jsonwebtoken::encode(&header, &claims, &private).unwrap();

    let verifier = TokenVerifier::new("spaceport-gateway", keys.clone());
    let good = async {
        while verifier.verify(&token, "space-uid", now).is_err() {
            keys.changed().await.unwrap();
        }
    };
    tokio::time::timeout(SOON, good).await.expect("the key is taken");
    let maps = api.namespace::<ConfigMap>(&namespace);
    let map = maps.get("spaceport-token-keys").await.unwrap().unwrap();
    maps.delete("spaceport-token-keys", &map.metadata.uid.unwrap()).await.unwrap();
    let bad = async {
        while verifier.verify(&token, "space-uid", now).is_ok() {
            keys.changed().await.unwrap();
        }
    };
    tokio::time::timeout(SOON, bad).await.expect("the key is given up");
    stop.cancel();
    watching.await.unwrap();
}
