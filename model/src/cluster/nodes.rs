//! What nodes say and did, and what must be true of it.

use std::sync::Arc;

use super::Cluster;
use crate::api::Broken;
use crate::bounds::Fault;
use crate::node::{Phase, Told};
use crate::world::{CallState, World};

impl Cluster {
    /// What a node says and did.
    pub fn hear(&self, world: &mut World, node: usize, told: Told) {
        if told.no_room && world.spent.is_calm() {
            world.break_rule(Broken::Room);
        }
        if let Some(broken) = told.broken {
            world.break_rule(broken);
        }
        for call in told.granted {
            if world.calls[usize::from(call)] == CallState::Granted {
                world.break_rule(Broken::TwoGrants);
            }
            world.calls[usize::from(call)] = CallState::Granted;
        }
        for call in told.denied.into_iter().chain(told.cut) {
            world.calls[usize::from(call)] = CallState::Over;
        }
        self.note_ends(world, node);
        if let Some(broker) = world.nodes[node].leader
            && world.links[broker][node].up
        {
            world.link(broker, node).to_broker.extend(told.messages);
        }
        if self.fault() == Fault::ReportOnce {
            world.node(node).forget_reported();
        }
    }

    fn note_ends(&self, world: &mut World, node: usize) {
        for known in &Arc::clone(&world.nodes[node]).leases {
            let Phase::Ended { ending, .. } = known.phase else { continue };
            let is_settled = world.api.settled(known.lease).is_some();
            if let Err(at) = world.ended.binary_search_by_key(&known.lease, |(lease, _)| *lease)
                && !is_settled
            {
                world.ended.insert(at, (known.lease, ending));
            }
        }
    }

    /// A node loses its records: what it would have said, nobody will hear.
    pub fn forget_ends(&self, world: &mut World, node: usize) {
        let lost = Arc::clone(&world.nodes[node]);
        world.ended.retain(|(lease, _)| !lost.leases.iter().any(|known| known.lease == *lease));
    }
}
