//! What will happen, in the order of virtual time.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::rc::Rc;

use spaceport_core::ids::{AccountName, Epoch, LeaseId, NodeName, Ticket};
use spaceport_core::lease::Request;
use spaceport_core::page::{Closed, Ending};

use crate::links::LinkId;
use crate::store::Object;
use crate::weather::FaultKind;

/// Something that happens at a time.
#[derive(Clone, Debug)]
pub enum Happening {
    // Streams.
    /// An agent dials a broker.
    Dial(NodeName, u64),
    /// The head of a stream reaches the broker.
    ToBroker(LinkId),
    /// The head of a stream reaches the agent.
    ToAgent(LinkId),
    /// The broker notices that a stream is over.
    BrokerNotices(LinkId),
    /// The agent does.
    AgentNotices(LinkId),

    // The API server.
    /// A page write reaches it.
    WriteArrives(u64),
    /// Its answer reaches the broker.
    WriteAnswered(u64),
    /// The broker stops waiting for the answer.
    WriteTimesOut(u64),
    /// A read reaches it.
    ReadArrives(u64, Asked),
    /// Its answer reaches the broker.
    ReadAnswered(u64, Asked, Option<Object>),
    /// The account of a first call was looked for.
    FirstSeen(u64, Box<Request>),
    /// A receipt reaches it.
    ReceiptArrives(u64, AccountName, Box<Closed>),
    /// The broker hears that it exists.
    ReceiptWritten(u64, AccountName, LeaseId),
    /// A watch shows the next change.
    WatchStep(u64),
    /// A broker has listed everything.
    Listed(u64),
    /// A broker hears of a tier, a grant or a pool.
    PolicyShown(u64, AccountName),
    /// The same for a pool.
    PoolShown(u64, NodeName),
    /// A broker reads the term page.
    TermRead(u64),
    /// A broker writes it, expecting this revision.
    TermWritten(u64, u64),
    /// An account that is being deleted may go.
    Finalized(AccountName),
    /// An account is made again.
    Created(AccountName),

    // Processes.
    /// A broker is elected.
    Elected,
    /// A broker's timer.
    BrokerTick(u64),
    /// A broker compares its clock with the API server's.
    ClockRead(u64),
    /// An agent's timer.
    NodeTick(NodeName),
    /// A limit of a lease may have passed on its node.
    Limit(NodeName),

    // Clients.
    /// The next call.
    Call,
    /// A caller makes its call again.
    Retry(Ticket),
    /// A call reaches its agent, made so many times before.
    Asked(Box<Request>, u32),
    /// A caller goes.
    CallerLeaves(NodeName, Ticket),
    /// A worker asks for its device.
    Allow(NodeName, LeaseId),
    /// A worker is done.
    Done(NodeName, LeaseId, Ending),
    /// A slot is looked at after its lease.
    Cleared(NodeName, LeaseId),

    // The weather.
    /// A fault.
    Fault(FaultKind),
    /// A partition ends.
    Reachable(NodeName),
    /// A card comes back.
    CardBack(NodeName, u32),
}

/// A read of an account.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Of which term of the broker: its tasks end with it.
    pub epoch: Epoch,
    /// Whose page.
    pub account: AccountName,
    /// The object that the broker knew when it asked.
    pub uid: Option<u64>,
    /// For leases of this node that no known page holds (L7).
    pub node: Option<NodeName>,
}

/// The future.
#[derive(Default)]
pub struct Agenda {
    heap: BinaryHeap<Reverse<(u64, u64)>>,
    entries: BTreeMap<u64, Happening>,
    next: u64,
}

// === impl Happening ===

impl Happening {
    /// The broker whose process has to do something; one that stands still does it later.
    pub const fn process(&self) -> Option<u64> {
        match self {
            Self::WatchStep(broker)
            | Self::Listed(broker)
            | Self::ReadAnswered(broker, ..)
            | Self::FirstSeen(broker, _)
            | Self::ReceiptWritten(broker, ..)
            | Self::PolicyShown(broker, _)
            | Self::PoolShown(broker, _)
            | Self::TermRead(broker)
            | Self::BrokerTick(broker)
            | Self::ClockRead(broker) => Some(*broker),
            _ => None,
        }
    }
}

// === impl Agenda ===

impl Agenda {
    /// It will happen at this time; of two at one time the one that was added first comes first.
    pub fn add(&mut self, at: u64, happening: Happening) {
        self.heap.push(Reverse((at, self.next)));
        self.entries.insert(self.next, happening);
        self.next += 1;
    }

    /// What is next, and when.
    pub fn take(&mut self) -> Option<(u64, Happening)> {
        let Reverse((at, number)) = self.heap.pop()?;
        Some((at, self.entries.remove(&number)?))
    }

    /// Everything happens so much later.
    pub fn shift(&mut self, by_ms: u64) {
        self.heap = self.heap.drain().map(|Reverse((at, number))| Reverse((at + by_ms, number))).collect();
    }

    /// What is to come, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Happening> {
        self.entries.values()
    }
}

/// A page that many hold.
pub type SharedPage = Rc<spaceport_core::page::Page>;
