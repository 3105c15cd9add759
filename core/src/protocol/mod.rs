//! The device API's wire contract: what the unmodified `spaces` client sends and what it understands.
//!
//! The client is strict: an unknown header value, a status outside its tables or two events in one chunk end in a
//! traceback in somebody's app. So everything that reaches it is made here, from types, and nowhere else:
//! queries by [`parse_request`], refusals by the one table in [`wire`] (L18), queue frames by [`chunk`].

mod answer;
mod denial;
mod request;
mod secret;
mod sse;

pub use answer::{
    AllowRefusal, Answer, HeadFault, Released, ScheduleResponse, allowed, malformed_head, not_allowed, queue_size,
    refuse, released, scheduled, startup_reported, wire,
};
pub use denial::{
    CallerClass, Denial, DurationLimit, LegalDurations, Limiter, QueueOf, UnauthenticatedReason, human_message,
};
pub use request::{
    ALLOW_TOKEN_MAX, BadRequest, CGROUP_PATH_MAX, Call, DEFAULT_DURATION_SECONDS, Problem, Request, ScheduleQuery,
    TARGET_MAX, parse_request,
};
pub use secret::Secret;
pub use sse::{Event, QueuingReason, chunk, last_chunk, sse_head};
