//! Pools that change while leases run (L9): what a node was ordered under stays, what it is ordered next follows.

use spaceport_core::ids::NodeName;
use spaceport_core::lease::{Command, Limits, NodeSettings};

use super::World;

/// The other pool that a node may be put into. No limit is above the defaults, which is what a new leader takes for the
/// limits of a lease of an earlier term: so they are never too short.
const QUICK: Limits = Limits { allow_limit_ms: 3_000, grace_ms: 500, clear_limit_ms: 1_000, order_ttl_ms: 4_000 };

impl World {
    /// A node is put into another pool, or its pool is edited; its leases run on, whether it is heard of or not.
    pub(super) fn change_pool(&mut self, value: u64) -> Result<(), String> {
        let node = self.node(value);
        let limits = if value >> 16 & 3 == 0 { Limits::default() } else { QUICK };
        self.limits.insert(node.clone(), limits);
        self.tell_limits(&node)?;
        if value >> 20 & 1 == 0 {
            self.cut(value)?;
        }
        self.pass((value >> 24) % 30_000)
    }

    pub(super) fn tell_limits(&mut self, node: &NodeName) -> Result<(), String> {
        let settings = NodeSettings { limits: self.limits[node], ..NodeSettings::default() };
        self.tell(Command::NodeSettings { node: node.clone(), settings })
    }
}
