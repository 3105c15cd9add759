//! `Space`: one app, from source to URL (docs/rules.md, Space).

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::conditions::SpaceCondition;
use crate::function_duration::{FunctionDuration, MAX_FUNCTIONS};
use crate::schema::quantity;

/// Most inline files of a Space; anything larger belongs in git.
pub const MAX_INLINE_FILES: usize = 64;

string_enum! {
    /// What kind of app it is.
    Sdk default Gradio {
        /// A Gradio app: Python, no image build.
        Gradio = "gradio",
        /// A Dockerfile.
        Docker = "docker",
        /// Files served as they are.
        Static = "static",
    }
}

string_enum! {
    /// What it runs on.
    Hardware default CpuBasic {
        /// No GPU.
        CpuBasic = "cpu-basic",
        /// A GPU while a decorated function runs.
        ZeroGpu = "zero-gpu",
        /// Half a card for the whole life of the pod.
        Large = "large",
        /// A whole card for the whole life of the pod.
        Xlarge = "xlarge",
    }
}

string_enum! {
    /// Who can visit it.
    Visibility default Public {
        /// Everyone, guests too.
        Public = "public",
        /// Everyone can use the app, its source is the owner's.
        Protected = "protected",
        /// The owner and whoever may read the object.
        Private = "private",
    }
}

string_enum! {
    /// Where the app may connect to (N13). Metadata addresses and cluster ranges are denied in every case.
    EgressPolicy default Internet {
        /// Any public address.
        Internet = "Internet",
        /// The hosts of `allow` only.
        Listed = "Listed",
        /// Nowhere.
        None = "None",
    }
}

string_enum! {
    /// What a call reserves, and how long it may run (requirement A13).
    Reservation default Declared {
        /// What its function declares.
        Declared = "Declared",
        /// What calls like it have been seen to need, with a margin, if that is less: 1.5 times the 99th percentile. A call
        /// that needs more is killed there; the next one then gets more.
        Learned = "Learned",
    }
}

string_enum! {
    /// Stage of a Space, as the hosted service names them. Derived from the conditions.
    SpaceStage default Building {
        /// The source has no app file.
        NoAppFile = "NoAppFile",
        /// The configuration cannot be used, or secrets are missing.
        ConfigError = "ConfigError",
        /// Its environment is being made.
        Building = "Building",
        /// Its environment could not be made.
        BuildError = "BuildError",
        /// The app starts.
        AppStarting = "AppStarting",
        /// The app answers.
        Running = "Running",
        /// The app answers; a newer environment is being made.
        RunningBuilding = "RunningBuilding",
        /// The app answers; its successor starts.
        RunningAppStarting = "RunningAppStarting",
        /// The app ended or does not answer.
        RuntimeError = "RuntimeError",
        /// Nobody used it; a visitor wakes it.
        Sleeping = "Sleeping",
        /// Stopped by somebody, see `spec.paused`.
        Paused = "Paused",
        /// Being deleted.
        Deleting = "Deleting",
    }
}

/// An app. The front matter of its README.md is honoured; what is set here wins.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "spaceport.dev",
    version = "v1alpha1",
    kind = "Space",
    plural = "spaces",
    namespaced,
    shortname = "sp",
    category = "spaceport",
    status = "SpaceStatus",
    derive = "PartialEq",
    doc = "An app: where its source is, what it runs on, who can visit it. Written by its owner.",
    annotation("helm.sh/resource-policy", "keep"),
    printcolumn(name = "SDK", type_ = "string", json_path = ".status.sdk"),
    printcolumn(name = "Hardware", type_ = "string", json_path = ".spec.hardware"),
    printcolumn(name = "Stage", type_ = "string", json_path = ".status.stage"),
    printcolumn(name = "Since", type_ = "date", json_path = ".status.since"),
    printcolumn(name = "URL", type_ = "string", json_path = ".status.url"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.reason"),
    printcolumn(name = "Owner", type_ = "string", json_path = ".spec.owner", priority = 1),
    printcolumn(name = "Suggested", type_ = "string", json_path = ".status.suggestedDuration", priority = 1),
    printcolumn(name = "Commit", type_ = "string", json_path = ".status.commit", priority = 1),
    selectable = ".spec.hardware",
    selectable = ".status.stage"
)]
#[x_kube(
    validation = Rule::new("has(self.duplicateOf) == has(oldSelf.duplicateOf) && \
        (!has(self.duplicateOf) || self.duplicateOf == oldSelf.duplicateOf)")
        .message("duplicateOf is set once, when the Space is made"),
    validation = Rule::new("!has(self.source.image) || !has(self.sdk) || self.sdk == 'docker'")
        .message("a source that is an image needs sdk: docker, or none"),
)]
pub struct SpaceSpec {
    /// Where the app comes from.
    pub source: Source,
    /// What kind of app it is. Absent: as the front matter says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sdk: Option<Sdk>,
    /// Version of the sdk. Absent: as the front matter or the requirements say.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub sdk_version: Option<String>,
    /// Version of Python. Absent: as the front matter says.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^3\.[0-9]+(\.[0-9]+)?$"))]
    pub python_version: Option<String>,
    /// File to run, relative to the source. Absent: as the front matter says, else `app.py`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    #[x_kube(validation = Rule::new("!self.startsWith('/') && !self.contains('..')")
        .message("appFile stays inside the source"))]
    pub app_file: Option<String>,
    /// Port the app listens on. Absent: as the front matter says, else 7860.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1024, max = 65_535))]
    pub app_port: Option<i32>,
    /// Title for people. Absent: as the front matter says.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub title: Option<String>,
    /// What it runs on.
    #[serde(default)]
    pub hardware: Hardware,
    /// GPUAccount of the owner.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub owner: Option<String>,
    /// Who can visit it.
    #[serde(default)]
    pub visibility: Visibility,
    /// Environment variables.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub variables: Vec<Variable>,
    /// Secrets of the same namespace whose keys become environment variables.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub secret_refs: Vec<SecretRef>,
    /// Names of variables that must come from a secret before the app starts; remove one to waive it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 128), regex(pattern = "^[A-Za-z_][A-Za-z0-9_]*$")))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub required_secrets: Vec<String>,
    /// Unused for so long, it sleeps; -1: never.
    #[serde(default = "sleep_after_seconds")]
    #[x_kube(validation = Rule::new("self == -1 || self >= 60").message("sleepAfterSeconds is -1 (never) or at least 60"))]
    pub sleep_after_seconds: i64,
    /// From the start of the pod to the first answer.
    #[serde(default = "startup_timeout_seconds")]
    #[schemars(range(min = 10, max = 86_400))]
    pub startup_timeout_seconds: i32,
    /// Files to have before the app starts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub preload: Vec<PreloadItem>,
    /// Stops it until it is taken away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused: Option<Paused>,
    /// A later time than before restarts the app.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restarted_at: Option<Time>,
    /// A later time than before resolves and builds anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rebuild_requested_at: Option<Time>,
    /// CPU, memory and disk of one replica.
    #[serde(default)]
    pub resources: SpaceResources,
    /// Pods of it.
    #[serde(default = "replicas")]
    #[schemars(range(min = 1, max = 64))]
    pub replicas: i32,
    /// Where it may connect to.
    #[serde(default)]
    pub egress: Egress,
    /// `<namespace>/<name>` of the Space it is a copy of: same commit and lock.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 320), regex(pattern = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?/[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub duplicate_of: Option<String>,
    /// Grants min(declared, what the caller has left) as a hard limit instead of refusing (requirement A3).
    #[serde(default)]
    pub clamp_to_remaining: bool,
    /// Most leases that all calls of this Space have at once; further calls wait, with `space` in the column `WAITS`. Absent:
    /// no such limit. It is soft: leases of an earlier term of the operator count from the moment it has read their accounts.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub concurrent_leases: Option<i32>,
    /// What a call reserves, and how long it may run.
    #[serde(default)]
    pub reservation: Reservation,
}

const fn sleep_after_seconds() -> i64 {
    48 * 3600
}

const fn startup_timeout_seconds() -> i32 {
    30 * 60
}

const fn replicas() -> i32 {
    1
}

/// Where an app comes from: exactly one of these.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "[has(self.git), has(self.inline), has(self.image), has(self.archive)].filter(given, given).size() == 1"
    )
    .message("give exactly one of git, inline, image, archive"),
)]
pub struct Source {
    /// A git repository.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub git: Option<GitSource>,
    /// Files in this object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inline: Option<InlineSource>,
    /// A container image; nothing is built.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageSource>,
    /// A tar archive in a volume or behind a URL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub archive: Option<ArchiveSource>,
}

/// A git repository.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GitSource {
    /// `https://…`, `http://…`, `ssh://…` or `git://…`.
    #[schemars(length(min = 1, max = 1024), regex(pattern = r"^(https?|ssh|git)://[^\s]+$"))]
    pub url: String,
    /// Branch, tag or commit.
    #[serde(rename = "ref", default = "git_reference")]
    #[schemars(length(min = 1, max = 256), regex(pattern = "^[A-Za-z0-9_][A-Za-z0-9_./-]*$"))]
    pub reference: String,
    /// Folder within the repository. Absent: its root.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(validation = Rule::new("!self.startsWith('/') && !self.contains('..')")
        .message("path stays inside the repository"))]
    pub path: Option<String>,
    /// Secret of the same namespace with `username` and `password`, or `ssh-privatekey` and `known_hosts`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
}

fn git_reference() -> String {
    "main".to_owned()
}

/// Files in this object.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InlineSource {
    /// Text by path, for example `app.py`.
    #[schemars(extend("maxProperties" = MAX_INLINE_FILES))]
    #[x_kube(
        validation = Rule::new("size(self) > 0").message("give at least one file"),
        validation = Rule::new("self.all(path, path.matches('^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$'))")
            .message("a file's path is relative, made of letters, digits, dot, dash and underscore, and stays inside the source")
    )]
    pub files: BTreeMap<String, String>,
}

/// A container image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageSource {
    /// Reference, best with a digest.
    #[schemars(length(min = 1, max = 512))]
    pub reference: String,
    /// Pull secret of the same namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pull_secret_ref: Option<SecretRef>,
}

/// A tar archive, plain or compressed with gzip.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.url) != has(self.claimName)").message("give exactly one of url, claimName"),
    validation = Rule::new("!has(self.claimName) || has(self.path)").message("an archive in a volume needs its path"),
)]
pub struct ArchiveSource {
    /// Where to fetch it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024), regex(pattern = r"^https?://[^\s]+$"))]
    pub url: Option<String>,
    /// PersistentVolumeClaim of the same namespace that holds it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: Option<String>,
    /// Path within the volume.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(validation = Rule::new("!self.startsWith('/') && !self.contains('..')")
        .message("path stays inside the volume"))]
    pub path: Option<String>,
    /// `sha256:<hex>` it must have.
    #[schemars(length(max = 71), regex(pattern = "^sha256:[0-9a-f]{64}$"))]
    pub digest: String,
}

/// An environment variable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Variable {
    /// Its name.
    #[schemars(length(min = 1, max = 128), regex(pattern = "^[A-Za-z_][A-Za-z0-9_]*$"))]
    pub name: String,
    /// Its value.
    #[serde(default)]
    #[schemars(length(max = 32_768))]
    pub value: String,
}

/// A Secret of the same namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretRef {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Files of one repository to have before the app starts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PreloadItem {
    /// `<owner>/<name>`.
    #[schemars(length(min = 1, max = 256))]
    pub repository: String,
    /// Branch, tag or commit. Absent: the default branch.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub revision: Option<String>,
    /// Files; empty: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(min = 1, max = 512)))]
    pub files: Vec<String>,
}

/// Who stopped it and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Paused {
    /// User name of the caller; admission insists on it.
    #[schemars(length(min = 1, max = 256))]
    pub by: String,
    /// Why, in words that visitors will read.
    #[schemars(length(min = 1, max = 256))]
    pub reason: String,
    /// Since when.
    pub since: Time,
}

/// CPU, memory and disk of one replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SpaceResources {
    /// CPU.
    #[serde(default = "cpu")]
    #[schemars(schema_with = "quantity")]
    pub cpu: Quantity,
    /// Memory.
    #[serde(default = "memory")]
    #[schemars(schema_with = "quantity")]
    pub memory: Quantity,
    /// Disk that is gone with the pod.
    #[serde(default = "storage")]
    #[schemars(schema_with = "quantity")]
    pub storage: Quantity,
}

fn cpu() -> Quantity {
    Quantity("2".to_owned())
}

fn memory() -> Quantity {
    Quantity("16Gi".to_owned())
}

fn storage() -> Quantity {
    Quantity("50Gi".to_owned())
}

impl Default for SpaceResources {
    fn default() -> Self {
        Self { cpu: cpu(), memory: memory(), storage: storage() }
    }
}

/// Where an app may connect to.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(self.policy == 'Listed') == (has(self.allow) && size(self.allow) > 0)")
        .message("give allow with policy: Listed, and only then"),
)]
pub struct Egress {
    /// Where to.
    #[serde(default)]
    pub policy: EgressPolicy,
    /// Host names, or addresses as CIDR, for `Listed`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 253)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub allow: Vec<String>,
}

/// How far the app has come.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "!(self.stage in ['Building', 'AppStarting', 'RunningBuilding', 'RunningAppStarting']) || \
         (has(self.phases) && self.phases.exists(p, has(p.deadline) && !has(p.finishedAt)))",
    )
    .message("a stage that something is awaited in needs an unfinished phase with a deadline"),
)]
pub struct SpaceStatus {
    /// Where it is; derived from the conditions.
    pub stage: SpaceStage,
    /// Since when.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
    /// One line: why it is there, with the numbers; what the column shows. Typed reasons are in the conditions.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub reason: Option<String>,
    /// Host name that belongs to this Space alone; claimed once by the operator.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub host: Option<String>,
    /// Where people open it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub url: Option<String>,
    /// Generation of the spec that this is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Commit that runs, or the hash of inline files.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 80))]
    pub commit: Option<String>,
    /// The sdk, after front matter and spec.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sdk: Option<Sdk>,
    /// What it runs in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub environment: Option<EnvironmentStatus>,
    /// Name of the SpaceBuild that made it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub build: Option<String>,
    /// How long its functions run, over the last calls of each; by size and declared duration, for nothing else tells them
    /// apart.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_FUNCTIONS))]
    pub durations: Vec<FunctionDuration>,
    /// For the column: what would have been enough to declare, `12s for 60s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub suggested_duration: Option<String>,
    /// The steps, each with its start and deadline.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub phases: Vec<Phase>,
    /// SourceFetched, EnvironmentBuilt, Scheduled, Started, Healthy, Routed, Preloaded, HostClaimed, DurationsAllowed, Ready.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// One step on the way to a running app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Phase {
    /// The condition it leads to.
    pub name: SpaceCondition,
    /// When it began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When it fails if it has not ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Time>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
    /// Progress, with the numbers: `Installing 61/84 packages`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub message: Option<String>,
}

/// What an app runs in (requirement C7).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EnvironmentStatus {
    /// Hash of the lock, the base image and the Python version.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 80))]
    pub lock_hash: Option<String>,
    /// Digest or name of the base image.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub base: Option<String>,
    /// Version of Python.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub python_version: Option<String>,
    /// Version of Gradio.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub gradio_version: Option<String>,
    /// Version of the `spaces` client.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub spaces_version: Option<String>,
}
