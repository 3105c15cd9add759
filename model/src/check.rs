//! The model for stateright, and its properties.

use spaceport_core::lease::Stage;
use spaceport_core::page::Ending;
use stateright::{Model, Property};

use crate::action::Action;
use crate::api::{Broken, Fate};
use crate::broker::{Broker, Leading, PAUSE_MS};
use crate::cluster::Cluster;
use crate::node::{Phase, ToNode};
use crate::world::{CallState, World};

impl Model for Cluster {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![self.begin()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        // What follows a broken rule proves nothing more.
        if world.broken.is_empty() {
            actions.extend(self.progress(world));
            actions.extend(self.faults(world));
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        Some(self.act(world, action))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = always();
        properties.extend(sometimes(&self.bounds));
        properties
    }
}

fn holds(world: &World, rule: Broken) -> bool {
    !world.broken.contains(&rule)
}

fn always() -> Vec<Property<Cluster>> {
    vec![
        Property::always("invariant 1: no page admits more than its quota", |_, world: &World| {
            holds(world, Broken::Quota)
        }),
        Property::always("invariant 2: nothing is told before it is durable", |_, world: &World| {
            holds(world, Broken::Visible)
        }),
        Property::always("invariant 3: a hold is settled exactly once", |_, world: &World| holds(world, Broken::Once)),
        Property::always("invariant 5: a page gains what its leases used", |_, world: &World| {
            holds(world, Broken::Charge)
        }),
        Property::always("invariant 6: a slot has at most one lease", |_, world: &World| {
            world.nodes.iter().all(|node| {
                let on_slot =
                    |phase| matches!(phase, Phase::Assigned | Phase::Running | Phase::Ended { freed: false, .. });
                node.leases.iter().filter(|lease| on_slot(lease.phase)).count() <= 1
            })
        }),
        Property::always("invariant 6: in calm there is room for what is ordered", |_, world: &World| {
            holds(world, Broken::Room)
        }),
        Property::always("invariant 7: no node obeys an epoch below one it has seen", |_, world: &World| {
            holds(world, Broken::Fence)
        }),
        Property::always("L2: what may be reserved counts as reserved", |_, world: &World| {
            world.may_happen_is_reserved()
        }),
        Property::always("L3: the working page is what is durable and in flight", |_, world: &World| {
            holds(world, Broken::Working)
        }),
        Property::always("L7: a fail-over ends no lease that is held", |_, world: &World| holds(world, Broken::Killed)),
        Property::always("L9: what is settled does not run", |_, world: &World| world.runs_only_what_is_held()),
        Property::always("L10: a lease that ended is settled as its node said", |_, world: &World| {
            holds(world, Broken::Report)
        }),
        Property::always("L15: no call is granted twice", |_, world: &World| holds(world, Broken::TwoGrants)),
        Property::always("the ledger takes its own events", |_, world: &World| holds(world, Broken::Misfit)),
        Property::always("L10: where nothing goes on, everything is settled", |cluster: &Cluster, world: &World| {
            cluster.is_settled(world)
        }),
        Property::always("L10: what is there is settled without a long wait", |cluster: &Cluster, world: &World| {
            cluster.is_settled_soon(world)
        }),
    ]
}

impl Cluster {
    /// The form of "eventually" that needs no fairness: a world in which nothing goes on by itself has nothing open. Only
    /// worlds with a leader of the newest term can be judged.
    pub fn is_settled(&self, world: &World) -> bool {
        if world.leader().is_none() || !world.broken.is_empty() || !self.progress(world).is_empty() {
            return true;
        }
        let answered =
            world.calls.iter().zip(&self.bounds.calls).all(|(state, call)| {
                matches!(state, CallState::Granted | CallState::Over) || world.nodes[call.node].gone
            });
        let forgotten = world.nodes.iter().all(|node| node.leases.is_empty());
        answered && forgotten && world.api.pages.iter().all(|page| page.holds.is_empty())
    }

    /// And nothing has to wait for the bound of L9 where all nodes are there.
    pub fn is_settled_soon(&self, world: &World) -> bool {
        if world.leader().is_none() || !world.broken.is_empty() || !self.ongoing(world).is_empty() {
            return true;
        }
        world.api.pages.iter().flat_map(|page| &page.holds).all(|hold| {
            let node = crate::names::node_index(&hold.node);
            world.nodes[node].gone
        })
    }
}

/// The bound of L9 has passed for it.
pub(crate) fn is_overdue(leading: &Leading, lease: &spaceport_core::ids::LeaseId) -> bool {
    let known = leading.core.leases.get(lease);
    known.is_none_or(|known| leading.moment().steady.since(known.sent) >= PAUSE_MS)
}

/// What a check is worth: that these things happen in it. Each is asked for only where the budget has the fault it needs.
fn sometimes(bounds: &crate::bounds::Bounds) -> Vec<Property<Cluster>> {
    let budget = &bounds.budget;
    let mut properties: Vec<Property<Cluster>> = vec![
        Property::sometimes("a lease is granted", |_, world: &World| world.calls.contains(&CallState::Granted)),
        Property::sometimes("a lease is settled for what it used", |_, world: &World| {
            world.api.settled.iter().any(|settled| settled.charged_ms == crate::bounds::USED_MS)
        }),
    ];
    if bounds.never_allowed {
        properties.push(Property::sometimes("a lease is refunded as a whole", |_, world: &World| {
            world.api.settled.iter().any(|settled| settled.charged_ms == 0)
        }));
    }
    if budget.terms > 0 {
        properties.extend([
            Property::sometimes("a fail-over adopts a running lease", |_, world: &World| {
                leaders(world).any(|leading| {
                    let adopted = |lease: &spaceport_core::lease::Lease| {
                        lease.stage == Stage::Running && lease.request.is_none() && lease.account.is_some()
                    };
                    leading.core.leases.values().any(adopted)
                })
            }),
            Property::sometimes("an old leader's write comes too late", |_, world: &World| {
                world.api.writes.iter().any(|write| {
                    write.fate == Fate::Conflict && write.page.epoch < world.api.pages[write.account].epoch
                })
            }),
            Property::sometimes("an old leader's write is still in time", |_, world: &World| {
                world.leader().is_some_and(|(_, leading)| {
                    let late = |(page, shown): (&crate::shared::Shared<_>, &u64)| {
                        let page: &spaceport_core::page::Page = page;
                        page.seq > *shown && page.epoch < leading.core.epoch
                    };
                    world.api.pages.iter().zip(&leading.shown).any(late)
                })
            }),
        ]);
    }
    if budget.unknown > 0 {
        properties.extend([
            Property::sometimes("a read proves a write of unknown outcome", |_, world: &World| {
                reads_of_unknown(world).any(|(page, batch)| page.write_id == batch.write_id)
            }),
            Property::sometimes("a read says nothing about a write of unknown outcome", |_, world: &World| {
                reads_of_unknown(world).any(|(page, batch)| page.seq < batch.page.seq)
            }),
        ]);
    }
    if budget.unknown > 0 && budget.terms > 0 {
        properties.push(Property::sometimes("a later write disproves one of unknown outcome", |_, world: &World| {
            reads_of_unknown(world).any(|(page, batch)| page.seq >= batch.page.seq && page.write_id != batch.write_id)
        }));
    }
    if budget.stalls > 0 {
        properties.push(Property::sometimes("an order comes too late", |_, world: &World| {
            let mut heads = world.links.iter().flatten().filter_map(|link| link.to_node.first());
            heads.any(|message| matches!(message, ToNode::Start(order) if order.stale))
        }));
    }
    if budget.pauses > 0 && (budget.cuts > 0 || budget.losses > 0) {
        properties.push(Property::sometimes("a silent node's lease expires", |_, world: &World| {
            world.api.settled.iter().any(|settled| settled.ending == Ending::Expired)
        }));
    }
    properties
}

fn leaders(world: &World) -> impl Iterator<Item = &Leading> {
    world.brokers.iter().filter_map(|broker| match &**broker {
        Broker::Leading(leading) => Some(leading),
        _ => None,
    })
}

/// Pages read for writes of unknown outcome, with those writes.
fn reads_of_unknown(
    world: &World,
) -> impl Iterator<Item = (&spaceport_core::page::Page, &spaceport_core::lease::Batch)> {
    leaders(world).flat_map(|leading| {
        leading.reads.iter().filter_map(|read| {
            let account = leading.core.accounts.get(&crate::names::account(read.account))?;
            let batch = account.in_flight.as_deref().filter(|batch| batch.unknown)?;
            Some((&**read.page.as_ref()?, batch))
        })
    })
}
