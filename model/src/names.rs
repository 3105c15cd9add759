//! Names of the ledger and the small numbers that stand for them here.

use spaceport_core::ids::{AccountName, LeaseId, NodeName, Ticket, ulid_text};

/// Name of an account.
pub fn account(index: usize) -> AccountName {
    AccountName::new(format!("account-{index}"))
}

/// Index of an account.
pub fn account_index(name: &AccountName) -> usize {
    index(name.as_str())
}

/// Name of a node.
pub fn node(index: usize) -> NodeName {
    NodeName::new(format!("node-{index}"))
}

/// Index of a node.
pub fn node_index(name: &NodeName) -> usize {
    index(name.as_str())
}

fn index(name: &str) -> usize {
    name.rsplit('-').next().and_then(|digits| digits.parse().ok()).unwrap_or_default()
}

/// Key of a call: the `start`-th start of the agent took it.
pub fn ticket(call: usize, node: usize, start: u8) -> Ticket {
    Ticket { agent_instance: format!("agent-{node}-{start}").into(), number: call as u64 }
}

/// Name of an agent's start.
pub fn instance(node: usize, start: u8) -> String {
    format!("agent-{node}-{start}")
}

/// Which start of its agent a ticket names.
pub fn start_of(ticket: &Ticket) -> u8 {
    ticket.agent_instance.rsplit('-').next().and_then(|digits| digits.parse().ok()).unwrap_or_default()
}

/// Id of a lease. The seeds here are small, so that a number of 32 bits names a lease.
pub fn lease(number: u32) -> LeaseId {
    LeaseId::new(ulid_text(u128::from(number)))
}

/// Number of a lease: the ULID's value.
pub fn lease_number(lease: &LeaseId) -> u32 {
    const ALPHABET: &str = "0123456789abcdefghjkmnpqrstvwxyz";
    lease.as_str().chars().fold(0, |number: u32, digit| {
        let value = ALPHABET.find(digit).and_then(|value| u32::try_from(value).ok()).unwrap_or_default();
        number.wrapping_shl(5) | value
    })
}
