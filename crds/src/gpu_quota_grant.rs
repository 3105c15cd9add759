//! `GPUQuotaGrant`: extra seconds for one account, with expiry and reason (docs/rules.md; L1, L12).

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

string_enum! {
    /// Why seconds are given.
    GrantKind default Credit {
        /// Bought or given.
        Credit = "Credit",
        /// Given back by hand; platform faults are refunded without it.
        Refund = "Refund",
        /// For an occasion, such as a course.
        Event = "Event",
    }
}

/// Extra seconds. Immutable: the account's page holds a copy, and a grant that changed would make that copy a lie.
/// Delete it and write another.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "spaceport.dev",
    version = "v1alpha1",
    kind = "GPUQuotaGrant",
    plural = "gpuquotagrants",
    shortname = "ggrant",
    category = "spaceport",
    status = "GPUQuotaGrantStatus",
    derive = "PartialEq",
    doc = "Extra GPU seconds for one account, with an expiry and a reason. Immutable; written by an admin.",
    annotation("helm.sh/resource-policy", "keep"),
    printcolumn(name = "Account", type_ = "string", json_path = ".spec.account"),
    printcolumn(name = "GPU-Seconds", type_ = "integer", json_path = ".spec.gpuSeconds"),
    printcolumn(name = "Kind", type_ = "string", json_path = ".spec.kind"),
    printcolumn(name = "Used", type_ = "string", json_path = ".status.used"),
    printcolumn(name = "Expires", type_ = "string", json_path = ".spec.expiresAt"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".spec.reason"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    selectable = ".spec.account"
)]
#[x_kube(
    validation = Rule::new("self == oldSelf")
        .message("a grant is immutable: delete it and write another (L1)"),
)]
pub struct GPUQuotaGrantSpec {
    /// GPUAccount that gets them.
    #[schemars(length(min = 1, max = 253))]
    pub account: String,
    /// How many, weighted.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub gpu_seconds: i64,
    /// What is not used by then is gone; open leases keep what they hold.
    pub expires_at: Time,
    /// What kind of grant it is.
    pub kind: GrantKind,
    /// Why, in words the user will read.
    #[schemars(length(min = 1, max = 256))]
    pub reason: String,
}

/// What became of the grant.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GPUQuotaGrantStatus {
    /// Generation of the spec that this is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Charged so far, weighted. A copy: the truth is the row on the account's page.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub used_milliseconds: i64,
    /// `usedMilliseconds` for the column.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub used: Option<String>,
    /// Applied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
