//! How long the functions of a Space run, in its status.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::size::GpuSize;

/// Most functions of which a Space shows how long they run.
pub const MAX_FUNCTIONS: usize = 16;

/// How long calls of one size and declared duration ran (requirement A13). A change of less than a tenth is not written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FunctionDuration {
    /// Revision of the app that was called: the annotation `spaceport.dev/revision` of its pods.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 32))]
    pub revision: String,
    /// Size asked for.
    pub size: GpuSize,
    /// As declared.
    #[schemars(range(min = 0))]
    pub declared_milliseconds: i64,
    /// Calls that this is about: the last ones that ran to their end.
    #[schemars(range(min = 0))]
    pub calls: i32,
    /// Median.
    #[schemars(range(min = 0))]
    pub p50_milliseconds: i64,
    /// 95th percentile.
    #[schemars(range(min = 0))]
    pub p95_milliseconds: i64,
    /// Longest.
    #[schemars(range(min = 0))]
    pub max_milliseconds: i64,
    /// What would have been enough to declare: 1.5 times the 99th percentile, in whole seconds. Absent while fewer than 20
    /// calls are known, or if it is no less than what is declared.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub suggested_duration: Option<String>,
}
