//! What a Space's client asks for: method and request target to a typed [`Request`] (device API A2, A5).

use std::borrow::Cow;
use std::fmt;

use super::Secret;
use crate::ids::Size;

/// Longest request target that is read, bytes. Ours are below 2 KiB with a token in them.
pub const TARGET_MAX: usize = 16 * 1024;
/// Longest `cgroupPath` that is kept, bytes (the kernel's own limit of a path).
pub const CGROUP_PATH_MAX: usize = 4096;
/// Longest `allowToken` that is looked up, bytes. Ours are far shorter; others are never ours.
pub const ALLOW_TOKEN_MAX: usize = 256;
/// What a call is worth that names no duration, as the client itself assumes (docs/rules.md).
pub const DEFAULT_DURATION_SECONDS: u64 = 60;
/// How much of a bad value is shown, characters.
const EXCERPT_MAX: usize = 64;

/// One call of the device API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// `POST /schedule`: a decorated function wants a GPU.
    Schedule(ScheduleQuery),
    /// `POST /allow`: the worker is about to touch the device.
    Allow {
        /// From the grant.
        allow_token: Secret,
        /// The worker, in the PID namespace of its container; above 0, untrusted (N15).
        pid: i32,
    },
    /// `POST /release`: the call is over.
    Release {
        /// From the grant.
        allow_token: Secret,
        /// The function raised, or its worker died.
        failed: bool,
    },
    /// `POST /startup-report`: the app is about to open its port.
    StartupReport,
    /// `GET /queue-size`.
    QueueSize,
}

/// The query of `POST /schedule`. Nothing in it identifies a call or a pod (L15, N14).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScheduleQuery {
    /// What the client read from its cgroup file, often `/`. Untrusted, at most [`CGROUP_PATH_MAX`] bytes.
    pub cgroup_path: String,
    /// CPython's `id()` of the decorated function: stable in one process only.
    pub task_id: u64,
    /// The client can wait on a queue stream; it always can.
    pub enable_queue: bool,
    /// 2 with Gradio 5.16.1 or newer, else 1.
    pub token_version: u32,
    /// Declared duration in seconds, as sent: already multiplied by the client's factor (L19).
    pub duration_seconds: u64,
    /// Only if the decorator named one.
    pub size: Option<Size>,
    /// The visitor's `X-IP-Token`, raw and unverified; may be anything, also empty.
    pub token: Option<Secret>,
}

/// Which call a bad request was meant to be; the client reads its answers by the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `/schedule`.
    Schedule,
    /// `/allow`.
    Allow,
    /// `/release`.
    Release,
    /// `/startup-report`.
    StartupReport,
    /// `/queue-size`.
    QueueSize,
    /// No call of this API.
    Unknown,
}

/// A request that is none. Its text names field and value, never a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {problem}")]
pub struct BadRequest {
    /// The call it was meant to be.
    pub call: Call,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a request. Values are cut to a few characters and escaped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// No call has this path.
    #[error("no call has the path `{path}`")]
    UnknownPath {
        /// The path, cut.
        path: String,
    },
    /// The path exists, the method is another.
    #[error("method is `{method}`, must be {expected}")]
    WrongMethod {
        /// The method, cut.
        method: String,
        /// The right one.
        expected: &'static str,
    },
    /// The target is longer than [`TARGET_MAX`].
    #[error("the request target has {bytes} bytes, at most {TARGET_MAX} are read")]
    TargetTooLong {
        /// Its length.
        bytes: usize,
    },
    /// Not UTF-8 once percent-decoded (or it holds U+FFFD, which is what broken text decodes to).
    #[error("`{field}` is not UTF-8 text")]
    NotUtf8 {
        /// The field, or `a field's name`.
        field: &'static str,
    },
    /// A required field is not there.
    #[error("`{field}` is missing")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// A field is there twice.
    #[error("`{field}` is there more than once")]
    Duplicate {
        /// The field.
        field: &'static str,
    },
    /// A field is longer than anything of ours.
    #[error("`{field}` has {bytes} bytes, at most {limit} are taken")]
    TooLong {
        /// The field.
        field: &'static str,
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// Not an integer.
    #[error("`{field}` is `{value}`, must be a whole number")]
    NotANumber {
        /// The field.
        field: &'static str,
        /// The value, cut.
        value: String,
    },
    /// An integer, but negative or beyond what the field can hold.
    #[error("`{field}` is `{value}`, must be a number from {least} to {most}")]
    OutOfRange {
        /// The field.
        field: &'static str,
        /// The value, cut.
        value: String,
        /// Smallest number taken.
        least: u64,
        /// Largest number taken.
        most: u64,
    },
    /// Neither `true` nor `false`.
    #[error("`{field}` is `{value}`, must be true or false")]
    NotABoolean {
        /// The field.
        field: &'static str,
        /// The value, cut.
        value: String,
    },
    /// A size that does not exist. The client passes on any text its author wrote.
    #[error("`gpuSize` is `{value}`, must be large or xlarge")]
    UnknownSize {
        /// The value, cut.
        value: String,
    },
}

impl fmt::Display for Call {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Schedule => "/schedule",
            Self::Allow => "/allow",
            Self::Release => "/release",
            Self::StartupReport => "/startup-report",
            Self::QueueSize => "/queue-size",
            Self::Unknown => "device API",
        })
    }
}

impl ScheduleQuery {
    /// Declared milliseconds. A number of seconds that does not fit saturates at what a ledger page can hold (an
    /// `int64`), far above every limit.
    pub fn declared_ms(&self) -> u64 {
        self.duration_seconds.saturating_mul(1000).min(i64::MAX.unsigned_abs())
    }
}

/// Method and request target (path and query, as on the request line) to a request.
///
/// Fields that this API does not know are ignored, so that a newer client is served.
///
/// # Errors
/// [`BadRequest`]; [`super::refuse`] makes the answer that the client understands.
pub fn parse_request(method: &str, target: &[u8]) -> Result<Request, BadRequest> {
    let mut halves = target.splitn(2, |byte| *byte == b'?');
    let path = halves.next().unwrap_or_default();
    let query = halves.next().unwrap_or_default();
    let (call, expected) = match path {
        b"/schedule" => (Call::Schedule, "POST"),
        b"/allow" => (Call::Allow, "POST"),
        b"/release" => (Call::Release, "POST"),
        b"/startup-report" => (Call::StartupReport, "POST"),
        b"/queue-size" => (Call::QueueSize, "GET"),
        _ => {
            let path = excerpt(&String::from_utf8_lossy(&path[..path.len().min(4 * EXCERPT_MAX)]));
            return Err(BadRequest { call: Call::Unknown, problem: Problem::UnknownPath { path } });
        }
    };
    let parsed = if method != expected {
        Err(Problem::WrongMethod { method: excerpt(method), expected })
    } else if target.len() > TARGET_MAX {
        Err(Problem::TargetTooLong { bytes: target.len() })
    } else {
        match call {
            Call::Schedule => schedule_query(query).map(Request::Schedule),
            Call::Allow => allow_query(query),
            Call::Release => release_query(query),
            Call::StartupReport => Ok(Request::StartupReport),
            Call::QueueSize | Call::Unknown => Ok(Request::QueueSize),
        }
    };
    parsed.map_err(|problem| BadRequest { call, problem })
}

fn schedule_query(query: &[u8]) -> Result<ScheduleQuery, Problem> {
    let [cgroup_path, task_id, enable_queue, token_version, duration, size, token] =
        fields(query, ["cgroupPath", "taskId", "enableQueue", "tokenVersion", "durationSeconds", "gpuSize", "token"])?;
    let size = match size.text.as_deref() {
        None => None,
        Some("large") => Some(Size::Large),
        Some("xlarge") => Some(Size::Xlarge),
        Some(other) => return Err(Problem::UnknownSize { value: excerpt(other) }),
    };
    Ok(ScheduleQuery {
        cgroup_path: cgroup_path.required()?.at_most(CGROUP_PATH_MAX)?.0.into_owned(),
        task_id: task_id.required()?.number(0, u64::MAX)?,
        enable_queue: enable_queue.required()?.boolean()?,
        // In range by the limit given.
        token_version: u32::try_from(token_version.required()?.number(0, u32::MAX.into())?).unwrap_or(u32::MAX),
        duration_seconds: match duration.text {
            None => DEFAULT_DURATION_SECONDS,
            Some(_) => duration.required()?.number(0, u64::MAX)?,
        },
        size,
        token: token.text.map(|text| Secret::new(text.into_owned())),
    })
}

fn allow_query(query: &[u8]) -> Result<Request, Problem> {
    let [allow_token, pid] = fields(query, ["allowToken", "pid"])?;
    let pid = pid.required()?.number(1, i32::MAX.unsigned_abs().into())?;
    Ok(Request::Allow { allow_token: allow_token.required()?.token()?, pid: i32::try_from(pid).unwrap_or(i32::MAX) })
}

fn release_query(query: &[u8]) -> Result<Request, Problem> {
    let [allow_token, fail] = fields(query, ["allowToken", "fail"])?;
    Ok(Request::Release { allow_token: allow_token.required()?.token()?, failed: fail.required()?.boolean()? })
}

/// A known field, there or not.
struct Field<'query> {
    name: &'static str,
    text: Option<Cow<'query, str>>,
}

/// A field that is there, percent-decoded.
struct Value<'query>(Cow<'query, str>, &'static str);

/// Picks the known fields out of a query, each at most once.
fn fields<'query, const N: usize>(
    query: &'query [u8],
    names: [&'static str; N],
) -> Result<[Field<'query>; N], Problem> {
    let mut found = names.map(|name| Field { name, text: None });
    // Bounded by TARGET_MAX.
    for (key, value) in form_urlencoded::parse(query) {
        if key.contains(char::REPLACEMENT_CHARACTER) {
            return Err(Problem::NotUtf8 { field: "a field's name" });
        }
        let Some(field) = found.iter_mut().find(|field| field.name == key) else { continue };
        if field.text.is_some() {
            return Err(Problem::Duplicate { field: field.name });
        }
        if value.contains(char::REPLACEMENT_CHARACTER) {
            return Err(Problem::NotUtf8 { field: field.name });
        }
        field.text = Some(value);
    }
    Ok(found)
}

impl<'query> Field<'query> {
    fn required(self) -> Result<Value<'query>, Problem> {
        match self.text {
            Some(text) => Ok(Value(text, self.name)),
            None => Err(Problem::Missing { field: self.name }),
        }
    }
}

impl<'query> Value<'query> {
    fn at_most(self, limit: usize) -> Result<Self, Problem> {
        let bytes = self.0.len();
        if bytes > limit { Err(Problem::TooLong { field: self.1, bytes, limit }) } else { Ok(self) }
    }

    fn token(self) -> Result<Secret, Problem> {
        if self.0.is_empty() {
            return Err(Problem::Missing { field: self.1 });
        }
        Ok(Secret::new(self.at_most(ALLOW_TOKEN_MAX)?.0.into_owned()))
    }

    fn number(self, least: u64, most: u64) -> Result<u64, Problem> {
        let digits = self.0.strip_prefix('-').unwrap_or(&self.0);
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(Problem::NotANumber { field: self.1, value: excerpt(&self.0) });
        }
        match self.0.parse::<u64>() {
            Ok(number) if (least..=most).contains(&number) => Ok(number),
            // Too large for 64 bits, negative, or outside the field's own range.
            _ => Err(Problem::OutOfRange { field: self.1, value: excerpt(&self.0), least, most }),
        }
    }

    fn boolean(self) -> Result<bool, Problem> {
        match &*self.0 {
            "true" => Ok(true),
            "false" => Ok(false),
            other => Err(Problem::NotABoolean { field: self.1, value: excerpt(other) }),
        }
    }
}

/// The start of a value, fit for a log line and a message.
fn excerpt(text: &str) -> String {
    let mut shown: String = text.chars().take(EXCERPT_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(EXCERPT_MAX).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests;
