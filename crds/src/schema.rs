//! The definitions as they are installed, and the schema fragments that several kinds share.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::Value;

use crate::{GPUAccount, GPULease, GPUNode, GPUPool, GPUQuotaGrant, GPUTier, Space, SpaceBuild};

/// Reasons as Kubernetes writes them.
pub(crate) const CAMEL_CASE: &str = "^[A-Z][A-Za-z0-9]*$";
/// Kubernetes' own grammar of a quantity.
const QUANTITY: &str = r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$";

/// Every kind, sorted by name, in the form in which it is installed.
///
/// `null` is taken out of the schemas: no field of ours means anything by it, and `has(self.x)` in a CEL rule would
/// otherwise be true for a field that is `null`.
pub fn all() -> Vec<CustomResourceDefinition> {
    definitions().into_iter().map(|(_, definition)| definition).collect()
}

/// The definitions with the names of their files.
pub(crate) fn definitions() -> Vec<(&'static str, CustomResourceDefinition)> {
    [
        ("gpuaccounts.yaml", GPUAccount::crd()),
        ("gpuleases.yaml", GPULease::crd()),
        ("gpunodes.yaml", GPUNode::crd()),
        ("gpupools.yaml", GPUPool::crd()),
        ("gpuquotagrants.yaml", GPUQuotaGrant::crd()),
        ("gputiers.yaml", GPUTier::crd()),
        ("spacebuilds.yaml", SpaceBuild::crd()),
        ("spaces.yaml", Space::crd()),
    ]
    .into_iter()
    .map(|(file, definition)| {
        let mut value = serde_json::to_value(&definition).expect("a definition made of strings and lists is JSON");
        without_null(&mut value);
        (file, serde_json::from_value(value).expect("taking out `nullable` leaves a definition"))
    })
    .collect()
}

fn without_null(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.remove("nullable");
            map.values_mut().for_each(without_null);
        }
        Value::Array(items) => items.iter_mut().for_each(without_null),
        _ => {}
    }
}

/// A Kubernetes quantity: `2`, `"16Gi"`, `"74625056768"`.
pub(crate) fn quantity(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "x-kubernetes-int-or-string": true, "pattern": QUANTITY })
}
