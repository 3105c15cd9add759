//! Who is next on one node: two lanes with bounded overtaking (docs/rules.md, Queue).
//!
//! The fast lane takes the smallest key first: what the call is expected to cost, dearer for accounts that have used much
//! and cheaper for higher tiers. The age lane takes the oldest of a tier class. Every start out of turn earns the age lane
//! its share, split among the classes that wait by their floors; when a class has earned what its oldest request declared,
//! that one is next whatever its key. So the average wait is that of shortest first, and the longest is bounded.
//!
//! A whole card does not get free by itself while halves come and go. So one blocked whole-card request has a reservation:
//! the card that drains first is kept for it, and a half may use that card only if it is surely over before. A reservation
//! of the fast lane gives way to whoever has its turn by age, or else whole cards, one reservation after the other, could
//! keep it waiting for ever. The fast lane makes one only where that is worth the half that idles meanwhile.
//!
//! Pure, and without identity: requests are places, as they are numbered when they come. The ledger, the simulation and the
//! replay of traces use the same code.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::ranked::{Ahead, Ranked};
use crate::ids::Size;

/// Requests of the fast lane that are looked at for one that fits before the reserved card drains. They are looked at in
/// the order of their keys, and small keys go with short calls, so whoever fits is mostly among the first.
pub const BACKFILL_LOOK_MAX: usize = 64;

/// What is best in replays of demand in the shape of real demand (docs/figures).
pub const RESERVE_PERCENT: u64 = 70;

/// Keys that are larger than the smallest one by no more than this part of it, a fifth, count as equal where a worker is kept:
/// what a call is expected to take is known no better than that, and a worker that is there saves a start of CUDA and the
/// transfer of the weights.
pub const EQUAL_KEY_PART: u64 = 5;

/// Credit is kept in hundredths of a millisecond, so that shares lose nothing that matters.
const CREDIT_UNITS: u64 = 100;

/// Place of a tier in the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Priority {
    /// Guests and Spaces.
    Low,
    /// Tier free.
    #[default]
    Medium,
    /// Everyone else.
    Highest,
}

/// What a pool says about the order of its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneSettings {
    /// Share of the age lane, phi, in percent: 1 to 100.
    pub age_percent: u64,
    /// Divisor of the key, by class, lowest first. At least 1.
    pub weights: [u64; 3],
    /// Share of the age lane that a class has for itself while it waits, in percent, lowest class first.
    pub floors: [u64; 3],
    /// The fast lane keeps a card for a whole-card request only if its key is at most so much of the smallest key of a half,
    /// percent: while a card drains, a half of it idles.
    pub reserve_percent: u64,
}

/// A request, as far as its turn depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Its number among all requests: smaller came earlier.
    pub place: u64,
    /// What it asks for.
    pub size: Size,
    /// Its tier's class.
    pub class: Priority,
    /// Its key in the fast lane, see [`key`].
    pub key: u64,
    /// How long it is expected to run, milliseconds.
    pub expected_ms: u64,
    /// How long it may run, milliseconds.
    pub declared_ms: u64,
    /// How long it can hold its slots: H of docs/rules.md, milliseconds.
    pub held_ms: u64,
    /// How many slots it takes.
    pub slots: u64,
}

/// By which lane a request has its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// By its key.
    Fast,
    /// By its age.
    Age,
}

/// What is free on the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// A half on a card that is not reserved.
    pub large: bool,
    /// A whole card.
    pub xlarge: bool,
    /// A half on the reserved card, which surely drains in so many milliseconds.
    pub reserved_for_ms: Option<u64>,
}

/// Where a request fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Beside the reserved card.
    Open,
    /// On the reserved card, over before that drains.
    BeforeDrain,
    /// On the reserved card, which is not kept any more then.
    InsteadOfReserved,
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// This one has its turn, and there is room for it.
    Start {
        /// Which.
        place: u64,
        /// Where.
        fit: Fit,
    },
    /// This one has its turn, and a card is to be kept for it.
    Reserve {
        /// Which.
        place: u64,
        /// By which lane.
        lane: Lane,
    },
}

/// The queue of one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lanes {
    settings: LaneSettings,
    jobs: BTreeMap<u64, Job>,
    /// By key, for each size. The amount is what it is expected to take, in slot-milliseconds.
    fast: [Ranked<(u64, u64)>; 2],
    /// By age, for each class.
    age: [Aged; 3],
    /// Who has the reservation, and by which lane.
    reserved: Option<(u64, Lane)>,
    /// What all who wait for a whole card can hold, milliseconds.
    whole_cards_ms: u64,
}

/// One class of the age lane.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Aged {
    places: BTreeSet<u64>,
    /// What all of them can hold, slot-milliseconds.
    held_ms: u64,
    /// What all of them declared, slot-milliseconds.
    declared_ms: u64,
    /// What the class has earned: slot-milliseconds, times [`CREDIT_UNITS`].
    credit: u64,
}

// === impl LaneSettings ===

impl Default for LaneSettings {
    /// The chart's defaults.
    fn default() -> Self {
        Self { age_percent: 25, weights: [1, 2, 4], floors: [20, 30, 50], reserve_percent: RESERVE_PERCENT }
    }
}

impl LaneSettings {
    /// Key of a call in the fast lane: expected x weight x (1 + used/quota) / weight of its class, in thousandths of a
    /// millisecond. A quota of 0 counts as used up.
    pub fn key(&self, class: Priority, expected_ms: u64, weight: u64, used_ms: u64, quota_ms: u64) -> u64 {
        let used_permille = match used_ms.saturating_mul(1000).checked_div(quota_ms) {
            Some(permille) => permille.min(1000),
            None => 1000,
        };
        let weighted = expected_ms.saturating_mul(weight).saturating_mul(1000 + used_permille);
        weighted / self.weights[class as usize].max(1)
    }
}

// === impl Job ===

impl Job {
    /// What a turn by age costs its class: slots x declared, slot-milliseconds.
    pub const fn cost_ms(&self) -> u64 {
        self.declared_ms.saturating_mul(self.slots)
    }

    /// What it can hold: slots x H, slot-milliseconds.
    const fn holds_ms(&self) -> u64 {
        self.held_ms.saturating_mul(self.slots)
    }
}

// === impl Aged ===

impl Aged {
    fn oldest(&self) -> Option<u64> {
        self.places.first().copied()
    }

    /// Nobody saves for later: what a class has earned is for those who wait now, and never more than they declared.
    fn cap(&mut self) {
        self.credit = self.credit.min(self.declared_ms.saturating_mul(CREDIT_UNITS));
    }
}

// === impl Lanes ===

impl Default for Lanes {
    fn default() -> Self {
        Self::new(LaneSettings::default())
    }
}

impl Lanes {
    /// Nobody waits.
    pub fn new(settings: LaneSettings) -> Self {
        Self {
            settings,
            jobs: BTreeMap::new(),
            fast: Default::default(),
            age: Default::default(),
            reserved: None,
            whole_cards_ms: 0,
        }
    }

    /// From now on these apply. Keys were made under the settings of their time and stay.
    pub fn configure(&mut self, settings: LaneSettings) {
        self.settings = settings;
    }

    /// Takes a request in.
    pub fn insert(&mut self, job: Job) {
        self.remove(job.place);
        self.fast[job.size as usize].insert((job.key, job.place), job.expected_ms.saturating_mul(job.slots));
        let class = &mut self.age[job.class as usize];
        class.places.insert(job.place);
        class.held_ms = class.held_ms.saturating_add(job.holds_ms());
        class.declared_ms = class.declared_ms.saturating_add(job.cost_ms());
        if job.size == Size::Xlarge {
            self.whole_cards_ms = self.whole_cards_ms.saturating_add(job.held_ms);
        }
        self.jobs.insert(job.place, job);
    }

    /// Takes a request out that leaves or cannot start for now. Its reservation ends with it.
    pub fn remove(&mut self, place: u64) -> Option<Job> {
        let job = self.jobs.remove(&place)?;
        self.fast[job.size as usize].remove(&(job.key, place));
        let class = &mut self.age[job.class as usize];
        class.places.remove(&place);
        class.held_ms = class.held_ms.saturating_sub(job.holds_ms());
        class.declared_ms = class.declared_ms.saturating_sub(job.cost_ms());
        class.cap();
        if job.size == Size::Xlarge {
            self.whole_cards_ms = self.whole_cards_ms.saturating_sub(job.held_ms);
        }
        if self.reserved() == Some(place) {
            self.reserved = None;
        }
        Some(job)
    }

    /// Takes a request out that starts, and keeps the books of the lanes: by age it spends what its class has earned; by
    /// key it earns the age lane its share of what it is expected to take. The rest is earned at its end, see
    /// [`Self::owe`].
    pub fn started(&mut self, place: u64) -> Option<(Job, Lane)> {
        let job = *self.jobs.get(&place)?;
        let by_age = self.due(job.class).is_some_and(|due| due.place == place);
        if by_age {
            let class = &mut self.age[job.class as usize];
            class.credit = class.credit.saturating_sub(job.cost_ms().saturating_mul(CREDIT_UNITS));
        }
        self.remove(place);
        if job.size == Size::Xlarge && self.reserved.is_some_and(|(_, lane)| lane == Lane::Fast) {
            // It had the card that was kept.
            self.reserved = None;
        }
        if by_age {
            return Some((job, Lane::Age));
        }
        self.owe(job.expected_ms.saturating_mul(job.slots));
        Some((job, Lane::Fast))
    }

    /// Somebody who had its turn by key takes so many slot-milliseconds, or that many more than expected: phi / (1 - phi)
    /// of them are the age lane's, shared by the classes that wait.
    pub fn owe(&mut self, slot_ms: u64) {
        let LaneSettings { age_percent, floors, .. } = self.settings;
        let waits = |class: &Aged| !class.places.is_empty();
        let shares: u64 = self.age.iter().zip(floors).filter(|(class, _)| waits(class)).map(|(_, floor)| floor).sum();
        // With all of the capacity for the age lane nobody has a turn by key.
        let Some(rest) = 100_u64.checked_sub(age_percent).filter(|rest| *rest > 0 && shares > 0) else { return };
        let earned = slot_ms.saturating_mul(CREDIT_UNITS).saturating_mul(age_percent).div_ceil(rest);
        for (class, floor) in self.age.iter_mut().zip(floors).filter(|(class, _)| waits(class)) {
            class.credit = class.credit.saturating_add(earned.saturating_mul(floor).div_ceil(shares));
            class.cap();
        }
    }

    /// A card is kept for this request from now on, and for no other.
    pub fn reserve(&mut self, place: u64, lane: Lane) {
        if self.jobs.contains_key(&place) {
            self.reserved = Some((place, lane));
        }
    }

    /// No card is kept any more.
    pub fn release(&mut self) {
        self.reserved = None;
    }

    /// Who has the reservation.
    pub fn reserved(&self) -> Option<u64> {
        self.reserved.map(|(place, _)| place)
    }

    /// The oldest of a class, if the class has earned what it declared.
    fn due(&self, class: Priority) -> Option<&Job> {
        let aged = &self.age[class as usize];
        let oldest = self.jobs.get(&aged.oldest()?)?;
        let due = self.settings.age_percent >= 100 || aged.credit >= oldest.cost_ms().saturating_mul(CREDIT_UNITS);
        due.then_some(oldest)
    }

    /// What is to be done with this room. None: nothing, until there is more of it or somebody else comes.
    ///
    /// `kept` are the places of those who would find a worker of their own there: by key each comes before those whose key is
    /// as good as equal ([`EQUAL_KEY_PART`]). That is an order among starts by key, each of which the age lane earns its
    /// share of, so it moves no latest start; and no card is kept for another one by it.
    pub fn next(&self, room: &Room, kept: &[u64]) -> Option<Choice> {
        let reserved = |by| self.reserved.filter(|(_, lane)| *lane == by && room.xlarge);
        let start = |place| Choice::Start { place, fit: Fit::Open };
        reserved(Lane::Age)
            .map(|(place, _)| start(place))
            .or_else(|| self.next_by_age(room))
            // What is kept by key is for whoever is first by key when it is free.
            .or_else(|| reserved(Lane::Fast).and_then(|_| self.first_of(Size::Xlarge)).map(start))
            .or_else(|| self.next_by_key(room, kept))
    }

    fn next_by_age(&self, room: &Room) -> Option<Choice> {
        let classes = [Priority::Highest, Priority::Medium, Priority::Low];
        let mut due: Vec<&Job> = classes.into_iter().filter_map(|class| self.due(class)).collect();
        due.sort_by_key(|job| job.place);
        let gives_way = self.reserved.is_none_or(|(_, lane)| lane == Lane::Fast);
        due.into_iter().find_map(|job| {
            let place = job.place;
            match job.size {
                Size::Large => {
                    let instead = gives_way && room.reserved_for_ms.is_some();
                    let fit = fit_large(job, room).or(instead.then_some(Fit::InsteadOfReserved))?;
                    Some(Choice::Start { place, fit })
                }
                Size::Xlarge if room.xlarge => Some(Choice::Start { place, fit: Fit::Open }),
                Size::Xlarge => gives_way.then_some(Choice::Reserve { place, lane: Lane::Age }),
            }
        })
    }

    fn next_by_key(&self, room: &Room, kept: &[u64]) -> Option<Choice> {
        if self.settings.age_percent >= 100 {
            return None;
        }
        let first = |size: Size| self.fast[size as usize].first();
        let half_key = first(Size::Large).map_or(u64::MAX, |(key, _)| key);
        if let Some((key, place)) = first(Size::Xlarge) {
            if room.xlarge && key < half_key {
                let place = self.jobs.get(&place).map_or(place, |first| self.or_kept(first, kept, |_| true));
                return Some(Choice::Start { place, fit: Fit::Open });
            }
            let worth_a_drain = key <= half_key / 100 * self.settings.reserve_percent;
            if !room.xlarge && self.reserved.is_none() && worth_a_drain {
                return Some(Choice::Reserve { place, lane: Lane::Fast });
            }
        }
        self.next_large(room, kept)
    }

    fn next_large(&self, room: &Room, kept: &[u64]) -> Option<Choice> {
        if !room.large && room.reserved_for_ms.is_none() {
            return None;
        }
        let jobs = self.fast[Size::Large as usize].iter().take(BACKFILL_LOOK_MAX);
        let (first, fit) =
            jobs.filter_map(|(_, place)| self.jobs.get(&place)).find_map(|job| Some((job, fit_large(job, room)?)))?;
        // Where one fits depends on the room alone.
        let place = self.or_kept(first, kept, |job| fit_large(job, room).is_some());
        Some(Choice::Start { place, fit })
    }

    /// Who has its turn by key: this one, which is first, or one of its size that would find its own worker and whose key is
    /// as good as equal.
    fn or_kept(&self, first: &Job, kept: &[u64], fits: impl Fn(&Job) -> bool) -> u64 {
        let equal_to = first.key.saturating_add(first.key / EQUAL_KEY_PART);
        let found = kept.iter().filter_map(|place| self.jobs.get(place));
        let equals = found.filter(|job| job.size == first.size && job.key <= equal_to && fits(job));
        equals.min_by_key(|job| (job.key, job.place)).map_or(first.place, |job| job.place)
    }

    /// The first of a size by key, for whoever finds that the node can never serve that size.
    pub fn first_of(&self, size: Size) -> Option<u64> {
        self.fast[size as usize].first().map(|(_, place)| place)
    }

    /// Requests with a smaller key, and what they are expected to take, in slot-milliseconds.
    pub fn ahead_by_key(&self, key: u64, place: u64) -> Ahead {
        let [large, xlarge] = self.fast.each_ref().map(|lane| lane.ahead(&(key, place)));
        Ahead { count: large.count + xlarge.count, sum: large.sum.saturating_add(xlarge.sum) }
    }

    /// What all of a class that wait can hold, slot-milliseconds.
    pub const fn held_by_class_ms(&self, class: Priority) -> u64 {
        self.age[class as usize].held_ms
    }

    /// What all who wait for a whole card can hold, milliseconds.
    pub const fn whole_cards_hold_ms(&self) -> u64 {
        self.whole_cards_ms
    }

    /// The request at this place, if it waits.
    pub fn get(&self, place: u64) -> Option<&Job> {
        self.jobs.get(&place)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.jobs.len()
    }

    /// True if nobody waits.
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }
}

/// Where a half fits without taking anything from who has the reservation.
fn fit_large(job: &Job, room: &Room) -> Option<Fit> {
    if room.large {
        return Some(Fit::Open);
    }
    room.reserved_for_ms.filter(|ms| job.held_ms <= *ms).map(|_| Fit::BeforeDrain)
}

#[cfg(test)]
mod tests;
