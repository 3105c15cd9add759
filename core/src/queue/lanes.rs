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
mod tests {
    use super::*;

    const ALL: Room = Room { large: true, xlarge: true, reserved_for_ms: None };
    const HALF: Room = Room { large: true, xlarge: false, reserved_for_ms: None };
    const NONE: Room = Room { large: false, xlarge: false, reserved_for_ms: None };

    fn job(place: u64, size: Size, seconds: u64) -> Job {
        let ms = seconds * 1000;
        Job {
            place,
            size,
            class: Priority::Medium,
            key: ms,
            expected_ms: ms,
            declared_ms: ms,
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
        Some(Choice::Start { place, fit: Fit::Open })
    }

    #[test]
    fn shorter_calls_go_first_and_equals_in_the_order_they_came() {
        let mut lanes = lanes(&[job(1, Size::Large, 30), job(2, Size::Large, 10), job(3, Size::Large, 10)]);
        for place in [2, 3, 1] {
            assert_eq!(lanes.next(&HALF, &[]), start(place));
            lanes.started(place);
        }
        assert_eq!(lanes.next(&ALL, &[]), None);
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
            assert_eq!(lanes.next(&HALF, &[]), start(place), "nine seconds are shorter than thirty");
            lanes.started(place);
            place += 1;
        }
        lanes.insert(job(place, Size::Large, 9));
        assert_eq!(lanes.next(&HALF, &[]), start(1), "ninety seconds out of turn have earned thirty");
        lanes.started(1);
        assert_eq!(lanes.next(&HALF, &[]), start(place));
    }

    #[test]
    fn earnings_go_by_floors_to_the_classes_that_wait() {
        let of = |class, place| Job { class, key: u64::MAX, ..job(place, Size::Large, 1000) };
        let mut lanes = lanes(&[of(Priority::Highest, 1), of(Priority::Low, 2), job(3, Size::Large, 210)]);
        let earned = |lanes: &Lanes| lanes.age.each_ref().map(|class| class.credit / CREDIT_UNITS);
        assert_eq!(lanes.started(3).map(|(_, lane)| lane), Some(Lane::Fast));
        // 70 s for two classes with floors of 50 and 20.
        assert_eq!(earned(&lanes), [20_000, 0, 50_000]);
        lanes.owe(21_000);
        assert_eq!(earned(&lanes), [22_000, 0, 55_000], "it ran longer than was expected");
        lanes.remove(2);
        assert_eq!(earned(&lanes), [0, 0, 55_000], "nobody is left to use it");
    }

    #[test]
    fn a_blocked_whole_card_gets_a_reservation_and_the_first_card() {
        let mut lanes = lanes(&[job(1, Size::Xlarge, 5), job(2, Size::Large, 10)]);
        assert_eq!(lanes.next(&HALF, &[]), Some(Choice::Reserve { place: 1, lane: Lane::Fast }));
        lanes.reserve(1, Lane::Fast);
        assert_eq!(lanes.next(&HALF, &[]), start(2), "others go on beside it");
        lanes.insert(job(3, Size::Xlarge, 1));
        assert_eq!(lanes.next(&NONE, &[]), None, "one reservation at a time");
        assert_eq!(lanes.next(&ALL, &[]), start(3), "the card is for whoever is first by then");
        lanes.started(3);
        assert_eq!((lanes.reserved(), lanes.next(&ALL, &[])), (None, start(1)));
    }

    #[test]
    fn a_card_is_drained_by_key_only_where_that_is_worth_it() {
        let mut lanes = lanes(&[job(1, Size::Xlarge, 8), job(2, Size::Large, 10)]);
        assert_eq!(lanes.next(&NONE, &[]), None, "eight is more than seven tenths of ten");
        lanes.insert(job(3, Size::Xlarge, 7));
        assert_eq!(lanes.next(&NONE, &[]), Some(Choice::Reserve { place: 3, lane: Lane::Fast }));
    }

    #[test]
    fn only_what_is_surely_over_uses_the_reserved_card() {
        let mut lanes = lanes(&[job(1, Size::Xlarge, 1), job(2, Size::Large, 10), job(3, Size::Large, 20)]);
        lanes.reserve(1, Lane::Fast);
        let until = |seconds: u64| Room { reserved_for_ms: Some(seconds * 1000), ..NONE };
        let before_drain = Some(Choice::Start { place: 2, fit: Fit::BeforeDrain });
        assert_eq!(lanes.next(&until(9), &[]), None);
        assert_eq!(lanes.next(&until(10), &[]), before_drain);
        // The one with the smaller key is too long; the one behind it fits.
        lanes.insert(Job { key: 1, ..job(4, Size::Large, 60) });
        assert_eq!(lanes.next(&until(10), &[]), before_drain);
    }

    /// Or else whole cards, one reservation after the other, would keep the oldest waiting for ever.
    #[test]
    fn a_reservation_by_key_gives_way_to_who_is_due_by_age() {
        let due = |size| {
            let oldest = Job { class: Priority::Low, key: u64::MAX, ..job(1, size, 20) };
            let mut lanes = lanes(&[oldest, job(2, Size::Xlarge, 1), job(3, Size::Large, 300)]);
            lanes.reserve(2, Lane::Fast);
            lanes.started(3);
            lanes
        };
        let drains = Room { reserved_for_ms: Some(5_000), ..NONE };
        let half = due(Size::Large);
        assert_eq!(half.next(&drains, &[]), Some(Choice::Start { place: 1, fit: Fit::InsteadOfReserved }));
        let mut whole = due(Size::Xlarge);
        assert_eq!(whole.next(&drains, &[]), Some(Choice::Reserve { place: 1, lane: Lane::Age }));
        whole.reserve(1, Lane::Age);
        assert_eq!((whole.next(&drains, &[]), whole.next(&ALL, &[])), (None, start(1)));
        assert_eq!(whole.started(1).map(|(_, lane)| lane), Some(Lane::Age));
    }

    #[test]
    fn who_leaves_takes_the_reservation_along() {
        let mut lanes = lanes(&[job(1, Size::Xlarge, 1)]);
        lanes.reserve(1, Lane::Fast);
        lanes.remove(1);
        assert_eq!((lanes.reserved(), lanes.is_empty()), (None, true));
        lanes.reserve(1, Lane::Fast);
        assert_eq!(lanes.reserved(), None);
    }

    #[test]
    fn a_lane_of_age_alone_is_first_come_first_served() {
        let mut lanes = Lanes::new(LaneSettings { age_percent: 100, ..LaneSettings::default() });
        [job(1, Size::Large, 30), job(2, Size::Large, 1)].into_iter().for_each(|job| lanes.insert(job));
        assert_eq!(lanes.next(&HALF, &[]), start(1));
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
