//! Where a lease stands that waits, as its receipt says it. Pure.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use spaceport_core::ids::LedgerTime;
use spaceport_core::lease::Place;
use spaceport_core::queue::WaitsFor;
use spaceport_crds::LeasePlace;

use crate::ledger::convert::wait_reason;

/// A latest start that moved by less is the same: it is computed from a monotonic clock and shown by a wall clock, and
/// people read seconds.
const MOVED_MS: u64 = 1_000;

/// Where a lease stood at one moment. Times are timestamps: nothing in it has to be written again because time passes
/// (L21).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    waits_for: WaitsFor,
    /// 1 is next.
    position: u32,
    expected: LedgerTime,
    latest: Option<LedgerTime>,
    at: LedgerTime,
}

impl Standing {
    /// Of what its caller is told at `now`.
    pub fn of(place: &Place, now: LedgerTime) -> Self {
        // A latest start that has passed stays where it was: nothing is written because it does (L21), and what was promised
        // can be seen.
        let counted_from = LedgerTime(now.0.saturating_sub_unsigned(place.late_ms));
        Self {
            waits_for: place.waits_for,
            position: place.position,
            expected: now.plus(place.eta_ms),
            latest: place.latest_start_ms.map(|ms| counted_from.plus(ms)),
            at: now,
        }
    }

    /// It waits for something else than then, or another latest start holds: what a line of the timeline is worth.
    pub fn is_told_anew(&self, before: &Self) -> bool {
        let moved = |latest: LedgerTime, before: LedgerTime| latest.since(before).max(before.since(latest)) >= MOVED_MS;
        let is_another = match (self.latest, before.latest) {
            (Some(latest), Some(before)) => moved(latest, before),
            (None, None) => false,
            (Some(_), None) | (None, Some(_)) => true,
        };
        self.waits_for != before.waits_for || is_another
    }

    /// It says something else than then. That another start is expected says nothing while the place is the same: it
    /// follows every call that runs shorter than it might.
    pub fn is_news(&self, before: &Self) -> bool {
        self.is_told_anew(before) || self.shown_position() != before.shown_position()
    }

    /// Those who wait for their account or Space have a place, and it is not what their turn depends on.
    fn shown_position(&self) -> Option<u32> {
        (self.waits_for == WaitsFor::Node).then_some(self.position)
    }

    /// For the column: `node, 3rd`.
    pub fn column(&self) -> String {
        match self.waits_for {
            WaitsFor::Node => format!("node, {}", ordinal(self.position)),
            WaitsFor::Account => "account".to_owned(),
            WaitsFor::Space => "space".to_owned(),
        }
    }

    /// For the timeline: `position 3 of the node, expected 12:00:05Z, at the latest 12:01:10Z`.
    pub fn detail(&self) -> String {
        let clock = |at: LedgerTime| timestamp(at).strftime("%H:%M:%SZ").to_string();
        match self.waits_for {
            WaitsFor::Node => {
                let latest = self.latest.map(|latest| format!(", at the latest {}", clock(latest)));
                let (position, expected) = (self.position, clock(self.expected));
                format!("position {position} of the node, expected {expected}{}", latest.unwrap_or_default())
            }
            WaitsFor::Account => "waits for its account".to_owned(),
            WaitsFor::Space => "waits for the limit of leases of its Space".to_owned(),
        }
    }

    /// The typed fields.
    pub fn row(&self) -> LeasePlace {
        let is_for_node = self.waits_for == WaitsFor::Node;
        LeasePlace {
            reason: wait_reason(self.waits_for),
            position: self.shown_position().map(|position| i32::try_from(position).unwrap_or(i32::MAX)),
            expected_start: is_for_node.then(|| MicroTime(timestamp(self.expected))),
            latest_start: self.latest.map(|latest| MicroTime(timestamp(latest))),
            as_of: MicroTime(timestamp(self.at)),
        }
    }
}

/// A start that is too far away for a timestamp is shown as the last one that there is.
fn timestamp(at: LedgerTime) -> Timestamp {
    Timestamp::from_millisecond(at.0).unwrap_or(Timestamp::MAX)
}

fn ordinal(number: u32) -> String {
    let ending = match (number % 10, number % 100) {
        (1, tens) if tens != 11 => "st",
        (2, tens) if tens != 12 => "nd",
        (3, tens) if tens != 13 => "rd",
        _ => "th",
    };
    format!("{number}{ending}")
}

#[cfg(test)]
pub(super) mod tests {
    use spaceport_core::ids::{Epoch, NodeName, Ticket};
    use spaceport_core::protocol::CallerClass;
    use spaceport_crds::WaitReason;

    use super::*;

    const AT: LedgerTime = LedgerTime(1_800_000_000_123);

    pub(in super::super) fn place(position: u32) -> Place {
        Place {
            ticket: Ticket { agent_instance: "a".into(), number: 1 },
            node: NodeName::new("gpu-1"),
            waits_for: WaitsFor::Node,
            position,
            eta_ms: 5_000,
            latest_start_ms: Some(70_000),
            late_ms: 0,
            place: (Epoch(3), 1),
            caller: CallerClass::Regular,
        }
    }

    fn parked(waits_for: WaitsFor) -> Place {
        Place { waits_for, latest_start_ms: None, ..place(3) }
    }

    #[test]
    fn a_receipt_says_for_what_it_waits_and_until_when() {
        let standing = Standing::of(&place(3), AT);
        assert_eq!(standing.column(), "node, 3rd");
        assert_eq!(standing.detail(), "position 3 of the node, expected 08:00:05Z, at the latest 08:01:10Z");
        let row = standing.row();
        assert_eq!((row.reason, row.position), (WaitReason::Node, Some(3)));
        let after = |at: &Option<MicroTime>| at.as_ref().map(|at| at.0.as_millisecond() - AT.0);
        assert_eq!((after(&row.expected_start), after(&row.latest_start)), (Some(5_000), Some(70_000)));
        assert_eq!(row.as_of.0.as_millisecond(), AT.0);
    }

    #[test]
    fn who_waits_for_an_account_or_a_space_is_told_neither_position_nor_time() {
        for (waits_for, reason, column) in
            [(WaitsFor::Account, WaitReason::Account, "account"), (WaitsFor::Space, WaitReason::Space, "space")]
        {
            let standing = Standing::of(&parked(waits_for), AT);
            let row = standing.row();
            assert_eq!((row.reason, row.position), (reason, None));
            assert_eq!((row.expected_start, row.latest_start), (None, None));
            assert_eq!(standing.column(), column);
            assert!(!standing.detail().contains("position"), "{}", standing.detail());
        }
    }

    #[test]
    fn only_another_place_or_promise_is_news_and_time_is_none() {
        let before = Standing::of(&place(3), AT);
        let later = |ms: u64, place: Place| Standing::of(&place, AT.plus(ms));
        // A promise stays where it is while time passes, but for the rounding of two clocks.
        let same = Place { latest_start_ms: Some(60_001), eta_ms: 0, ..place(3) };
        assert!(!later(10_000, same.clone()).is_news(&before));
        let nearer = later(10_000, Place { position: 2, ..same });
        assert!(nearer.is_news(&before) && !nearer.is_told_anew(&before), "no line for each step of the queue");
        assert!(later(10_000, place(3)).is_told_anew(&before), "a later promise");
        let account = later(0, parked(WaitsFor::Account));
        assert!(account.is_told_anew(&before));
        assert!(!later(0, Place { position: 9, ..parked(WaitsFor::Account) }).is_news(&account));
    }

    #[test]
    fn a_promise_that_is_broken_is_no_news_and_stays_what_it_was() {
        let before = Standing::of(&Place { latest_start_ms: Some(5_000), ..place(3) }, AT);
        let broken = Place { latest_start_ms: Some(0), late_ms: 5_000, ..place(3) };
        let later = Standing::of(&broken, AT.plus(10_000));
        assert!(!later.is_news(&before));
        let much_later = Standing::of(&Place { late_ms: 65_000, ..broken.clone() }, AT.plus(70_000));
        assert!(!much_later.is_news(&before));
        let moved = Standing::of(&Place { position: 2, ..broken }, AT.plus(10_000));
        assert_eq!(moved.row().latest_start, before.row().latest_start, "who gets on is shown what was promised");
    }

    #[test]
    fn ordinals_are_english() {
        let shown = [1, 2, 3, 4, 11, 12, 13, 21, 102, 111].map(ordinal);
        assert_eq!(shown, ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "111th"]);
    }

    #[test]
    fn a_start_beyond_all_times_can_be_shown() {
        let never = Place { latest_start_ms: Some(u64::MAX), ..place(1) };
        assert!(Standing::of(&never, AT).detail().starts_with("position 1 of the node"));
    }
}
