//! What people read.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use spaceport_core::ids::Size;
use spaceport_core::protocol::{CallerClass, Denial, DurationLimit, Limiter, QueueOf, UnauthenticatedReason, wire};

use crate::world::World;

/// What the call of the story declares.
const DECLARED_S: u64 = 50;

/// A refusal, who is refused, and what the client says then: a title, and words of its text.
type Told = (Denial, CallerClass, &'static str, &'static str);

/// Every kind of refusal, as the unmodified client of the Space words it: what is said is never another kind's reason, and
/// the numbers are ours. A table of the wire alone would not show that.
///
/// # Errors
/// The refusals that read otherwise.
pub fn the_client_words_each_refusal_as_what_it_is(world: &World) -> Result<()> {
    let told = refusals();
    let answers: Vec<Value> = told
        .iter()
        .map(|(denial, caller, _, _)| {
            let answer = wire(denial, *caller);
            json!({ "status": answer.status, "headers": answer.headers, "body": String::from_utf8_lossy(&answer.body) })
        })
        .collect();
    let said = world.app(&format!(
        r#"
import datetime, http.server, json, os, threading
answers = json.loads({answers:?})
class Api(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        answer = answers[int(self.path.split("taskId=")[1].split("&")[0])]
        self.send_response(answer["status"])
        for name, value in answer["headers"]:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer["body"].encode())))
        self.end_headers()
        self.wfile.write(answer["body"].encode())
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["SPACES_ZERO_DEVICE_API_URL"] = f"http://127.0.0.1:{{server.server_port}}"
import spaces
from spaces.zero import client
from starlette.datastructures import Headers
class Request:
    headers = Headers({{"x-ip-token": "a.e30.c", "x-gradio-user": "app"}})
said = []
for task in range(len(answers)):
    try:
        client.schedule(task, Request(), datetime.timedelta(seconds={DECLARED_S}), "xlarge")
        said.append({{"title": "granted", "text": ""}})
    except BaseException as error:
        text = getattr(error, "message", None) or repr(error)
        said.append({{"title": getattr(error, "title", type(error).__name__), "text": str(text)}})
print(json.dumps(said))
"#,
        answers = serde_json::to_string(&answers)?,
    ))?;
    let wrong: Vec<String> = told
        .iter()
        .enumerate()
        .filter(|(index, (_, _, title, text))| {
            let said = &said[index];
            said["title"] != *title || !said["text"].as_str().unwrap_or_default().contains(text)
        })
        .map(|(index, (denial, caller, title, text))| {
            format!("{} for {caller:?} reads {}, not {title:?} with {text:?}", denial.kind(), said[index])
        })
        .collect();
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

fn refusals() -> Vec<Told> {
    let quota = || Denial::QuotaExceeded {
        declared_ms: DECLARED_S * 1_000,
        given_ms: None,
        weight: 2,
        needed_ms: 2 * DECLARED_S * 1_000,
        left_ms: 44_750,
        reserved_ms: 0,
        limit_ms: 300_000,
        resets_in_ms: 3_723_000,
        largest_declared_ms: 22_375,
        limiter: Limiter::Account,
    };
    let pending = Denial::PendingOverquota {
        declared_ms: DECLARED_S * 1_000,
        given_ms: None,
        weight: 2,
        needed_ms: 2 * DECLARED_S * 1_000,
        left_ms: 44_750,
        reserved_ms: 100_000,
        limit_ms: 300_000,
        frees_in_ms: 30_000,
        largest_declared_ms: 22_375,
        limiter: Limiter::Account,
    };
    let illegal = Denial::IllegalDuration {
        declared_ms: DECLARED_S * 1_000,
        limit_ms: 30_000,
        what: DurationLimit::LongestCall,
        legal: None,
    };
    let bad_token = Denial::Unauthenticated { reason: UnauthenticatedReason::Expired };
    let (quota_title, error) = ("ZeroGPU quota exceeded", "ZeroGPU client error");
    let none = "No GPU was available";
    let regular = CallerClass::Regular;
    vec![
        (
            quota(),
            CallerClass::Guest,
            quota_title,
            "your ZeroGPU quota (100s requested vs. 44s left). Try again in 1:02:03",
        ),
        (quota(), regular, quota_title, "your free ZeroGPU quota (100s requested vs. 44s left)"),
        (quota(), CallerClass::Pro, quota_title, "your Pro ZeroGPU quota (100s requested vs. 44s left)"),
        (pending, regular, "ZeroGPU pending credits exceeded", "allocated to running tasks"),
        (
            Denial::TooManyGuests { limit: 64, frees_in_ms: 60_000 },
            CallerClass::Guest,
            quota_title,
            "Try again in 0:01:00",
        ),
        (Denial::RunsExceeded { limit: 20, resets_in_ms: 60_000 }, regular, quota_title, "your ZeroGPU runs limit"),
        (illegal, regular, "ZeroGPU illegal duration", "(100s) is larger than the maximum allowed"),
        (Denial::ConcurrencyExceeded { limit: 2, of: QueueOf::Account }, regular, error, none),
        (Denial::NoCapacity { size: Size::Xlarge }, regular, error, none),
        (Denial::QueueFull { bound: 32, of: QueueOf::Pool }, regular, error, none),
        (bad_token, regular, error, "Expired ZeroGPU proxy token"),
        (Denial::AccountDeleting, regular, error, none),
        (Denial::AccountUnusable, regular, error, none),
        (Denial::ClockSkew { ms: 6_000 }, regular, error, none),
        (Denial::BrokerUnavailable, regular, error, none),
        (Denial::PlatformFault, regular, error, none),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_kind_of_refusal_is_left_out() {
        let kinds: BTreeSet<&str> = refusals().iter().map(|(denial, ..)| denial.kind()).collect();
        // What the agent says by itself is on no page.
        let on_pages = spaceport_crds::conditions::DenialKind::ALL.iter().map(|kind| kind.as_str());
        let all: BTreeSet<&str> = on_pages.chain([Denial::BrokerUnavailable.kind()]).collect();
        assert_eq!(kinds, all);
    }
}
