//! The status of a GPUPool: the sum of what the agents of its nodes report. Which pool has a node its agent decides, and
//! names those that have no say. Pure.

use std::sync::Arc;

use jiff::Timestamp;
use spaceport_core::ids::NodeName;
use spaceport_crds::GPUPoolStatus;
use spaceport_crds::conditions::{ConditionStatus, GPUPoolCondition, GPUPoolReason as Reason, condition};

use super::observe::NodeObserved;
use super::{holds_if, with};
use crate::ledger::findings::Findings;

/// A condition without its time.
type Found = (GPUPoolCondition, ConditionStatus, Reason, String);

/// What the pool shows at `now`, where it has shown `shown` so far.
pub fn status(
    shown: Option<&GPUPoolStatus>,
    name: &str,
    generation: i64,
    nodes: &[Arc<NodeObserved>],
    found: &Findings,
    now: Timestamp,
) -> GPUPoolStatus {
    let own: Vec<&NodeObserved> =
        nodes.iter().map(Arc::as_ref).filter(|node| node.pool.as_deref() == Some(name)).collect();
    let lost: Vec<&NodeObserved> =
        nodes.iter().map(Arc::as_ref).filter(|node| node.other_pools.iter().any(|other| other == name)).collect();
    let sum = |amount: fn(&NodeObserved) -> i64| own.iter().fold(0_i64, |sum, node| sum.saturating_add(amount(node)));
    let number = |amount: fn(&NodeObserved) -> i64| i32::try_from(sum(amount)).unwrap_or(i32::MAX);
    let conditions =
        [accepted(&own, &lost), conflicted(&lost), ready(&own, found)].map(|(kind, holds, reason, message): Found| {
            condition(kind.as_str(), holds, reason.as_str(), message, Some(generation), now)
        });
    GPUPoolStatus {
        observed_generation: Some(generation),
        nodes: number(|_| 1),
        cards: number(|node| i64::try_from(node.cards).unwrap_or(i64::MAX)),
        slots: Some(format!("{}/{}", sum(|node| node.slots.0.into()), sum(|node| node.slots.1.into()))),
        seats: number(|node| node.seats.into()),
        conditions: with(shown.map(|shown| &shown.conditions[..]).unwrap_or_default(), conditions),
    }
}

fn accepted(own: &[&NodeObserved], lost: &[&NodeObserved]) -> Found {
    let kind = GPUPoolCondition::Accepted;
    if own.is_empty() && !lost.is_empty() {
        let message = format!("older pools have all nodes that it selects ({}); it is used for none", lost.len());
        return (kind, ConditionStatus::False, Reason::OverlappingNodes, message);
    }
    (kind, ConditionStatus::True, Reason::AsExpected, format!("it is used for {} nodes", own.len()))
}

fn conflicted(lost: &[&NodeObserved]) -> Found {
    let kind = GPUPoolCondition::Conflicted;
    let Some(first) = lost.first() else {
        let message = "no older pool has a node that it selects".to_owned();
        return (kind, ConditionStatus::False, Reason::AsExpected, message);
    };
    let more = match lost.len() {
        1 => String::new(),
        count => format!(", and older pools have {} more", count - 1),
    };
    let message = format!(
        "node {} belongs to the older pool {}{more}; change the nodeSelector of one of the pools",
        first.name,
        first.pool.as_deref().unwrap_or_default()
    );
    (kind, ConditionStatus::True, Reason::OverlappingNodes, message)
}

/// Ready if one of its nodes says that it can grant leases, and is in the broker's term.
fn ready(own: &[&NodeObserved], found: &Findings) -> Found {
    let kind = GPUPoolCondition::Ready;
    let not = |reason, message| (kind, ConditionStatus::False, reason, message);
    let Some(first) = own.first() else {
        let message = "no node follows it; check its nodeSelector, and that the agent runs on the nodes that are meant \
                       (kubectl get gpunodes)";
        return not(Reason::NoNodes, message.to_owned());
    };
    if own.iter().all(|node| node.cards == 0) {
        return not(Reason::NoCards, format!("none of its {} nodes reports a card", own.len()));
    }
    let joined = |node: &NodeObserved| found.joined.contains(&NodeName::new(&node.name));
    let able = own.iter().filter(|node| node.not_ready.is_none() && joined(node)).count();
    if able > 0 {
        let message = format!("{able} of its {} nodes can grant leases", own.len());
        return (kind, holds_if(true), Reason::AsExpected, message);
    }
    let why = first.not_ready.as_deref().unwrap_or("its agent is not connected to the operator");
    not(Reason::NoReadyNode, format!("none of its {} nodes can grant a lease; node {}: {why}", own.len(), first.name))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn node(name: &str, pool: &str, others: &[&str]) -> NodeObserved {
        NodeObserved {
            name: name.to_owned(),
            pool: Some(pool.to_owned()),
            other_pools: others.iter().map(|other| (*other).to_owned()).collect(),
            cards: 2,
            slots: (1, 4),
            seats: 16,
            not_ready: None,
        }
    }

    fn of(name: &str, nodes: &[NodeObserved], joined: &[&str]) -> GPUPoolStatus {
        let nodes: Vec<Arc<NodeObserved>> = nodes.iter().cloned().map(Arc::new).collect();
        let joined: BTreeSet<NodeName> = joined.iter().map(NodeName::new).collect();
        status(None, name, 3, &nodes, &Findings { joined, ..Findings::default() }, Timestamp::UNIX_EPOCH)
    }

    /// Status and reason of a condition, and whether its message has this in it.
    fn told<'a>(status: &'a GPUPoolStatus, kind: &str, said: &str) -> (&'a str, &'a str, bool) {
        let found = status.conditions.iter().find(|found| found.type_ == kind).unwrap();
        (found.status.as_str(), found.reason.as_str(), found.message.contains(said))
    }

    #[test]
    fn a_pool_is_the_sum_of_the_nodes_that_follow_it() {
        let nodes = [node("a", "main", &[]), node("b", "main", &["young"]), node("c", "old", &["main", "young"])];
        let main = of("main", &nodes, &["a"]);
        assert_eq!((main.nodes, main.cards, main.slots.as_deref(), main.seats), (2, 4, Some("2/8"), 32));
        assert_eq!(main.observed_generation, Some(3));
        assert_eq!(told(&main, "Accepted", "2 nodes"), ("True", "AsExpected", true));
        assert_eq!(
            told(&main, "Conflicted", "node c belongs to the older pool old"),
            ("True", "OverlappingNodes", true)
        );
        assert_eq!(told(&main, "Ready", "1 of its 2"), ("True", "AsExpected", true));
        let young = of("young", &nodes, &["a"]);
        assert_eq!((young.nodes, young.slots.as_deref()), (0, Some("0/0")));
        assert_eq!(told(&young, "Accepted", "(2)"), ("False", "OverlappingNodes", true));
        assert_eq!(told(&young, "Conflicted", "and older pools have 1 more"), ("True", "OverlappingNodes", true));
        assert_eq!(told(&young, "Ready", "no node follows it"), ("False", "NoNodes", true));
    }

    #[test]
    fn a_pool_that_grants_nothing_says_why() {
        let sick = NodeObserved { not_ready: Some("NvmlHangs: reboot".to_owned()), ..node("a", "main", &[]) };
        let bare = NodeObserved { cards: 0, slots: (0, 0), ..sick.clone() };
        let away = node("a", "main", &[]);
        for (nodes, joined, reason, said) in [
            (vec![], vec![], "NoNodes", "nodeSelector"),
            (vec![bare], vec!["a"], "NoCards", "none of its 1 nodes reports a card"),
            (vec![sick], vec!["a"], "NoReadyNode", "node a: NvmlHangs: reboot"),
            (vec![away], vec!["b"], "NoReadyNode", "node a: its agent is not connected"),
        ] {
            let status = of("main", &nodes, &joined);
            assert_eq!(told(&status, "Ready", said), ("False", reason, true), "{nodes:?}");
            assert_eq!(told(&status, "Conflicted", "no older pool"), ("False", "AsExpected", true));
        }
    }
}
