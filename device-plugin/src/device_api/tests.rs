//! The device API over plain loopback, with a client that reads as strictly as the real one: one chunk, one event.

use std::net::Ipv4Addr;

use spaceport_core::protocol::{DurationLimit, UnauthenticatedReason};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;

const SCHEDULE: &str = "/schedule?cgroupPath=%2F&taskId=7&enableQueue=true&tokenVersion=2&durationSeconds=10";
/// Fails a test that would hang; nothing waits for it otherwise.
const PATIENCE: Duration = Duration::from_secs(20);

/// What reached the backend, with the way to answer it.
enum Asked {
    Schedule(ScheduleQuery, oneshot::Sender<ScheduleOutcome>),
    Allow(Secret, i32, oneshot::Sender<Result<(), AllowRefusal>>),
    Release(Secret, bool, oneshot::Sender<Released>),
}

/// A backend that does what the test says.
struct Scripted(mpsc::UnboundedSender<Asked>);

impl Scripted {
    async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Asked) -> T {
        let (sender, receiver) = oneshot::channel();
        self.0.send(make(sender)).ok();
        match receiver.await {
            Ok(answer) => answer,
            // The test dropped the question: the backend hangs.
            Err(_) => std::future::pending().await,
        }
    }
}

impl PodBackend for Scripted {
    async fn schedule(&self, query: ScheduleQuery) -> ScheduleOutcome {
        self.ask(|sender| Asked::Schedule(query, sender)).await
    }

    async fn allow(&self, allow_token: Secret, pid: i32) -> Result<(), AllowRefusal> {
        self.ask(|sender| Asked::Allow(allow_token, pid, sender)).await
    }

    async fn release(&self, allow_token: Secret, failed: bool) -> Released {
        self.ask(|sender| Asked::Release(allow_token, failed, sender)).await
    }

    fn queue_size(&self) -> u32 {
        5
    }
}

struct World {
    port: u16,
    asked: mpsc::UnboundedReceiver<Asked>,
    metrics: Metrics,
    stop: CancellationToken,
    server: JoinHandle<()>,
}

impl World {
    async fn start(limits: Limits) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, asked) = mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let (backend, metrics) = (Arc::new(Scripted(sender)), Metrics::new());
        let sockets = PeerSockets::open().ok();
        let server = tokio::spawn(serve(listener, sockets, backend, limits, metrics.clone(), stop.clone()));
        Self { port, asked, metrics, stop, server }
    }

    async fn send(&self, bytes: &[u8]) -> Client {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        Client { stream, read_ahead: String::new() }
    }

    /// As the client's HTTP library writes it.
    async fn post(&self, target: &str) -> Client {
        let port = self.port;
        let head = format!(
            "POST {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate, \
             br\r\nConnection: keep-alive\r\nUser-Agent: python-httpx/0.28.1\r\nContent-Length: 0\r\n\r\n"
        );
        self.send(head.as_bytes()).await
    }

    async fn asked(&mut self) -> Asked {
        timeout(PATIENCE, self.asked.recv()).await.unwrap().unwrap()
    }

    async fn asked_schedule(&mut self) -> oneshot::Sender<ScheduleOutcome> {
        match self.asked().await {
            Asked::Schedule(query, sender) => {
                assert_eq!((query.task_id, query.duration_seconds), (7, 10));
                sender
            }
            _ => panic!("another call came in"),
        }
    }

    /// A client whose request waits in the queue, its stream's head read.
    async fn queued(&mut self) -> (Client, Wait) {
        let mut client = self.post(SCHEDULE).await;
        let sender = self.asked_schedule().await;
        let (verdict, receiver) = oneshot::channel();
        let (place, left) = signal();
        let (reason, caller) = (QueuingReason::Concurrency, CallerClass::Regular);
        let outcome = ScheduleOutcome::Queued(Queued { reason, caller, verdict: receiver, place });
        assert!(sender.send(outcome).is_ok());
        let head = client.read().await;
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"), "{head}");
        for line in ["Content-Type: text/event-stream", "Transfer-Encoding: chunked", "X-Queuing-Reason: concurrency"] {
            assert!(head.contains(line), "{head}");
        }
        (client, Wait { verdict, left })
    }
}

/// The backend's side of a queued request.
struct Wait {
    verdict: oneshot::Sender<Verdict>,
    /// Resolves when the place is given up, fails when it is disarmed.
    left: oneshot::Receiver<()>,
}

struct Client {
    stream: TcpStream,
    /// Read but not looked at: a second chunk may come with the first, as in the client's HTTP library.
    read_ahead: String,
}

impl Client {
    /// What one read yields.
    async fn read(&mut self) -> String {
        let mut bytes = vec![0; 64 * 1024];
        let read = timeout(PATIENCE, self.stream.read(&mut bytes)).await.unwrap().unwrap();
        String::from_utf8(bytes[..read].to_vec()).unwrap()
    }

    /// All until the server closes.
    async fn rest(mut self) -> String {
        timeout(PATIENCE, self.stream.read_to_string(&mut self.read_ahead)).await.unwrap().unwrap();
        self.read_ahead
    }

    async fn status(self) -> u16 {
        let text = self.rest().await;
        text.strip_prefix("HTTP/1.1 ").and_then(|rest| rest[..3].parse().ok()).unwrap_or_else(|| panic!("{text:?}"))
    }

    /// The payload of the next event: exactly one chunk, never spread over two reads.
    async fn event(&mut self) -> String {
        if self.read_ahead.is_empty() {
            self.read_ahead = self.read().await;
        }
        let piece = std::mem::take(&mut self.read_ahead);
        let (length, rest) = piece.split_once("\r\n").unwrap_or_else(|| panic!("{piece:?}"));
        let length = usize::from_str_radix(length, 16).unwrap();
        self.read_ahead = rest[length..].strip_prefix("\r\n").unwrap_or_else(|| panic!("{piece:?}")).to_owned();
        rest[..length].to_owned()
    }
}

/// A guard and what tells that it acted.
fn signal() -> (OnDrop, oneshot::Receiver<()>) {
    let (sender, receiver) = oneshot::channel();
    (
        OnDrop::new(move || {
            sender.send(()).ok();
        }),
        receiver,
    )
}

/// Whether the guard acted; waits until it is gone either way.
async fn acted(receiver: oneshot::Receiver<()>) -> bool {
    timeout(PATIENCE, receiver).await.unwrap().is_ok()
}

fn grant() -> (Granted, oneshot::Receiver<()>) {
    let (undelivered, lost) = signal();
    let response = ScheduleResponse {
        idle: false,
        nvidia_index: 2,
        nvidia_uuid: "GPU-22".to_owned(),
        allow_token: Secret::new("t0ken"),
    };
    (Granted { response, caller: CallerClass::Regular, undelivered }, lost)
}

const GRANT: &str = r#"{"allowToken":"t0ken","idle":false,"nvidiaIndex":2,"nvidiaUUID":"GPU-22"}"#;

fn quick() -> Limits {
    Limits { ping: Duration::from_millis(20), ..Limits::default() }
}

#[tokio::test]
async fn a_free_slot_is_answered_at_once() {
    let mut world = World::start(Limits::default()).await;
    let client = world.post(SCHEDULE).await;
    let (granted, lost) = grant();
    world.asked_schedule().await.send(ScheduleOutcome::Answer(Ok(granted))).unwrap();
    let text = client.rest().await;
    assert!(text.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"), "{text}");
    assert!(text.contains("\r\nX-Authenticated: regular\r\n") && text.ends_with(GRANT), "{text}");
    assert!(!acted(lost).await);
}

#[tokio::test]
async fn a_denial_has_its_numbers() {
    let mut world = World::start(Limits::default()).await;
    let client = world.post(SCHEDULE).await;
    let denial =
        Denial::IllegalDuration { declared_ms: 10_000, limit_ms: 5_000, what: DurationLimit::LongestCall, legal: None };
    let denied = Denied { denial, caller: CallerClass::Guest };
    world.asked_schedule().await.send(ScheduleOutcome::Answer(Err(denied))).unwrap();
    let text = client.rest().await;
    assert!(text.starts_with("HTTP/1.1 429 Too Many Requests\r\n") && text.contains("\"wait\":-1"), "{text}");
    assert!(!text.contains("X-Authenticated"), "{text}");
}

#[tokio::test]
async fn a_queue_stream_pings_and_then_grants() {
    let mut world = World::start(quick()).await;
    let (mut client, wait) = world.queued().await;
    assert_eq!(client.event().await, "event: ping\n\n");
    assert_eq!(client.event().await, "event: ping\n\n");
    let (granted, lost) = grant();
    wait.verdict.send(Ok(granted)).unwrap();
    // A ping may have been on its way.
    let verdict = loop {
        let event = client.event().await;
        if event != "event: ping\n\n" {
            break event;
        }
    };
    assert_eq!(verdict, format!("event: succeeded\ndata: {GRANT}\n\n"));
    assert!(!acted(lost).await);
    assert!(!acted(wait.left).await);
    assert_eq!(client.rest().await, "0\r\n\r\n");
}

#[tokio::test]
async fn a_denial_or_a_lost_verdict_ends_the_stream_with_failed() {
    let mut world = World::start(Limits::default()).await;
    for denied in [true, false] {
        let (client, wait) = world.queued().await;
        if denied {
            let denial = Denial::Unauthenticated { reason: UnauthenticatedReason::Expired };
            wait.verdict.send(Err(Denied { denial, caller: CallerClass::Guest })).unwrap();
        } else {
            drop(wait.verdict);
        }
        assert_eq!(client.rest().await, "f\r\nevent: failed\n\n\r\n0\r\n\r\n");
        assert!(!acted(wait.left).await);
    }
}

#[tokio::test]
async fn the_longest_wait_ends_with_failed_and_frees_the_place() {
    let mut world = World::start(Limits { queue: Duration::from_millis(50), ..Limits::default() }).await;
    let (client, wait) = world.queued().await;
    assert_eq!(client.rest().await, "f\r\nevent: failed\n\n\r\n0\r\n\r\n");
    assert!(acted(wait.left).await);
}

#[tokio::test]
async fn a_caller_that_leaves_the_queue_frees_its_place() {
    let mut world = World::start(Limits::default()).await;
    let (client, wait) = world.queued().await;
    drop(client);
    assert!(acted(wait.left).await);
    // The verdict that was on its way finds nobody: the grant comes back.
    let (granted, lost) = grant();
    drop(wait.verdict.send(Ok(granted)));
    assert!(acted(lost).await);
}

/// The forked worker of another call holds a copy of the descriptor, so no end of the stream arrives.
#[tokio::test]
async fn a_caller_that_leaves_a_copy_of_its_connection_behind_frees_its_place_too() {
    let mut world = World::start(quick()).await;
    let (mut client, wait) = world.queued().await;
    assert_eq!(client.event().await, "event: ping\n\n");
    let copy = client.stream.into_std().unwrap().try_clone().unwrap();
    assert!(acted(wait.left).await);
    assert!(wait.verdict.is_closed(), "a verdict that comes now goes back");
    assert!(world.metrics.encode().unwrap().contains("callers_left_unseen_total 1\n"));
    drop(copy);
}

#[tokio::test]
async fn a_caller_that_reads_slowly_keeps_its_place() {
    let one_of =
        Limits { ping: Duration::from_millis(20), unread_pings: NonZeroU32::new(10).unwrap(), ..Limits::default() };
    let mut world = World::start(one_of).await;
    let (mut client, wait) = world.queued().await;
    let ping = client.event().await.len();
    // Twice as long as nobody may read, in which one byte is read now and then.
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        client.stream.read_exact(&mut [0]).await.unwrap();
    }
    let mut left = wait.left;
    assert!(left.try_recv().is_err(), "{ping} bytes an event, one byte read in two or three events");
    assert!(world.metrics.encode().unwrap().contains("callers_left_unseen_total 0\n"));
    drop(client);
    assert!(acted(left).await, "and its leaving is seen as ever");
}

#[tokio::test]
async fn a_caller_that_leaves_before_the_first_answer_withdraws_its_request() {
    let mut world = World::start(Limits::default()).await;
    let client = world.post(SCHEDULE).await;
    let mut sender = world.asked_schedule().await;
    drop(client);
    timeout(PATIENCE, sender.closed()).await.unwrap();
    let (granted, lost) = grant();
    drop(sender.send(ScheduleOutcome::Answer(Ok(granted))));
    assert!(acted(lost).await);
}

#[tokio::test]
async fn allow_and_release_say_what_the_client_can_read() {
    let mut world = World::start(Limits::default()).await;
    let outcomes = [(Ok(()), 200), (Err(AllowRefusal::UnknownToken), 404), (Err(AllowRefusal::ForeignProcess), 403)];
    for (outcome, status) in outcomes {
        let client = world.post("/allow?allowToken=t0ken&pid=31").await;
        let Asked::Allow(token, pid, sender) = world.asked().await else { panic!() };
        assert_eq!((token.expose(), pid), ("t0ken", 31));
        sender.send(outcome).unwrap();
        assert_eq!(client.status().await, status);
    }
    for (outcome, status) in [(Released::Ended, 200), (Released::DeviceNotUsed, 204), (Released::Unknown, 404)] {
        let client = world.post("/release?allowToken=t0ken&fail=false").await;
        let Asked::Release(token, failed, sender) = world.asked().await else { panic!() };
        assert_eq!((token.expose(), failed), ("t0ken", false));
        sender.send(outcome).unwrap();
        assert_eq!(client.status().await, status);
    }
}

#[tokio::test]
async fn a_backend_that_hangs_costs_no_result() {
    let mut world = World::start(Limits { answer: Duration::from_millis(30), ..Limits::default() }).await;
    let client = world.post("/release?allowToken=t0ken&fail=true").await;
    let _release = world.asked().await;
    assert_eq!(client.status().await, 200);
    let client = world.post("/allow?allowToken=t0ken&pid=2").await;
    let _allow = world.asked().await;
    assert_eq!(client.status().await, 503);
    let client = world.post(SCHEDULE).await;
    let mut schedule = world.asked_schedule().await;
    assert_eq!(client.status().await, 503);
    timeout(PATIENCE, schedule.closed()).await.unwrap();
}

#[tokio::test]
async fn what_needs_no_backend_is_answered_without_it() {
    let world = World::start(Limits { head: Duration::from_millis(50), ..Limits::default() }).await;
    assert_eq!(world.post("/startup-report").await.status().await, 200);
    assert!(world.send(b"GET /queue-size HTTP/1.1\r\n\r\n").await.rest().await.ends_with("\r\n\r\n5"));
    assert_eq!(world.post("/schedule").await.status().await, 400);
    assert_eq!(world.post(&format!("{SCHEDULE}&gpuSize=weird")).await.status().await, 429);
    assert_eq!(world.post("/release?allowToken=t0ken").await.status().await, 404);
    assert_eq!(world.post("/nothing").await.status().await, 404);
    assert_eq!(world.send(b"GET /schedule HTTP/1.1\r\n\r\n").await.status().await, 405);
    assert_eq!(world.send(b"hello\r\n\r\n").await.status().await, 400);
    assert_eq!(world.send(b"POST /startup-report HTTP/1.0\r\n\r\n").await.status().await, 505);
    assert_eq!(world.send(b"POST /startup-report HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi").await.status().await, 400);
    let long = format!("POST /schedule?token={} HTTP/1.1\r\n\r\n", "a".repeat(17 * 1024));
    assert_eq!(world.send(long.as_bytes()).await.status().await, 431);
    assert_eq!(world.send(b"POST /startup-rep").await.status().await, 408);
    // A second request on the same connection is not read; the first is answered whole.
    let twice = b"POST /startup-report HTTP/1.1\r\n\r\nPOST /startup-report HTTP/1.1\r\n\r\n";
    assert_eq!(world.send(twice).await.rest().await.matches("HTTP/1.1 200").count(), 1);
}

#[tokio::test]
async fn waiting_calls_leave_room_for_releases() {
    let one = NonZeroUsize::new(1).unwrap();
    let mut world = World::start(Limits { schedules: one, ..Limits::default() }).await;
    let (first, wait) = world.queued().await;
    let refused = world.post(SCHEDULE).await.rest().await;
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("QueueFull"), "{refused}");
    let client = world.post("/release?allowToken=t0ken&fail=false").await;
    let Asked::Release(_, _, sender) = world.asked().await else { panic!() };
    sender.send(Released::Ended).unwrap();
    assert_eq!(client.status().await, 200);
    // The place comes back with the connection.
    drop(first);
    assert!(acted(wait.left).await);
    loop {
        let mut client = world.post(SCHEDULE).await;
        tokio::select! {
            asked = world.asked.recv() => break assert!(matches!(asked, Some(Asked::Schedule(..)))),
            refused = client.read() => assert!(refused.starts_with("HTTP/1.1 503"), "{refused}"),
        }
    }
}

#[tokio::test]
async fn connections_beyond_the_bound_wait_for_their_turn() {
    let one = NonZeroUsize::new(1).unwrap();
    let mut world = World::start(Limits { connections: one, ..Limits::default() }).await;
    let first = world.post("/allow?allowToken=a&pid=2").await;
    let Asked::Allow(_, _, sender) = world.asked().await else { panic!() };
    let second = world.post("/release?allowToken=b&fail=false").await;
    sender.send(Ok(())).unwrap();
    assert_eq!(first.status().await, 200);
    let Asked::Release(_, _, sender) = world.asked().await else { panic!() };
    sender.send(Released::Ended).unwrap();
    assert_eq!(second.status().await, 200);
}

#[tokio::test]
async fn a_stop_answers_what_runs_and_cuts_what_waits() {
    let mut world = World::start(Limits::default()).await;
    let (mut queued, wait) = world.queued().await;
    let undecided = world.post(SCHEDULE).await;
    let mut schedule = world.asked_schedule().await;
    let release = world.post("/release?allowToken=t0ken&fail=false").await;
    let Asked::Release(_, _, sender) = world.asked().await else { panic!() };
    world.stop.cancel();
    // Cut without a verdict: the client asks again by itself, once.
    assert_eq!(queued.read().await, "");
    assert!(acted(wait.left).await);
    timeout(PATIENCE, schedule.closed()).await.unwrap();
    assert_eq!(undecided.status().await, 503);
    sender.send(Released::Ended).unwrap();
    assert_eq!(release.status().await, 200);
    timeout(PATIENCE, world.server).await.unwrap().unwrap();
}
