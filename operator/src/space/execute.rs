//! Brings the plan to the cluster, by server-side apply. The order does not matter: everything waits for everything else.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;

use super::plan::Plan;
use crate::kubeapi::{ApiError, KubeApi};

/// Applies every object of the plan.
///
/// # Errors
/// The first write that failed; the rest comes with the next try.
pub async fn execute(api: &KubeApi, namespace: &str, plan: &Plan) -> Result<(), ApiError> {
    for config_map in plan.source.iter().chain(&plan.ca_bundle) {
        api.namespace::<ConfigMap>(namespace).apply(config_map).await?;
    }
    api.namespace::<NetworkPolicy>(namespace).apply(&plan.network_policy).await?;
    api.namespace::<Service>(namespace).apply(&plan.service).await?;
    api.namespace::<Deployment>(namespace).apply(&plan.deployment).await?;
    Ok(())
}
