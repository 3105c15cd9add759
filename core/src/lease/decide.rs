//! From a command to what follows from it. Reads only.

use super::Moment;
use super::command::Command;
use super::event::{Event, TermEnd};
use super::state::State;
use super::{expiry, node, pages, report, request};

/// Says what a command brings about. Handing free slots to others and beginning page writes are steps of their own, see
/// [`dispatch`](super::dispatch) and [`begin`](super::begin).
pub fn decide(at: Moment, state: &State, command: Command) -> Vec<Event> {
    if state.ended.is_some() {
        return Vec::new();
    }
    match command {
        Command::AccountSeen { account, page, policy } => pages::seen(at, state, account, page, policy),
        Command::AccountGone { account } => pages::gone(at, state, account),
        Command::Show { account } => pages::show(at, state, account),
        Command::PageWritten { account, write_id } => pages::written(at, state, account, &write_id),
        Command::PageConflict { account, write_id } => pages::conflict(state, account, &write_id),
        Command::PageUnknown { account, write_id } => pages::unknown(state, account, &write_id),
        Command::PageRead { account, page } => pages::read(at, state, account, page),
        Command::PageConfirmed { account, node, page } => pages::confirmed(at, state, account, &node, page),
        Command::PageFailed { account, write_id } => pages::failed(at, state, account, &write_id),
        Command::ReceiptWritten { account, lease } => pages::receipt_written(at, state, account, lease),

        Command::NodeSettings { node, settings } => {
            let known = state.nodes.get(&node).is_some_and(|known| known.settings == settings);
            if known { Vec::new() } else { vec![Event::NodeConfigured { node, settings }] }
        }
        Command::SpaceSettings { space, settings } => {
            let known = state.space_settings(&space) == settings;
            if known { Vec::new() } else { vec![Event::SpaceConfigured { space, settings }] }
        }
        // L6: a node that has seen a later term refuses everything of ours.
        Command::NodeHello { highest_epoch, .. } if highest_epoch > state.epoch => {
            vec![Event::TermEnded(TermEnd::NodeAhead { epoch: highest_epoch })]
        }
        Command::NodeHello { node, agent_instance, .. } => node::hello(at, state, node, agent_instance),
        // The node speaks of another term: it has not accepted this one.
        Command::NodeJoined { epoch, .. } if epoch != state.epoch => Vec::new(),
        Command::NodeJoined { node, cards, leases, idle, .. } => node::joined(at, state, node, cards, leases, idle),
        Command::Heartbeat { node, cards, idle } => node::heartbeat(state, node, cards, idle),
        Command::NodeDisconnected { node } => node::disconnected(at, state, node),

        Command::Request(request) => request::request(at, state, *request),
        Command::Dequeue { ticket } => request::dequeue(at, state, &ticket),

        Command::Started { node, lease, slot } => report::started(state, &node, lease, slot),
        Command::Refused { node, lease } => report::refused(at, state, &node, &lease),
        Command::Running { node, lease } => report::running(state, &node, lease),
        Command::Ended { node, lease, report, kept } => report::ended(at, state, &node, &lease, report, kept),
        Command::Freed { node, lease, how } => report::freed(state, &node, lease, how),

        Command::ClockJudged { off_ms } if off_ms == state.clock_off_ms => Vec::new(),
        Command::ClockJudged { off_ms } => vec![Event::ClockJudged { off_ms }],
        Command::Tick => expiry::tick(at, state),
    }
}
