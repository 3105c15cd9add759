//! What an agent says to the broker, and what the ledger does about it.

use prost::Message as _;
use spaceport_core::ids::{Epoch, NodeName, Size};
use spaceport_core::lease::{Command, Place};
use spaceport_core::page::Page;
use spaceport_core::queue::{Presented, Promised};
use spaceport_operator::ledger::node_messages;
use spaceport_proto::nodelink as link;
use spaceport_proto::nodelink::broker_message::Message as Told;
use spaceport_proto::nodelink::node_message::Message;

use crate::Verdict;
use crate::ledger::{Ledger, NODE, ticket};

/// Messages that are taken of one input.
const MESSAGES_MAX: usize = 64;
/// The term of the broker.
pub const EPOCH: Epoch = Epoch(7);

/// A ledger that has ordered two leases of one account and has a third call waiting.
pub fn ledger() -> Ledger {
    let mut ledger = Ledger::new(EPOCH);
    ledger.account(Page::default());
    for number in 1..=3 {
        ledger.request(number, Size::Large, 30_000);
    }
    ledger
}

/// Messages, each with its length before it, as gRPC's frames are.
///
/// # Panics
/// If a message does not survive being sent again, the ledger stumbles over one that makes sense, or a place or promise is
/// not what was told.
pub fn check(bytes: &[u8]) -> Verdict {
    let mut ledger = ledger();
    let mut rest = bytes;
    let mut verdict = Verdict::Refused;
    for _ in 0..MESSAGES_MAX {
        let Ok(message) = link::NodeMessage::decode_length_delimited(&mut rest) else { break };
        let again = link::NodeMessage::decode(message.encode_to_vec().as_slice());
        assert_eq!(again.as_ref(), Ok(&message), "sent again");
        let Some(message) = message.message else { continue };
        match take(&mut ledger, message) {
            // The session would be ended.
            Err(nonsense) => {
                assert!(nonsense.to_string().contains(": "), "{nonsense}");
                return Verdict::Refused;
            }
            Ok(()) => verdict = Verdict::Taken,
        }
        if ledger.is_over() || rest.is_empty() {
            break;
        }
    }
    next_term(&ledger);
    ledger.wait(24 * 3600 * 1000);
    verdict
}

/// The next leader hears of everybody who waits, here of the last one first, and each keeps its place (L17).
fn next_term(ledger: &Ledger) {
    let mut next = ledger.next_term();
    for (place, demand) in ledger.waiting().iter().rev() {
        let presented = presented(&repeated(place));
        let promised = place.latest_start_ms.filter(|wait_ms| *wait_ms > 0);
        let promised = promised.map(|wait_ms| Promised { wait_ms, ago_ms: 0 });
        let (epoch, number) = place.place;
        assert_eq!(presented, Some(Presented { epoch, number, promised }), "of {place:?}");
        let kept = next.presents(place.ticket.number, demand.size, demand.asked_ms(), presented);
        assert!(kept.is_none_or(|kept| kept == place.place), "{kept:?} after {place:?}");
    }
}

/// The request of an agent that was told this place just now.
fn repeated(place: &Place) -> link::Request {
    let Told::Queued(told) = node_messages::queued(place) else { panic!("a place is told as one") };
    link::Request {
        place_epoch: told.place_epoch,
        place_number: told.place_number,
        promised_ms: told.latest_start_ms,
        ..link::Request::default()
    }
}

/// What a request presents: a place, with or without a promise, or nothing at all.
fn presented(request: &link::Request) -> Option<Presented> {
    let presented = node_messages::presented(request);
    assert_eq!(presented.is_some(), request.place_number > 0, "{request:?}");
    let promised = presented.and_then(|presented| presented.promised);
    assert_eq!(promised.is_some(), request.place_number > 0 && request.promised_ms > 0, "{request:?}");
    presented
}

fn take(ledger: &mut Ledger, message: Message) -> Result<(), node_messages::Nonsense> {
    let node = NodeName::new(NODE);
    ledger.wait(100);
    match node_messages::command(&node, &message)? {
        Some(command) => ledger.command(command),
        None => match message {
            Message::Hello(hello) => {
                let highest_epoch = Epoch(hello.highest_epoch);
                ledger.command(Command::NodeHello { node, agent_instance: hello.agent_instance, highest_epoch });
            }
            Message::Request(request) => {
                let size = node_messages::size(request.size()).unwrap_or(Size::Large);
                ledger.presents(request.ticket, size, request.declared_ms, presented(&request));
            }
            Message::Dequeue(dequeue) => {
                ledger.command(Command::Dequeue { ticket: ticket(dequeue.ticket) });
            }
            report => panic!("a report without a command: {report:?}"),
        },
    }
    Ok(())
}
