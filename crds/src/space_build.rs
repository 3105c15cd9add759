//! `SpaceBuild`: one build of one Space (docs/rules.md). Written by the operator; the last few are kept.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema::CAMEL_CASE;

string_enum! {
    /// How an app becomes startable (docs/rules.md, Three lanes).
    BuildLane default Environment {
        /// A: a locked Python environment, no image.
        Environment = "Environment",
        /// B: an image from a Dockerfile.
        Image = "Image",
        /// C: an image that exists already.
        Reference = "Reference",
    }
}

string_enum! {
    /// Why a build was made.
    BuildTrigger default SourceChanged {
        /// The source has another commit.
        SourceChanged = "SourceChanged",
        /// The spec changed in a way that matters for the build.
        SpecChanged = "SpecChanged",
        /// `rebuildRequestedAt`: everything is resolved anew.
        RebuildRequested = "RebuildRequested",
        /// The base image changed.
        BaseChanged = "BaseChanged",
    }
}

string_enum! {
    /// Where a build is.
    BuildStage default Queued {
        /// Waits for a builder.
        Queued = "Queued",
        /// A builder works on it.
        Running = "Running",
        /// Its result can be started.
        Succeeded = "Succeeded",
        /// It ended with an error.
        Failed = "Failed",
        /// Somebody or a newer build stopped it.
        Cancelled = "Cancelled",
    }
}

string_enum! {
    /// Whose fault a failure is (requirement C8).
    FailureClass default PlatformFault {
        /// The app's code or requirements.
        UserCode = "UserCode",
        /// The Space's configuration.
        Configuration = "Configuration",
        /// Not enough of something here.
        Capacity = "Capacity",
        /// Ours.
        PlatformFault = "PlatformFault",
    }
}

/// What is built. Immutable: another build is another object.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "spaceport.dev",
    version = "v1alpha1",
    kind = "SpaceBuild",
    plural = "spacebuilds",
    namespaced,
    shortname = "spb",
    category = "spaceport",
    status = "SpaceBuildStatus",
    derive = "PartialEq",
    doc = "One build of a Space: commit, lock, lane, phases with times, where its log is. Written by the operator; the last few are kept.",
    annotation("helm.sh/resource-policy", "keep"),
    printcolumn(name = "Space", type_ = "string", json_path = ".spec.space"),
    printcolumn(name = "Lane", type_ = "string", json_path = ".spec.lane"),
    printcolumn(name = "Commit", type_ = "string", json_path = ".spec.commit"),
    printcolumn(name = "Stage", type_ = "string", json_path = ".status.stage"),
    printcolumn(name = "Took", type_ = "string", json_path = ".status.took"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.reason"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Trigger", type_ = "string", json_path = ".spec.trigger", priority = 1),
    printcolumn(name = "Lock", type_ = "string", json_path = ".status.lockHash", priority = 1),
    selectable = ".spec.space"
)]
#[x_kube(validation = Rule::new("self == oldSelf").message("a build is immutable: another build is another object"))]
pub struct SpaceBuildSpec {
    /// Name of the Space, in the namespace of this object.
    #[schemars(length(min = 1, max = 253))]
    pub space: String,
    /// uid of that Space.
    #[serde(rename = "spaceUID")]
    #[schemars(length(min = 1, max = 64))]
    pub space_uid: String,
    /// Generation of the Space's spec that is built.
    #[schemars(range(min = 1))]
    pub space_generation: i64,
    /// Commit, or the hash of inline files.
    #[schemars(length(min = 1, max = 80))]
    pub commit: String,
    /// Lane.
    pub lane: BuildLane,
    /// Why.
    pub trigger: BuildTrigger,
    /// Lock to use instead of resolving: of the Space this one is a copy of, or of the build before.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 80))]
    pub lock_hash: Option<String>,
}

/// How far it has come.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(self.stage == 'Failed') == has(self.failure)")
        .message("a failed build says why, and no other does"),
    validation = Rule::new("!(oldSelf.stage in ['Succeeded', 'Failed', 'Cancelled']) || self.stage == oldSelf.stage")
        .message("a build ends once"),
)]
pub struct SpaceBuildStatus {
    /// Generation of the spec that this is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Where it is.
    pub stage: BuildStage,
    /// One line with the numbers; what the column shows.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub reason: Option<String>,
    /// Hash of lock, base and Python version.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 80))]
    pub lock_hash: Option<String>,
    /// Digest of the image, for the lanes that have one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub image: Option<String>,
    /// Who builds it: name of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub builder: Option<String>,
    /// When a builder took it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When it fails if it has not ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Time>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
    /// How long it took, for the column: `41s`. Empty until it has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub took: Option<String>,
    /// The steps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub phases: Vec<BuildPhase>,
    /// Where its log is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<BuildLog>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<BuildFailure>,
    /// SourceFetched, Locked, Built, Stored, Complete.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// One step of a build.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BuildPhase {
    /// The condition it leads to.
    pub name: crate::conditions::SpaceBuildCondition,
    /// When it began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When it fails if it has not ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Time>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
    /// Progress, with the numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub message: Option<String>,
}

/// Where a log is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BuildLog {
    /// Pod that wrote it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub pod: Option<String>,
    /// Container of that pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub container: Option<String>,
    /// Key in the log store, once it is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub key: Option<String>,
    /// Bytes left out between head and tail.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub omitted_bytes: i64,
}

/// Why a build failed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BuildFailure {
    /// Whose fault.
    pub class: FailureClass,
    /// A reason (`SpaceBuildReason`).
    #[schemars(length(min = 1, max = 64), regex(pattern = CAMEL_CASE))]
    pub reason: String,
    /// What happened, to what, with the numbers.
    #[schemars(length(max = 1024))]
    pub message: String,
    /// The last lines of the log.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 20), inner(length(max = 512)))]
    pub evidence: Vec<String>,
    /// The one thing to do next.
    #[schemars(length(max = 512))]
    pub next_action: String,
}
