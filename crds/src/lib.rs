//! The custom resources of Spaceport: group `spaceport.dev`, version `v1alpha1` (docs/rules.md).
//!
//! One module a kind: its types, its CEL rules, its printer columns. [`conditions`] holds every condition type and
//! every reason, so that no other crate spells one as a string. [`all`] gives the definitions as they are
//! installed; [`yaml_files`] and [`reference_markdown`] are what `cargo xtask gen` writes to disk.
//!
//! Conventions (docs/rules.md): times are timestamps, amounts are int64 `…Milliseconds` or `…Seconds`; strings that repeat
//! a number exist for printer columns only and nothing decides from them.

#![allow(
    clippy::duplicated_attributes,
    reason = "it takes `type_ = \"string\"` of two printer columns for one attribute"
)]

#[macro_use]
mod string_enum;

pub mod conditions;
pub mod function_duration;
pub mod gpu_account;
pub mod gpu_lease;
pub mod gpu_node;
pub mod gpu_pool;
pub mod gpu_quota_grant;
pub mod gpu_tier;
pub mod names;
mod reference;
mod schema;
pub mod size;
pub mod space;
pub mod space_build;
mod yaml;

pub use function_duration::FunctionDuration;
pub use gpu_account::{
    Budget, BudgetRow, ClosedLease, CookieRow, CookieWindow, GPUAccount, GPUAccountSpec, GPUAccountStatus, GrantRow,
    Hold, Identity, LastDenial, Part, RecentOutcome, Shortened, Window,
};
pub use gpu_lease::{GPULease, GPULeaseSpec, LeaseBoundaries, LeasePhase, LeasePlace, WaitReason};
pub use gpu_node::{
    Card, CardHealth, CardUse, Cordon, CordonScope, GPUNode, GPUNodeSpec, GPUNodeStatus, Seats, Slot, SlotState,
};
pub use gpu_pool::{
    CardSelection, DedicatedCards, GPUPool, GPUPoolSpec, GPUPoolStatus, Isolation, LargeShare, PriorityClass,
    PriorityClasses, QueueBounds, ReceiptTiming, Receipts, SelectCards, SizeMapping, SlicingMode, TimeSharedCards,
    Weights,
};
pub use gpu_quota_grant::{GPUQuotaGrant, GPUQuotaGrantSpec, GPUQuotaGrantStatus, GrantKind};
pub use gpu_tier::{
    AuthenticatedAs, Callers, Extendable, GPUTier, GPUTierSpec, GPUTierStatus, IdentityRule, Priority, WindowPolicy,
};
pub use reference::reference_markdown;
pub use schema::all;
pub use size::GpuSize;
pub use space::{
    ArchiveSource, Egress, EgressPolicy, EnvironmentStatus, GitSource, Hardware, ImageSource, InlineSource, Paused,
    Phase, PreloadItem, Reservation, Sdk, SecretRef, Source, Space, SpaceResources, SpaceSpec, SpaceStage, SpaceStatus,
    Variable, Visibility,
};
pub use space_build::{
    BuildFailure, BuildLane, BuildLog, BuildPhase, BuildStage, BuildTrigger, FailureClass, SpaceBuild, SpaceBuildSpec,
    SpaceBuildStatus,
};
pub use yaml::yaml_files;
