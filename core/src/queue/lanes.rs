//! Who is next on one node: two lanes with bounded overtaking (docs/rules.md, Queue).
//!
//! The fast lane takes the smallest key first: what the call is expected to cost, dearer for accounts that have used much
//! and cheaper for higher tiers. The age lane takes the oldest of a tier class. Every start out of turn earns the age lane
//! its share, split among the classes that wait by their floors; when a class has earned what its oldest request can cost,
//! that one is next whatever its key. So the average wait is that of shortest first, and the longest is bounded.
//!
//! A whole card does not get free by itself while halves come and go. So one blocked whole-card request has a reservation:
//! the card that drains first is kept for it, and a half may use that card only if it is surely over before.
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
    /// How long it can hold its slots: H of docs/rules.md, milliseconds.
    pub held_ms: u64,
    /// How many slots it takes.
    pub slots: u64,
}

/// What is free on the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// A half on a card that is not reserved.
    pub large: bool,
    /// A whole card.
    pub xlarge: bool,
    /// A half on the reserved card, for a call that is surely over in so many milliseconds.
    pub large_for_ms: Option<u64>,
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// This one has its turn, and there is room for it.
    Start {
        /// Which.
        place: u64,
        /// It fits on the reserved card only.
        on_reserved: bool,
    },
    /// This one has its turn, and a card is to be kept for it.
    Reserve {
        /// Which.
        place: u64,
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
    /// Who has the reservation.
    reserved: Option<u64>,
}

/// One class of the age lane.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Aged {
    places: BTreeSet<u64>,
    /// What all of them can hold, slot-milliseconds.
    held_ms: u64,
    /// What the class has earned, slot-milliseconds.
    credit_ms: u64,
}

// === impl LaneSettings ===

impl Default for LaneSettings {
    /// The chart's defaults.
    fn default() -> Self {
        Self { age_percent: 25, weights: [1, 2, 4], floors: [20, 30, 50] }
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

    /// What the age lane earns from a start out of turn: phi / (1 - phi) of its cost.
    fn earned_ms(&self, cost_ms: u64) -> u64 {
        let rest = 100_u64.saturating_sub(self.age_percent);
        // At 100 percent nothing is ever out of turn, see `Lanes::is_due`.
        cost_ms.saturating_mul(self.age_percent).checked_div(rest).unwrap_or(u64::MAX)
    }
}

// === impl Job ===

impl Job {
    /// What it can cost: slots x H, slot-milliseconds.
    pub const fn cost_ms(&self) -> u64 {
        self.held_ms.saturating_mul(self.slots)
    }
}

// === impl Aged ===

impl Aged {
    fn oldest(&self) -> Option<u64> {
        self.places.first().copied()
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
        Self { settings, jobs: BTreeMap::new(), fast: Default::default(), age: Default::default(), reserved: None }
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
        class.held_ms = class.held_ms.saturating_add(job.cost_ms());
        self.jobs.insert(job.place, job);
    }

    /// Takes a request out that leaves or cannot start for now. Its reservation ends with it.
    pub fn remove(&mut self, place: u64) -> Option<Job> {
        let job = self.jobs.remove(&place)?;
        self.fast[job.size as usize].remove(&(job.key, place));
        let class = &mut self.age[job.class as usize];
        class.places.remove(&place);
        class.held_ms = class.held_ms.saturating_sub(job.cost_ms());
        // Nobody saves for later: what a class has earned is for those who wait now, and never more than they can cost.
        class.credit_ms = class.credit_ms.min(class.held_ms);
        if self.reserved == Some(place) {
            self.reserved = None;
        }
        Some(job)
    }

    /// Takes a request out that starts, and keeps the books of the lanes: in turn it spends what its class has earned, out
    /// of turn it earns the age lane its share.
    pub fn started(&mut self, place: u64) -> Option<Job> {
        let job = *self.jobs.get(&place)?;
        let in_turn = self.is_due(job.class).is_some_and(|due| due.place == place);
        if in_turn {
            let class = &mut self.age[job.class as usize];
            class.credit_ms = class.credit_ms.saturating_sub(job.cost_ms());
        }
        self.remove(place);
        if !in_turn {
            self.earn(self.settings.earned_ms(job.cost_ms()));
        }
        Some(job)
    }

    /// Splits earnings among the classes that wait: those of the others flow to them.
    fn earn(&mut self, earned_ms: u64) {
        let floors = self.settings.floors;
        let waiting = |class: &Aged| !class.places.is_empty();
        let shares: u64 = self.age.iter().zip(floors).filter(|(class, _)| waiting(class)).map(|(_, floor)| floor).sum();
        for (class, floor) in self.age.iter_mut().zip(floors).filter(|(class, _)| waiting(class)) {
            let share_ms = earned_ms.saturating_mul(floor).checked_div(shares).unwrap_or_default();
            class.credit_ms = class.credit_ms.saturating_add(share_ms).min(class.held_ms);
        }
    }

    /// A card is kept for this request from now on.
    pub fn reserve(&mut self, place: u64) {
        if self.jobs.contains_key(&place) {
            self.reserved = Some(place);
        }
    }

    /// Who has the reservation.
    pub const fn reserved(&self) -> Option<u64> {
        self.reserved
    }

    /// The oldest of a class, if the class has earned what it can cost.
    fn is_due(&self, class: Priority) -> Option<&Job> {
        let aged = &self.age[class as usize];
        let oldest = self.jobs.get(&aged.oldest()?)?;
        let due = self.settings.age_percent >= 100 || aged.credit_ms >= oldest.cost_ms();
        due.then_some(oldest)
    }

    /// What is to be done with this room. None: nothing, until there is more of it or somebody else comes.
    pub fn next(&self, room: &Room) -> Option<Choice> {
        if let Some(place) = self.reserved.filter(|_| room.xlarge) {
            return Some(Choice::Start { place, on_reserved: false });
        }
        self.next_by_age(room).or_else(|| self.next_by_key(room))
    }

    fn next_by_age(&self, room: &Room) -> Option<Choice> {
        let classes = [Priority::Highest, Priority::Medium, Priority::Low];
        let mut due: Vec<&Job> = classes.into_iter().filter_map(|class| self.is_due(class)).collect();
        due.sort_by_key(|job| job.place);
        due.into_iter().find_map(|job| self.choice(job, room))
    }

    /// What can be done for this one.
    fn choice(&self, job: &Job, room: &Room) -> Option<Choice> {
        let place = job.place;
        let fits = match job.size {
            Size::Large => room.large,
            Size::Xlarge => room.xlarge,
        };
        if fits {
            return Some(Choice::Start { place, on_reserved: false });
        }
        match job.size {
            Size::Large => {
                let before_drain = room.large_for_ms.is_some_and(|ms| job.held_ms <= ms);
                before_drain.then_some(Choice::Start { place, on_reserved: true })
            }
            Size::Xlarge => self.reserved.is_none().then_some(Choice::Reserve { place }),
        }
    }

    fn next_by_key(&self, room: &Room) -> Option<Choice> {
        let first = |size: Size| self.fast[size as usize].first();
        let (large, xlarge) = (first(Size::Large), first(Size::Xlarge));
        let whole_card_first = match (large, xlarge) {
            (Some(large), Some(xlarge)) => xlarge < large,
            (large, _) => large.is_none(),
        };
        let whole_card = || xlarge.and_then(|(_, place)| self.choice(self.jobs.get(&place)?, room));
        if whole_card_first {
            whole_card().or_else(|| self.next_large(room))
        } else {
            self.next_large(room).or_else(whole_card)
        }
    }

    fn next_large(&self, room: &Room) -> Option<Choice> {
        // With room for any the first fits; with room until the drain alone it may be one behind it.
        let look = if room.large { 1 } else { BACKFILL_LOOK_MAX };
        if !room.large && room.large_for_ms.is_none() {
            return None;
        }
        let jobs = self.fast[Size::Large as usize].iter().take(look).filter_map(|(_, place)| self.jobs.get(&place));
        jobs.into_iter().find_map(|job| self.choice(job, room))
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

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Room = Room { large: true, xlarge: true, large_for_ms: None };
    const HALF: Room = Room { large: true, xlarge: false, large_for_ms: None };
    const NONE: Room = Room { large: false, xlarge: false, large_for_ms: None };

    fn job(place: u64, size: Size, seconds: u64) -> Job {
        let ms = seconds * 1000;
        Job {
            place,
            size,
            class: Priority::Medium,
            key: ms,
            expected_ms: ms,
            held_ms: ms,
            slots: if size == Size::Large { 1 } else { 2 },
        }
    }

    fn lanes(jobs: &[Job]) -> Lanes {
        let mut lanes = Lanes::default();
        jobs.iter().for_each(|job| lanes.insert(*job));
        lanes
    }

    fn start(place: u64) -> Option<Choice> {
        Some(Choice::Start { place, on_reserved: false })
    }

    #[test]
    fn shorter_calls_go_first_and_equals_in_the_order_they_came() {
        let mut lanes = lanes(&[job(1, Size::Large, 30), job(2, Size::Large, 10), job(3, Size::Large, 10)]);
        for place in [2, 3, 1] {
            assert_eq!(lanes.next(&HALF), start(place));
            lanes.started(place);
        }
        assert_eq!(lanes.next(&ALL), None);
    }

    #[test]
    fn keys_are_dearer_for_who_used_much_and_cheaper_for_higher_tiers() {
        let settings = LaneSettings::default();
        let key = |class, used| settings.key(class, 1000, 1, used, 100);
        assert_eq!(key(Priority::Low, 0), 1_000_000);
        assert_eq!(key(Priority::Low, 50), 1_500_000);
        assert_eq!(key(Priority::Low, 100), 2_000_000);
        assert_eq!(key(Priority::Low, 900), 2_000_000, "a lowered tier can have used more than its quota");
        assert_eq!(key(Priority::Highest, 0), 250_000);
        assert_eq!(settings.key(Priority::Low, 1000, 2, 0, 0), 4_000_000, "no quota counts as used up");
    }

    /// phi = 1/4: three slot-seconds out of turn earn one.
    #[test]
    fn the_oldest_goes_when_its_class_has_earned_it() {
        let mut lanes = lanes(&[job(1, Size::Large, 30)]);
        let mut place = 2;
        for _ in 0..10 {
            lanes.insert(job(place, Size::Large, 9));
            assert_eq!(lanes.next(&HALF), start(place), "nine seconds are shorter than thirty");
            lanes.started(place);
            place += 1;
        }
        lanes.insert(job(place, Size::Large, 9));
        assert_eq!(lanes.next(&HALF), start(1), "ninety seconds out of turn have earned thirty");
        lanes.started(1);
        assert_eq!(lanes.next(&HALF), start(place));
    }

    #[test]
    fn earnings_go_by_floors_to_the_classes_that_wait() {
        let of = |class, place| Job { class, key: u64::MAX, ..job(place, Size::Large, 1000) };
        let mut lanes = lanes(&[of(Priority::Highest, 1), of(Priority::Low, 2), job(3, Size::Large, 210)]);
        lanes.started(3);
        // 70 s for two classes with floors of 50 and 20.
        assert_eq!(lanes.age.each_ref().map(|class| class.credit_ms), [20_000, 0, 50_000]);
        lanes.remove(2);
        assert_eq!(lanes.age[Priority::Low as usize].credit_ms, 0, "nobody is left to use it");
    }

    #[test]
    fn a_blocked_whole_card_gets_a_reservation_and_the_first_card() {
        let mut lanes = lanes(&[job(1, Size::Xlarge, 5), job(2, Size::Large, 10), job(3, Size::Xlarge, 1)]);
        lanes.remove(3);
        assert_eq!(lanes.next(&HALF), Some(Choice::Reserve { place: 1 }));
        lanes.reserve(1);
        assert_eq!(lanes.next(&HALF), start(2), "others go on beside it");
        lanes.insert(job(3, Size::Xlarge, 1));
        assert_eq!(lanes.next(&NONE), None, "one reservation at a time");
        assert_eq!(lanes.next(&ALL), start(1), "a shorter one that came later does not take its card");
        lanes.started(1);
        assert_eq!((lanes.reserved(), lanes.next(&ALL)), (None, start(3)));
    }

    #[test]
    fn only_what_is_surely_over_uses_the_reserved_card() {
        let mut lanes = lanes(&[job(1, Size::Xlarge, 1), job(2, Size::Large, 10), job(3, Size::Large, 20)]);
        lanes.reserve(1);
        let until = |seconds: u64| Room { large_for_ms: Some(seconds * 1000), ..NONE };
        assert_eq!(lanes.next(&until(9)), None);
        assert_eq!(lanes.next(&until(10)), Some(Choice::Start { place: 2, on_reserved: true }));
        // The one with the smaller key is too long; the one behind it fits.
        lanes.insert(Job { key: 1, ..job(4, Size::Large, 60) });
        assert_eq!(lanes.next(&until(10)), Some(Choice::Start { place: 2, on_reserved: true }));
    }

    #[test]
    fn who_leaves_takes_the_reservation_along() {
        let mut lanes = lanes(&[job(1, Size::Xlarge, 1)]);
        lanes.reserve(1);
        lanes.remove(1);
        assert_eq!((lanes.reserved(), lanes.is_empty()), (None, true));
        lanes.reserve(1);
        assert_eq!(lanes.reserved(), None);
    }

    #[test]
    fn a_lane_of_age_alone_is_first_come_first_served() {
        let mut lanes = Lanes::new(LaneSettings { age_percent: 100, ..LaneSettings::default() });
        [job(1, Size::Large, 30), job(2, Size::Large, 1)].into_iter().for_each(|job| lanes.insert(job));
        assert_eq!(lanes.next(&HALF), start(1));
    }

    #[test]
    fn what_is_ahead_is_counted_over_both_sizes() {
        let lanes = lanes(&[job(1, Size::Xlarge, 5), job(2, Size::Large, 10), job(3, Size::Large, 7)]);
        let of = |place| {
            let job = lanes.get(place).unwrap();
            lanes.ahead_by_key(job.key, place)
        };
        assert_eq!(of(1), Ahead { count: 0, sum: 0 });
        assert_eq!(of(3), Ahead { count: 1, sum: 10_000 });
        assert_eq!(of(2), Ahead { count: 2, sum: 17_000 });
        assert_eq!(lanes.held_by_class_ms(Priority::Medium), 27_000);
    }
}
