use std::collections::BTreeMap;

use k8s_openapi::api::authentication::v1::UserInfo;

use super::*;

const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

fn agent() -> ServiceAccountName {
    ServiceAccountName { namespace: "spaceport-system".to_owned(), name: "agent".to_owned() }
}

fn reviewed(extra: &[(&str, &[&str])]) -> TokenReviewStatus {
    let extra =
        extra.iter().map(|(key, values)| ((*key).to_owned(), values.iter().map(|value| (*value).to_owned()).collect()));
    TokenReviewStatus {
        authenticated: Some(true),
        audiences: Some(vec![AUDIENCE.to_owned()]),
        user: Some(UserInfo {
            username: Some("system:serviceaccount:spaceport-system:agent".to_owned()),
            extra: Some(extra.collect::<BTreeMap<_, _>>()),
            ..UserInfo::default()
        }),
        error: None,
    }
}

#[test]
fn pod_bound_token_of_an_agent_proves_its_node() {
    assert_eq!(node_of(&reviewed(&[(NODE_NAME, &["gpu-1"])]), &agent()), Ok(NodeName::new("gpu-1")));
}

#[test]
fn every_other_token_is_refused_with_its_reason() {
    let good = reviewed(&[(NODE_NAME, &["gpu-1"])]);
    let not_authenticated = TokenReviewStatus { authenticated: Some(false), ..good.clone() };
    let no_audience = TokenReviewStatus { audiences: None, ..good.clone() };
    let other_audience = TokenReviewStatus { audiences: Some(vec!["kubernetes".to_owned()]), ..good.clone() };
    let other = ServiceAccountName { namespace: "default".to_owned(), name: "agent".to_owned() };
    let table = [
        (not_authenticated, agent(), "NotAuthenticated"),
        (TokenReviewStatus::default(), agent(), "NotAuthenticated"),
        (no_audience, agent(), "WrongAudience"),
        (other_audience, agent(), "WrongAudience"),
        (good, other, "WrongAccount"),
        (reviewed(&[]), agent(), "NotBound"),
        (reviewed(&[(NODE_NAME, &[])]), agent(), "NotBound"),
        (reviewed(&[(NODE_NAME, &["a", "b"])]), agent(), "NotBound"),
    ];
    for (status, account, kind) in table {
        assert_eq!(node_of(&status, &account).map_err(|reason| reason.kind()), Err(kind));
    }
}

#[test]
fn a_reader_that_does_not_read_loses_its_session() {
    let (outbound, mut receiver) = Outbound::channel(1);
    let standby = || broker_message::Message::Standby(Standby {});
    assert_eq!(outbound.send(standby()), Ok(()));
    assert_eq!(outbound.send(standby()), Err(SessionOver), "the queue is full");
    assert!(receiver.try_recv().is_ok());
    assert_eq!(outbound.send(standby()), Err(SessionOver), "and it stays over");
}

#[test]
fn a_hello_that_cannot_be_true_is_refused_with_its_reason() {
    let proved = NodeName::new("gpu-1");
    let hello = |node: &str, highest_epoch| {
        Some(node_message::Message::Hello(Hello { node: node.to_owned(), highest_epoch, ..Hello::default() }))
    };
    let refused = |first| hello_of(first, &proved).map(|hello| hello.highest_epoch).map_err(|reason| reason.kind());
    assert_eq!(refused(hello("gpu-1", EPOCH_MAX)), Ok(EPOCH_MAX));
    assert_eq!(refused(hello("gpu-1", EPOCH_MAX + 1)), Err("EpochTooHigh"));
    assert_eq!(refused(hello("gpu-1", (1 << 62) - 1)), Err("EpochTooHigh"));
    assert_eq!(refused(hello("gpu-2", 1)), Err("BadHello"));
    assert_eq!(refused(None), Err("BadHello"));
}
