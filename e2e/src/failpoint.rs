//! Makes operator or agent stand still at a named place, in builds for tests (`operator/src/fault.rs`,
//! `device-plugin/src/fault.rs`), through their admin endpoint.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::breakable::{Part, SYSTEM};
use crate::kubectl::at;
use crate::wait::eventually;
use crate::world::World;

/// The admin endpoint answers at once, or its process is gone.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// A lease reaches any place within a second or two; a slow machine needs more.
const REACH_LIMIT: Duration = Duration::from_secs(40);

/// A process that was told where to stand still.
#[derive(Debug)]
pub(crate) struct Failpoint {
    address: String,
    place: &'static str,
}

impl Failpoint {
    /// Wants the only pod of `part` to stand still at `place`.
    pub(crate) fn want(world: &World, part: Part, place: &'static str) -> Result<Self> {
        let selector = format!("app.kubernetes.io/name={}", part.program());
        let pods = world.kubectl.items(&["--namespace", SYSTEM, "get", "pods", "--selector", &selector])?;
        let address = pods.iter().find_map(|pod| {
            let gone = !at(pod, "/metadata/deletionTimestamp").is_null();
            at(pod, "/status/podIP").as_str().filter(|_| !gone && at(pod, "/status/phase") == "Running")
        });
        let address = format!("{}:8080", address.with_context(|| format!("{} has no running pod", part.program()))?);
        let point = Self { address, place };
        let said = point.ask("PUT", &format!("/failpoint/{place}"))?;
        ensure!(said.ends_with(&format!("waits for {place}\n")), "{} does not know {place}: {said}", part.program());
        Ok(point)
    }

    /// Waits until it stands there.
    pub(crate) fn reached(&self) -> Result<()> {
        let stands = format!("stands at {}\n", self.place);
        eventually(&format!("somebody {}", stands.trim()), REACH_LIMIT, || {
            let said = self.ask("GET", "/failpoint")?;
            Ok(if said.ends_with(&stands) { Ok(()) } else { Err(said) })
        })
    }

    /// Lets the process go on; one that is gone does not mind.
    pub(crate) fn let_go(&self) {
        if let Err(error) = self.ask("DELETE", "/failpoint") {
            println!("  nobody stands at {} any more ({error:#})", self.place);
        }
    }

    fn ask(&self, method: &str, path: &str) -> Result<String> {
        let context = || format!("{method} http://{}{path}", self.address);
        let mut connection = TcpStream::connect_timeout(&self.address.parse()?, ANSWER_LIMIT).with_context(context)?;
        connection.set_read_timeout(Some(ANSWER_LIMIT))?;
        write!(connection, "{method} {path} HTTP/1.1\r\nHost: admin\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .with_context(context)?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer).with_context(context)?;
        Ok(answer)
    }
}
