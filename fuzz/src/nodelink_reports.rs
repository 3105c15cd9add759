//! What an agent says to the broker, and what the ledger does about it.

use prost::Message as _;
use spaceport_core::ids::{Epoch, NodeName, Size, Ticket};
use spaceport_core::lease::Command;
use spaceport_core::page::Page;
use spaceport_operator::ledger::node_messages;
use spaceport_proto::nodelink as link;
use spaceport_proto::nodelink::node_message::Message;

use crate::Verdict;
use crate::ledger::{AGENT, Ledger, NODE};

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
/// If a message does not survive being sent again, or the ledger stumbles over one that makes sense.
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
    ledger.wait(24 * 3600 * 1000);
    verdict
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
                ledger.request(request.ticket, size, request.declared_ms);
            }
            Message::Dequeue(dequeue) => {
                let ticket = Ticket { agent_instance: AGENT.into(), number: dequeue.ticket };
                ledger.command(Command::Dequeue { ticket });
            }
            report => panic!("a report without a command: {report:?}"),
        },
    }
    Ok(())
}
