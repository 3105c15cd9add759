//! What goes back to the client: statuses, headers and bodies, all from its own tables (device API A2, A5, A8).

use serde_json::json;

use super::{BadRequest, Call, CallerClass, Denial, Problem, Secret, human_message};

/// Longest wait that is told to the client, seconds: a window is a day; far larger numbers break its time type.
const WAIT_MAX_SECONDS: u64 = 366 * 24 * 3600;

/// A whole HTTP answer, apart from its framing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// A status that the client can read.
    pub status: u16,
    /// Without the framing headers, which [`Answer::encode`] adds.
    pub headers: Vec<(&'static str, String)>,
    /// Empty for 204.
    pub body: Vec<u8>,
}

/// A grant, as the client wants it: all four fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScheduleResponse {
    /// The worker that holds this slot is still there and will be reused: no `/allow` follows.
    pub idle: bool,
    /// The slot's own index on the node (N17); the client keys its workers by it.
    pub nvidia_index: u32,
    /// Goes verbatim into the worker's `CUDA_VISIBLE_DEVICES`.
    pub nvidia_uuid: String,
    /// Names the lease in `/allow` and `/release`. Short, or the event may not fit one segment.
    pub allow_token: Secret,
}

/// Why `/allow` is refused. The client knows one answer only, 200; the rest is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum AllowRefusal {
    /// No grant of this pod has this token.
    #[error("no grant of this pod has this allowToken")]
    UnknownToken,
    /// The token has been used; it opens a device once.
    #[error("the allowToken has been used already")]
    AlreadyUsed,
    /// It came after the grant was given up.
    #[error("the grant is over: /allow came too late")]
    TooLate,
    /// The pid is no process of this pod.
    #[error("the pid is no process of this pod")]
    ForeignProcess,
    /// Killing the pid at a deadline would end the container.
    #[error("pid 1 of a container cannot be a worker")]
    InitProcess,
    /// The gate or the cgroup failed.
    #[error("the device could not be opened for this process; nothing is charged")]
    DeviceUnavailable,
}

/// What `/release` found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Released {
    /// The lease has ended.
    Ended,
    /// It has ended cleanly and the device was never opened: the client warns its author (N16).
    DeviceNotUsed,
    /// No running lease of this pod has this token; the client takes it as harmless.
    Unknown,
}

/// Why the head of a request could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum HeadFault {
    /// Not HTTP.
    #[error("the request is not HTTP/1.1")]
    Malformed,
    /// HTTP/1.0 or older: no chunks.
    #[error("HTTP/1.1 is needed")]
    Version,
    /// Longer than is read.
    #[error("the request's head is too long")]
    TooLong,
    /// It did not come in time.
    #[error("the request's head did not come in time")]
    TooSlow,
    /// Calls of this API have no body.
    #[error("the request has a body; everything is in the query")]
    Body,
}

/// The result that the client is told about its request for approval.
#[derive(Clone, Copy)]
enum ApproveResult {
    RunsExceeded,
    QuotaExceeded,
    IllegalDuration,
    PendingOverquotaExceeded,
}

/// One row of the table of denials.
enum Row {
    /// 429: the client reads `left` and `wait`.
    Limit { result: ApproveResult, left_ms: u64, wait: Wait },
    /// 503: "No GPU was available".
    Unavailable,
    /// 401: "Expired ZeroGPU proxy token".
    Unauthorized,
}

/// `wait`, by which the client chooses its message.
enum Wait {
    /// "Try again in …": whole seconds, rounded up, at least 1.
    Milliseconds(u64),
    /// "runs limit".
    Zero,
    /// "larger than the maximum allowed".
    Never,
}

/// The one table (L18). A quota denial with a wait of 0 cannot be written here.
const fn row(denial: &Denial) -> Row {
    match denial {
        Denial::QuotaExceeded { left_ms, resets_in_ms, .. } => Row::Limit {
            result: ApproveResult::QuotaExceeded,
            left_ms: *left_ms,
            wait: Wait::Milliseconds(*resets_in_ms),
        },
        Denial::PendingOverquota { left_ms, frees_in_ms, .. } => Row::Limit {
            result: ApproveResult::PendingOverquotaExceeded,
            left_ms: *left_ms,
            wait: Wait::Milliseconds(*frees_in_ms),
        },
        Denial::TooManyGuests { frees_in_ms, .. } => {
            Row::Limit { result: ApproveResult::QuotaExceeded, left_ms: 0, wait: Wait::Milliseconds(*frees_in_ms) }
        }
        Denial::RunsExceeded { .. } => Row::Limit { result: ApproveResult::RunsExceeded, left_ms: 0, wait: Wait::Zero },
        Denial::IllegalDuration { .. } => ILLEGAL,
        Denial::ConcurrencyExceeded { .. }
        | Denial::NoCapacity { .. }
        | Denial::QueueFull { .. }
        | Denial::AccountDeleting
        | Denial::AccountUnusable
        | Denial::ClockSkew { .. }
        | Denial::BrokerUnavailable
        | Denial::PlatformFault => Row::Unavailable,
        Denial::Unauthenticated { .. } => Row::Unauthorized,
    }
}

/// How the client is told that a request can never be granted.
const ILLEGAL: Row = Row::Limit { result: ApproveResult::IllegalDuration, left_ms: 0, wait: Wait::Never };

/// A denial as the client understands it. `reason` and `detail` in the body are for whoever looks at the bytes; the
/// client ignores them.
pub fn wire(denial: &Denial, caller: CallerClass) -> Answer {
    denied(row(denial), caller, denial.kind(), &human_message(denial))
}

fn denied(row: Row, caller: CallerClass, reason: &str, detail: &str) -> Answer {
    let mut answer = match row {
        Row::Limit { result, left_ms, wait } => {
            let wait: i64 = match wait {
                // At most WAIT_MAX_SECONDS, so it fits.
                Wait::Milliseconds(ms) => ms.div_ceil(1000).clamp(1, WAIT_MAX_SECONDS).cast_signed(),
                Wait::Zero => 0,
                Wait::Never => -1,
            };
            let body = json!({"left": left_ms / 1000, "wait": wait, "reason": reason, "detail": detail});
            let mut answer = Answer::json(429, &body);
            answer.headers.push((
                "X-Approve-Result",
                match result {
                    ApproveResult::RunsExceeded => "runs-exceeded",
                    ApproveResult::QuotaExceeded => "quota-exceeded",
                    ApproveResult::IllegalDuration => "illegal-duration",
                    ApproveResult::PendingOverquotaExceeded => "pending-overquota-exceeded",
                }
                .to_owned(),
            ));
            answer
        }
        Row::Unavailable => Answer::explained(503, reason, detail),
        Row::Unauthorized => Answer::explained(401, reason, detail),
    };
    answer.headers.extend(caller.header());
    answer
}

/// 200 for a grant that needed no waiting.
pub fn scheduled(response: &ScheduleResponse, caller: CallerClass) -> Answer {
    let mut answer = Answer::json(200, &response.value());
    answer.headers.extend(caller.header());
    answer
}

/// 200 for `/allow`: the device opens for this process now.
pub fn allowed() -> Answer {
    Answer::empty(200)
}

/// The answer to an `/allow` that is refused: the client reports its worker as failed and releases.
pub fn not_allowed(refusal: AllowRefusal) -> Answer {
    let (status, reason) = match refusal {
        AllowRefusal::UnknownToken => (404, "UnknownToken"),
        AllowRefusal::AlreadyUsed => (409, "AlreadyUsed"),
        AllowRefusal::TooLate => (410, "TooLate"),
        AllowRefusal::ForeignProcess => (403, "ForeignProcess"),
        AllowRefusal::InitProcess => (403, "InitProcess"),
        AllowRefusal::DeviceUnavailable => (503, "DeviceUnavailable"),
    };
    Answer::explained(status, reason, &refusal.to_string())
}

/// The answer to `/release`: 2xx or 404 only, all else makes the client throw away a finished result.
pub fn released(released: Released) -> Answer {
    match released {
        Released::Ended => Answer::empty(200),
        Released::DeviceNotUsed => Answer::empty(204),
        Released::Unknown => Answer::explained(404, "UnknownToken", "no running lease of this pod has this allowToken"),
    }
}

/// 200 for `/startup-report`; anything else aborts the app's start.
pub fn startup_reported() -> Answer {
    Answer::empty(200)
}

/// `/queue-size`: a JSON number.
pub fn queue_size(waiting: u32) -> Answer {
    Answer::json(200, &json!(waiting))
}

/// The answer to a request that could not be parsed. Nothing was asked of the ledger.
pub fn refuse(bad: &BadRequest) -> Answer {
    let detail = bad.to_string();
    match (&bad.problem, bad.call) {
        (Problem::UnknownPath { .. }, _) => Answer::explained(404, "UnknownPath", &detail),
        (Problem::WrongMethod { expected, .. }, _) => {
            let mut answer = Answer::explained(405, "WrongMethod", &detail);
            answer.headers.push(("Allow", (*expected).to_owned()));
            answer
        }
        // No lease has such a token, so none is held up; a 400 would make the client throw its result away.
        (_, Call::Release) => Answer::explained(404, "BadRequest", &detail),
        // Authors write such durations and sizes; this is the one refusal that the client words as "not allowed".
        (Problem::UnknownSize { .. } | Problem::OutOfRange { field: "durationSeconds", .. }, Call::Schedule) => {
            denied(ILLEGAL, CallerClass::Guest, "BadRequest", &detail)
        }
        (Problem::TargetTooLong { .. }, _) => Answer::explained(414, "BadRequest", &detail),
        _ => Answer::explained(400, "BadRequest", &detail),
    }
}

/// The answer to a request whose head could not be read, so that the call is not known.
pub fn malformed_head(fault: HeadFault) -> Answer {
    let (status, reason) = match fault {
        HeadFault::Malformed => (400, "Malformed"),
        HeadFault::Body => (400, "Body"),
        HeadFault::Version => (505, "Version"),
        HeadFault::TooLong => (431, "TooLong"),
        HeadFault::TooSlow => (408, "TooSlow"),
    };
    Answer::explained(status, reason, &fault.to_string())
}

impl CallerClass {
    /// Absent for guests: the client crashes on a value it does not know.
    pub(super) fn header(self) -> Option<(&'static str, String)> {
        let value = match self {
            Self::Guest => return None,
            Self::Regular => "regular",
            Self::Pro => "pro",
        };
        Some(("X-Authenticated", value.to_owned()))
    }
}

impl ScheduleResponse {
    fn value(&self) -> serde_json::Value {
        json!({
            "idle": self.idle,
            "nvidiaIndex": self.nvidia_index,
            "nvidiaUUID": self.nvidia_uuid,
            "allowToken": self.allow_token.expose(),
        })
    }

    /// One line of JSON.
    pub(super) fn json(&self) -> String {
        self.value().to_string()
    }
}

impl Answer {
    fn empty(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new() }
    }

    fn json(status: u16, body: &serde_json::Value) -> Self {
        let headers = vec![("Content-Type", "application/json".to_owned())];
        Self { status, headers, body: body.to_string().into_bytes() }
    }

    fn explained(status: u16, reason: &str, detail: &str) -> Self {
        Self::json(status, &json!({"reason": reason, "detail": detail}))
    }

    /// The bytes of an HTTP/1.1 answer that closes its connection: the client opens a new one for each call anyway.
    pub fn encode(&self) -> Vec<u8> {
        let mut headers = self.headers.clone();
        if self.status != 204 {
            // A 204 has no body and may not say how long it is.
            headers.push(("Content-Length", self.body.len().to_string()));
        }
        let mut bytes = head(self.status, &headers);
        if self.status != 204 {
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }
}

/// Status line and headers, with what every answer has: nothing is cached, one request a connection.
pub(super) fn head(status: u16, headers: &[(&'static str, String)]) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status} {}\r\n", phrase(status));
    for (name, value) in headers {
        text.push_str(name);
        text.push_str(": ");
        text.push_str(value);
        text.push_str("\r\n");
    }
    text.push_str("Cache-Control: no-store\r\nConnection: close\r\n\r\n");
    text.into_bytes()
}

/// Reason phrases of the statuses that this API uses. The phrase may be empty in HTTP, and is for any other.
const fn phrase(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        414 => "URI Too Long",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "",
    }
}

#[cfg(test)]
mod tests;
