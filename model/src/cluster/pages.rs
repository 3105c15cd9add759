//! Account pages: writes on their way and their answers, reads, what the watch shows.

use spaceport_core::lease::Command;
use spaceport_core::page::Ending;

use super::Cluster;
use crate::api::{Broken, Fate, Write};
use crate::bounds::Fault;
use crate::broker::{self, Read};
use crate::names;
use crate::world::World;

impl Cluster {
    /// A page write reaches the API server.
    pub fn write_arrives(&self, world: &mut World, index: usize) {
        let mut broken = Vec::new();
        world.api().take(index, self.is_blind(), &mut broken);
        broken.into_iter().for_each(|rule| world.break_rule(rule));
        for (lease, ending) in world.ended.clone() {
            let Some(settled) = world.api.settled(lease).copied() else { continue };
            world.ended.retain(|(known, _)| *known != lease);
            // A node that was silent beyond the bound is not asked any more (L9).
            if settled.ending != ending && settled.ending != Ending::Expired {
                world.break_rule(Broken::Report);
            }
        }
    }

    /// Page writes name no revision.
    pub fn is_blind(&self) -> bool {
        self.fault() == Fault::NoCompare
    }

    /// A leader hears what became of a write.
    pub fn answer(&self, world: &mut World, index: usize) {
        let Write { broker, account, page, fate, .. } = world.api().writes.remove(index);
        let Some(broker) = broker else { return };
        let (name, write_id) = (names::account(account), page.write_id.clone());
        let command = match fate {
            // It was not answered: nobody knows.
            Fate::Sent => Command::PageUnknown { account: name, write_id },
            Fate::Done => {
                if let Some(leading) = world.leading(broker) {
                    leading.targets[account] = page.seq;
                    leading.shown[account] = leading.shown[account].max(page.seq);
                }
                Command::PageWritten { account: name, write_id }
            }
            Fate::Conflict => Command::PageConflict { account: name, write_id },
            Fate::Refused => Command::PageFailed { account: name, write_id },
        };
        self.tell(world, broker, command);
        self.show_again(world, broker, account);
    }

    /// What the watch has shown while a write was in flight is taken behind an answer that is older.
    fn show_again(&self, world: &mut World, broker: usize, account: usize) {
        let Some(leading) = world.leading(broker) else { return };
        let found = leading.core.accounts.get(&names::account(account));
        let behind = found.is_some_and(|found| found.in_flight.is_none() && found.durable.seq < leading.shown[account]);
        if behind && self.fault() != Fault::DroppedPage {
            self.watch(world, broker, account);
        }
    }

    /// The answer of a write is lost. One that has not arrived may still do so.
    pub fn lose_answer(&self, world: &mut World, index: usize) {
        let write = world.api.writes[index].clone();
        world.api().writes[index].fate = Fate::Sent;
        self.answer(world, index);
        if write.fate == Fate::Sent {
            world.api().writes.push(Write { broker: None, ..write });
            world.api().forget_impossible(self.is_blind());
        }
    }

    /// A leader gets the page that was read for it.
    pub fn answer_read(&self, world: &mut World, broker: usize, index: usize) {
        let Some(leading) = world.leading(broker) else { return };
        let Read { account, node, page } = leading.reads.remove(index);
        let Some(page) = page else { return };
        let newest = leading.core.accounts.get(&names::account(account)).map_or(0, |found| found.durable.seq);
        if node.is_none() || page.seq >= newest {
            leading.targets[account] = page.seq;
        }
        self.tell(world, broker, broker::read(account, node, &page));
        self.show_again(world, broker, account);
    }

    /// A leader's account watch shows the page as it is now. In between it may have shown others; each of those would be
    /// ignored for this one.
    pub fn watch(&self, world: &mut World, broker: usize, account: usize) {
        let page = world.api.pages[account].clone();
        let Some(leading) = world.leading(broker) else { return };
        leading.shown[account] = page.seq;
        let newest = leading.core.accounts.get(&names::account(account)).map_or(0, |found| found.durable.seq);
        if page.seq >= newest {
            leading.targets[account] = page.seq;
        }
        self.tell(world, broker, broker::seen(account, &page));
    }

    /// A receipt is written.
    pub fn receipt(&self, world: &mut World, broker: usize, index: usize) {
        let Some(leading) = world.leading(broker) else { return };
        let (account, lease) = leading.receipts.remove(index);
        if let Err(at) = world.api.receipts.binary_search(&lease) {
            world.api().receipts.insert(at, lease);
        }
        let command = Command::ReceiptWritten { account: names::account(account), lease: names::lease(lease) };
        self.tell(world, broker, command);
    }
}
