//! The agent on a host without a cgroup v2 tree (N8): there can be no gate, so nothing is registered with kubelet,
//! no pod gets a device API and no broker hears of the node. The agent stays to say so on its GPUNode.

use super::*;
use crate::gate::hierarchy::HierarchyError;

/// The condition to report, if this is why there is no gate. Every other reason ends the process: it may go away by itself,
/// as kubelet's cgroup comes with kubelet.
fn finding(error: &anyhow::Error) -> Option<Finding> {
    let error = error.downcast_ref::<HierarchyError>()?;
    let HierarchyError::PureV1 { .. } = error else { return None };
    Some(Finding {
        condition: GPUNodeCondition::CgroupV2Missing,
        holds: ConditionStatus::True,
        reason: GPUNodeReason::CgroupV1Only,
        message: format!("{error}; then restart this node's agent. Until then it offers nothing to kubelet"),
        blocks: true,
    })
}

/// What is needed to report.
pub(super) struct Reporter<'a> {
    pub place: &'a PlaceArgs,
    pub cards: &'a CardArgs,
    pub nodes: &'a DeviceNodes,
}

impl Reporter<'_> {
    /// Reports until a signal. The readiness of the agent stays unmet.
    ///
    /// # Errors
    /// `error` itself if it is not of this kind, or what keeps the agent from reporting.
    pub(super) async fn run(self, error: anyhow::Error, mut tasks: Tasks) -> anyhow::Result<()> {
        let Some(finding) = finding(&error) else { return Err(error) };
        tracing::error!(reason = finding.message, "There can be no gate on this host; the agent only reports");
        let Self { place, cards, nodes } = self;
        let (_, nvml) = start_inventory(cards, nodes, &mut tasks);
        let client = client(place).await?;
        let identity =
            NodeIdentity { node: place.node.clone(), agent_instance: new_instance(), boot_id: read_boot_id()? };
        let recorded = EpochFile::new(&place.state_directory).read().context("the fence cannot be read")?;
        let (policy_sender, policy) = watch::channel(Policy::default());
        // Held until the end: a source that ends would end the report.
        let (_offered, kubelet) = watch::channel(KubeletView::default());
        let (_leases, leases) = watch::channel(View::default());
        let (_epoch, epoch) = watch::channel(recorded.unwrap_or(0));
        let (_found, findings) = watch::channel(vec![finding]);
        let inventory = nvml.inventory();
        let sources = node_status::Sources { inventory, policy, kubelet, leases, epoch, findings };
        let (policy_client, node, stop) = (client.clone(), place.node.clone(), tasks.stop_token().clone());
        let end = stop.clone();
        tasks.spawn("policy", async move { policy::run(policy_client, &node, policy_sender, end).await });
        tasks.spawn("node status", node_status::run(client, identity, sources, stop));
        wait_and_stop(tasks, None).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_host_without_a_v2_tree_is_reported_and_the_report_says_what_to_do() {
        let v1 = HierarchyError::PureV1 { root: "/sys/fs/cgroup".into(), found: "cpu, devices".to_owned() };
        let told = finding(&anyhow::Error::new(v1).context("no cgroup v2 tree")).unwrap();
        assert_eq!((told.condition, told.reason), (GPUNodeCondition::CgroupV2Missing, GPUNodeReason::CgroupV1Only));
        assert!(told.blocks && told.message.contains("systemd.unified_cgroup_hierarchy=1"), "{}", told.message);
        assert!(told.message.contains("cpu, devices"), "{}", told.message);
        let none = HierarchyError::NoPodsCgroup { root: "/".into(), looked_for: "kubepods".to_owned() };
        assert!(finding(&none.into()).is_none(), "kubelet may not have started");
        assert!(finding(&anyhow::anyhow!("another")).is_none());
    }
}
