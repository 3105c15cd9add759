//! Writes the finalizers of an account: metadata only, of the very revision that the plan is about. A page write that
//! comes first makes this one fail, and this one makes a page write fail that comes after; both look again (L2).

use std::time::Duration;

use serde_json::json;
use spaceport_crds::GPUAccount;

use super::observe::Observed;
use super::plan::{Plan, finalizers};
use crate::kubeapi::{ApiError, KubeApi};

/// Why a plan was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError {
    /// The API server did not do its part.
    #[error("the finalizers cannot be written")]
    Api(#[source] ApiError),
    /// Whether the window has ended cannot be told by this clock (L20).
    #[error("ClockSkew: this clock is {ahead_ms} ms ahead of the API server's, so no window is taken to have ended")]
    ClockSkew {
        /// How far; negative if it is behind.
        ahead_ms: i64,
    },
}

/// Carries out a plan for one revision of an account.
///
/// # Errors
/// See [`ExecuteError`].
pub async fn execute(
    api: &KubeApi,
    observed: &Observed,
    plan: Plan,
    clock_skew_max: Duration,
) -> Result<(), ExecuteError> {
    let with_ours = match plan {
        Plan::Nothing | Plan::Wait { .. } => return Ok(()),
        Plan::Keep => true,
        Plan::Release { by_clock } => {
            if by_clock {
                check_clock(api, clock_skew_max).await?;
            }
            false
        }
    };
    let metadata = json!({
        "resourceVersion": observed.resource_version,
        "finalizers": finalizers(observed, with_ours),
    });
    let accounts = api.cluster::<GPUAccount>();
    accounts.patch_metadata(observed.name.as_str(), &metadata).await.map_err(ExecuteError::Api)?;
    Ok(())
}

async fn check_clock(api: &KubeApi, clock_skew_max: Duration) -> Result<(), ExecuteError> {
    let difference = api.clock_difference().await.map_err(ExecuteError::Api)?;
    let limit_ms = u64::try_from(clock_skew_max.as_millis()).unwrap_or(u64::MAX);
    if difference.exceeds(limit_ms) {
        return Err(ExecuteError::ClockSkew { ahead_ms: difference.ahead_ms });
    }
    Ok(())
}
