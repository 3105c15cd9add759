//! What the ledger knows of Spaces: what their owners chose, and how many leases each has open. Soft limits (L1): they are
//! counted in memory and on no page.

use super::command::SpaceSettings;
use super::state::{Lease, Stage, State};

/// One Space, while its owner has chosen something or it has leases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceUse {
    /// What its owner chose.
    pub settings: SpaceSettings,
    /// Leases that are reserved or run.
    pub leases: u32,
}

impl SpaceUse {
    /// How many leases more it may have now.
    fn room(&self) -> usize {
        let room = self.settings.concurrent.map(|limit| limit.saturating_sub(self.leases));
        room.map_or(usize::MAX, |room| usize::try_from(room).unwrap_or(usize::MAX))
    }
}

impl Lease {
    /// uid of its Space while it counts there: until it is over.
    pub(super) fn busy_space(&self) -> Option<&str> {
        self.space.as_deref().filter(|_| self.stage < Stage::Settling)
    }
}

impl State {
    /// What applies to calls of a Space.
    pub fn space_settings(&self, uid: &str) -> SpaceSettings {
        self.spaces.get(uid).map(|space| space.settings).unwrap_or_default()
    }

    /// True while a new lease of the Space has to wait for another to end.
    pub(super) fn is_space_full(&self, uid: &str) -> bool {
        self.space_room(uid) == 0
    }

    fn space_room(&self, uid: &str) -> usize {
        self.spaces.get(uid).map_or(usize::MAX, SpaceUse::room)
    }

    pub(super) fn configure_space(&mut self, uid: &str, settings: SpaceSettings) {
        self.spaces.entry(uid.to_owned()).or_default().settings = settings;
        self.space_changed(uid);
    }

    pub(super) fn space_lease_begins(&mut self, uid: &str) {
        let space = self.spaces.entry(uid.to_owned()).or_default();
        space.leases = space.leases.saturating_add(1);
    }

    pub(super) fn space_lease_over(&mut self, uid: &str) {
        if let Some(space) = self.spaces.get_mut(uid) {
            space.leases = space.leases.saturating_sub(1);
        }
        self.space_changed(uid);
    }

    /// Lets as many of those who wait for the Space as it has room for have their turn again, and forgets a Space of which
    /// nothing is to be known.
    pub(super) fn space_changed(&mut self, uid: &str) {
        if self.spaces.get(uid).is_some_and(|space| *space == SpaceUse::default()) {
            self.spaces.remove(uid);
        }
        self.queue.unpark_space(uid, self.space_room(uid));
    }
}
