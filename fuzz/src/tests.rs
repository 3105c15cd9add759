//! The seeds: real examples, and what was once found.

use std::fs;
use std::path::{Path, PathBuf};

use prost::Message as _;
use spaceport_core::ids::{CookieId, Epoch, Size};
use spaceport_core::page::Page;
use spaceport_device_plugin::converge::{Event, Machine};
use spaceport_operator::ledger::convert::status_of;
use spaceport_operator::ledger::display::{Display, TierShown};
use spaceport_proto::nodelink as link;
use spaceport_proto::nodelink::{broker_message as orders, node_message as reports};

use super::*;

type Check = fn(&[u8]) -> Verdict;

const TARGETS: [(&str, Check); 8] = [
    ("account_status", account_status::check),
    ("checkpoint", checkpoint::check),
    ("device_api", device_api::check),
    ("nodelink_orders", nodelink_orders::check),
    ("nodelink_reports", nodelink_reports::check),
    ("replay_trace", replay_trace::check),
    ("token", token::check),
    ("token_keys", token_keys::check),
];

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target)
}

/// `good-…` is taken, `bad-…` is refused, and `found-…` only has to be survived.
#[test]
fn every_seed_is_what_its_name_says() {
    for (target, check) in TARGETS {
        let mut good = 0;
        for entry in fs::read_dir(folder(target)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let verdict = check(&fs::read(&path).unwrap());
            match name.split_once('-').unwrap().0 {
                "good" => {
                    good += 1;
                    assert_eq!(verdict, Verdict::Taken, "{target}/{name}");
                }
                "bad" => assert_eq!(verdict, Verdict::Refused, "{target}/{name}"),
                "found" => {}
                other => panic!("{target}/{name}: what is {other:?}?"),
            }
        }
        assert!(good >= 3, "{target} has {good} good examples");
    }
}

/// Writes the seeds that nobody can type: pages of the ledger, snapshots of the machine, protobuf.
/// `cargo test -p spaceport-fuzz -- --ignored writes_the_seeds`
#[test]
#[ignore = "writes into the checkout; run it when a message or the form of a page has changed"]
fn writes_the_seeds() {
    for (name, page) in pages() {
        write("account_status", name, &status(&page));
    }
    for (name, node) in machines() {
        write("checkpoint", name, &serde_json::to_vec(&node.machine.snapshot()).unwrap());
    }
    for (name, messages) in order_stories() {
        write("nodelink_orders", name, &messages.iter().flat_map(order_frame).collect::<Vec<u8>>());
    }
    for (name, messages) in report_stories() {
        write("nodelink_reports", name, &messages.iter().flat_map(report_frame).collect::<Vec<u8>>());
    }
}

fn write(target: &str, name: &str, bytes: &[u8]) {
    fs::create_dir_all(folder(target)).unwrap();
    fs::write(folder(target).join(name), bytes).unwrap();
}

fn status(page: &Page) -> Vec<u8> {
    let tier = TierShown { name: "demo".to_owned(), allowance: ledger::allowance() };
    serde_json::to_vec(&status_of(page, Display::of(page, Some(&tier)), None).unwrap()).unwrap()
}

fn pages() -> Vec<(&'static str, Page)> {
    let ledger = nodelink_reports::ledger();
    let mut refused = ledger::Ledger::new(Epoch(7));
    refused.account(Page::default());
    refused.request(1, Size::Xlarge, 3_600_000);
    refused.wait(10_000);
    let guests = guests();
    let row = guests.page().cookies[0].clone();
    vec![
        ("good-open", ledger.page().clone()),
        ("good-settled", settled(ledger)),
        ("good-refused", refused.page().clone()),
        ("good-term", Page { epoch: Epoch(7), seq: 7, write_id: "w".to_owned(), ..Page::default() }),
        ("bad-visitor-without-row", Page { cookies: Box::default(), ..guests.page().clone() }),
        ("bad-visitor-twice", Page { cookies: [row.clone(), row].into(), ..Page::default() }),
        ("good-guests-open", guests.page().clone()),
        ("good-guests-settled", settled(guests)),
    ]
}

/// Two visitors of an address prefix have a lease each, one of them waits for another, and is refused a third.
fn guests() -> ledger::Ledger {
    let mut ledger = ledger::Ledger::new(Epoch(7));
    ledger.guests(Page::default());
    let calls = [("ann", 30_000), ("bob", 60_000), ("ann", 60_000), ("ann", 120_000)];
    for (number, (visitor, declared_ms)) in (1..).zip(calls) {
        ledger.request_of(Some(&CookieId::new(visitor)), number, Size::Large, declared_ms);
    }
    ledger.wait(10_000);
    ledger
}

/// The page when the lease of the first order has ended and its receipt is not written.
fn settled(mut ledger: ledger::Ledger) -> Page {
    let lease = ledger::first_lease(&ledger).unwrap().to_string();
    let mut settled = None;
    for message in life(&lease) {
        let command = spaceport_operator::ledger::node_messages::command(&ledger::NODE.to_owned().into(), &message);
        ledger.command(command.unwrap().unwrap());
        ledger.wait(1_000);
        if !ledger.page().closed.is_empty() {
            settled = Some(ledger.page().clone());
        }
    }
    settled.unwrap()
}

fn first_lease() -> String {
    let ledger = nodelink_reports::ledger();
    ledger.orders.first().unwrap().lease.to_string()
}

/// What a node says of a lease from its order to its end.
fn life(lease: &str) -> Vec<reports::Message> {
    let boundary = |name: &str| link::Boundary { name: name.to_owned(), ago_ms: 5, detail: String::new() };
    let lease = lease.to_owned();
    let isolation = "None".to_owned();
    let boundaries = vec![boundary("Assigned")];
    vec![
        reports::Message::Started(link::Started {
            lease: lease.clone(),
            isolation,
            boundaries,
            ..link::Started::default()
        }),
        reports::Message::Running(link::Running {
            lease: lease.clone(),
            reused: false,
            boundaries: vec![boundary("Allowed")],
        }),
        reports::Message::Ended(link::Ended {
            lease: lease.clone(),
            kind: link::EndKind::Released.into(),
            used_ms: 12_345,
            device_opens: 3,
            context_seen: true,
            message: "the function returned".to_owned(),
            boundaries: vec![boundary("Released")],
            card: 0,
            kept: false,
        }),
        reports::Message::Freed(link::Freed {
            lease,
            kind: link::FreedKind::Held.into(),
            reason: "the worker is kept frozen for reuse".to_owned(),
            boundaries: vec![boundary("Freed")],
        }),
    ]
}

fn machines() -> Vec<(&'static str, nodelink_orders::Node)> {
    let fresh = || {
        let mut node = nodelink_orders::Node::new(Machine::new(nodelink_orders::AGENT.to_owned(), 0), 1_000_000);
        node.happens(Event::Inventory(vec![nodelink_orders::card(0), nodelink_orders::card(1)]));
        node.happens(Event::Linked { epoch: 7 });
        node
    };
    let mut running = fresh();
    running.schedules(1);
    running.ordered(1, "01aaaaaaaaaaaaaaaaaaaaaaaa");
    let mut several = fresh();
    for (ticket, lease) in [(1, "01a"), (2, "01b"), (3, "01c"), (4, "01d"), (5, "01e")] {
        several.schedules(ticket);
        several.ordered(ticket, lease);
    }
    let mut ended = fresh();
    ended.schedules(1);
    ended.ordered(1, "01a");
    ended.happens(Event::Release { call: 99, pod_uid: "app-1".to_owned(), token: "01a".to_owned(), fail: false });
    vec![("good-empty", fresh()), ("good-running", running), ("good-several", several), ("good-ended", ended)]
}

fn order_stories() -> Vec<(&'static str, Vec<orders::Message>)> {
    use orders::Message;
    let start = |ticket, lease: &str, at| Message::Start(nodelink_orders::start(ticket, lease, at));
    let acknowledged =
        |lease: &str| Message::Acknowledged(link::Acknowledged { lease: lease.to_owned(), ended: true, freed: true });
    let denial = spaceport_core::protocol::Denial::QuotaExceeded {
        declared_ms: 60_000,
        given_ms: None,
        weight: 1,
        needed_ms: 60_000,
        left_ms: 45_000,
        reserved_ms: 0,
        limit_ms: 60_000,
        resets_in_ms: 1_000,
        largest_declared_ms: 45_000,
        limiter: spaceport_core::protocol::Limiter::default(),
    };
    let denied = link::Denied {
        ticket: 2,
        denial: serde_json::to_string(&denial).unwrap(),
        caller: link::CallerClass::Pro.into(),
    };
    let queued = link::Queued {
        ticket: 3,
        position: 1,
        eta_ms: 9_000,
        latest_start_ms: 30_000,
        place_epoch: 7,
        place_number: 3,
        caller: link::CallerClass::Regular.into(),
        concurrency: false,
    };
    let cancel = link::Cancel {
        epoch: 7,
        boottime_ms: 1_000_000,
        lease: "01b".to_owned(),
        reason: "the account is gone".to_owned(),
        order_ttl_ms: 5_000,
    };
    let after = link::Start {
        after: "01a".to_owned(),
        avoid: vec![1],
        size: link::Size::Xlarge.into(),
        ..nodelink_orders::start(4, "01d", 1_000_000)
    };
    vec![
        ("good-lives", vec![start(1, "01a", 1_000_000), start(2, "01b", 1_000_000), acknowledged("01a")]),
        ("good-refusals", vec![Message::Denied(denied), Message::Queued(queued), Message::Cancel(cancel.clone())]),
        (
            "good-hand-over",
            vec![
                start(1, "01a", 1_000_000),
                start(2, "01b", 1_000_000),
                Message::Start(after),
                Message::Cancel(cancel),
                acknowledged("01b"),
            ],
        ),
        (
            "good-next-leader",
            vec![
                Message::Queued(link::Queued { ticket: 2, place_number: 2, latest_start_ms: 0, ..queued }),
                Message::Queued(queued),
                Message::Standby(link::Standby {}),
                Message::Welcome(link::Welcome { epoch: 9 }),
                Message::Queued(link::Queued { latest_start_ms: 29_000, ..queued }),
                Message::Standby(link::Standby {}),
                Message::Welcome(link::Welcome { epoch: 10 }),
            ],
        ),
        (
            "good-terms",
            vec![
                Message::Standby(link::Standby {}),
                Message::Welcome(link::Welcome { epoch: 9 }),
                start(1, "01a", 1_000_000),
            ],
        ),
    ]
}

fn report_stories() -> Vec<(&'static str, Vec<reports::Message>)> {
    use reports::Message;
    let lease = first_lease();
    let [started, running, ended, freed] = life(&lease).try_into().unwrap();
    let Message::Ended(end) = &ended else { panic!("the third is the end") };
    let card = link::Card { index: 0, large_slots: 2, grantable: true, ..link::Card::default() };
    let known = link::NodeLease {
        lease: lease.clone(),
        phase: link::LeasePhase::Ended.into(),
        size: link::Size::Large.into(),
        ended: Some(end.clone()),
        freed: true,
        ..link::NodeLease::default()
    };
    let hello = link::Hello {
        node: "gpu-1".to_owned(),
        boot_id: "boot-1".to_owned(),
        agent_instance: "agent-2".to_owned(),
        highest_epoch: 7,
    };
    let request = link::Request {
        ticket: 9,
        pod: Some(link::Pod { namespace: "demo".to_owned(), space: "hello".to_owned(), ..link::Pod::default() }),
        size: link::Size::Xlarge.into(),
        declared_ms: 60_000,
        ..link::Request::default()
    };
    let presents = |ticket, place_epoch, place_number, promised_ms, promised_ago_ms| {
        let size = link::Size::Large.into();
        let placed = link::Request { ticket, size, place_epoch, place_number, declared_ms: 30_000, ..request.clone() };
        Message::Request(link::Request { promised_ms, promised_ago_ms, ..placed })
    };
    // First the later place, then an older one whose latest start has passed, and one that was promised nothing.
    let placed = vec![presents(9, 6, 2, 60_000, 5_000), presents(8, 5, 4, 60_000, 60_000), presents(7, 6, 1, 0, 0)];
    // Places of others or of nobody yet, and for the third request another than its own.
    let invented = vec![
        presents(9, 7, 3, 60_000, 0),
        presents(8, 6, 1, 60_000, 0),
        presents(7, 6, 1, u64::MAX, 1),
        presents(6, 7, 9, 60_000, 0),
        presents(3, 6, 5, 1, 0),
        presents(5, u64::MAX, u64::MAX, 1, u64::MAX),
    ];
    let idle = link::IdleWorker {
        pod_uid: "pod".to_owned(),
        container: "container".to_owned(),
        task_id: 1,
        card: 0,
        size: link::Size::Large.into(),
        leaving: false,
    };
    let (cards, leases) = (vec![card.clone()], vec![known]);
    let joined = link::Joined { epoch: 7, cards, leases, idle: vec![idle.clone()] };
    let heartbeat = link::Heartbeat { inventory_changed: true, cards: vec![card], ..link::Heartbeat::default() };
    let kept = Message::Ended(link::Ended { kept: true, ..end.clone() });
    let keeps = |idle| Message::Heartbeat(link::Heartbeat { idle_changed: true, idle, ..link::Heartbeat::default() });
    let leaving = link::IdleWorker { leaving: true, ..idle.clone() };
    let lists = [vec![idle.clone()], vec![leaving], Vec::new()].map(keeps);
    let reuse = [started.clone(), running.clone(), kept].into_iter().chain(lists).collect();
    let nameless = link::IdleWorker { pod_uid: String::new(), ..idle };
    let refused = link::Refused { lease, reason: "no free large slot".to_owned() };
    vec![
        ("good-life", vec![started, running, ended, freed]),
        ("good-rejoined", vec![Message::Hello(hello), Message::Joined(joined), Message::Heartbeat(heartbeat)]),
        (
            "good-requests",
            vec![Message::Request(request), Message::Dequeue(link::Dequeue { ticket: 3 }), Message::Refused(refused)],
        ),
        ("good-placed", placed),
        ("good-invented", invented),
        ("good-kept", reuse),
        ("bad-nameless", vec![keeps(vec![nameless])]),
        ("bad-kindless", vec![Message::Ended(link::Ended { lease: "x".to_owned(), ..link::Ended::default() })]),
    ]
}

fn order_frame(message: &orders::Message) -> Vec<u8> {
    link::BrokerMessage { message: Some(message.clone()) }.encode_length_delimited_to_vec()
}

fn report_frame(message: &reports::Message) -> Vec<u8> {
    link::NodeMessage { boottime_ms: 1_000_000, message: Some(message.clone()) }.encode_length_delimited_to_vec()
}
