//! A LIST of what the operator lists before it can decide anything, by its own HTTP client and in pages as large as its
//! own, but of the answers only the bytes: what no start can be faster than.

use std::time::Instant;

use anyhow::{Context as _, Result};
use kube::api::ListParams;
use kube::core::Request;
use kube::{Client, Resource};
use serde::Deserialize;
use serde::de::IgnoredAny;
use spaceport_crds::{GPUAccount, GPUNode, GPUPool, GPUQuotaGrant, GPUTier, Space};

use super::super::cluster::Cluster;
use super::population::LIST_PAGE;
use crate::wait::now;

/// What a list took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Listed {
    pub(super) seconds: f64,
    pub(super) objects: usize,
    pub(super) bytes: usize,
}

/// What is read of an answer: where the next page begins. The objects are skipped.
#[derive(Deserialize)]
struct Page {
    metadata: PageMetadata,
    items: Vec<IgnoredAny>,
}

#[derive(Deserialize)]
struct PageMetadata {
    #[serde(default, rename = "continue")]
    rest: Option<String>,
}

/// Lists all kinds that the broker watches, one after the other: all but the accounts are few.
pub(super) fn list(cluster: &Cluster) -> Result<Listed> {
    let client = cluster.operator();
    let paths = [
        path::<GPUAccount>(),
        path::<GPUTier>(),
        path::<GPUPool>(),
        path::<GPUNode>(),
        path::<GPUQuotaGrant>(),
        path::<Space>(),
    ];
    let begin = now();
    let mut listed = Listed::default();
    for path in paths {
        let more = cluster.wait(kind(client, &path)).with_context(|| format!("cannot list {path}"))?;
        listed.objects += more.objects;
        listed.bytes += more.bytes;
    }
    Ok(Listed { seconds: seconds_since(begin), ..listed })
}

fn path<K: Resource<DynamicType = ()>>() -> String {
    K::url_path(&(), None)
}

async fn kind(client: &Client, path: &str) -> Result<Listed> {
    let mut parameters = ListParams::default().limit(LIST_PAGE);
    let mut listed = Listed::default();
    loop {
        let text = client.request_text(Request::new(path).list(&parameters)?).await?;
        let page: Page = serde_json::from_str(&text).context("the API server answered no list")?;
        listed.objects += page.items.len();
        listed.bytes += text.len();
        match page.metadata.rest.filter(|token| !token.is_empty()) {
            Some(token) => parameters.continue_token = Some(token),
            None => return Ok(listed),
        }
    }
}

fn seconds_since(begin: Instant) -> f64 {
    now().duration_since(begin).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_an_answer_only_the_place_of_the_next_page_is_read() {
        let text = r#"{"kind": "GPUAccountList", "metadata": {"resourceVersion": "7", "continue": "next"},
                       "items": [{"anything": [1, {}]}, null]}"#;
        let page: Page = serde_json::from_str(text).unwrap();
        assert_eq!((page.metadata.rest.as_deref(), page.items.len()), (Some("next"), 2));
        let last: Page = serde_json::from_str(r#"{"metadata": {}, "items": []}"#).unwrap();
        assert_eq!(last.metadata.rest, None);
    }

    /// The kinds of the broker's watches (`operator/src/ledger/watches.rs`), as the API server has them.
    #[test]
    fn the_kinds_are_those_of_the_watches() {
        assert_eq!(path::<GPUAccount>(), "/apis/spaceport.dev/v1alpha1/gpuaccounts");
        let watches = include_str!("../../../../operator/src/ledger/watches.rs");
        let watched = watches.lines().filter(|line| line.trim().starts_with("type Object = ")).count();
        assert_eq!(watched, 6, "a kind more is watched: list it too");
    }
}
