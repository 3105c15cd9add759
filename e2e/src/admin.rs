//! The admin endpoint of operator and agent, where builds for tests are told what to do.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::breakable::{Part, SYSTEM};
use crate::kubectl::at;
use crate::world::World;

/// It answers at once, or its process is gone.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// The admin endpoint of one pod.
#[derive(Debug)]
pub(crate) struct Admin {
    address: String,
}

impl Admin {
    /// That of the only pod of `part`.
    pub(crate) fn of(world: &World, part: Part) -> Result<Self> {
        let selector = format!("app.kubernetes.io/name={}", part.program());
        let pods = world.kubectl.items(&["--namespace", SYSTEM, "get", "pods", "--selector", &selector])?;
        let address = pods.iter().find_map(|pod| {
            let gone = !at(pod, "/metadata/deletionTimestamp").is_null();
            at(pod, "/status/podIP").as_str().filter(|_| !gone && at(pod, "/status/phase") == "Running")
        });
        let address = address.with_context(|| format!("{} has no running pod", part.program()))?;
        Ok(Self { address: format!("{address}:8080") })
    }

    /// What it answers, with whatever status: the text says what is wrong.
    pub(crate) fn ask(&self, method: &str, path: &str) -> Result<String> {
        let context = || format!("{method} http://{}{path}", self.address);
        let mut connection = TcpStream::connect_timeout(&self.address.parse()?, ANSWER_LIMIT).with_context(context)?;
        connection.set_read_timeout(Some(ANSWER_LIMIT))?;
        write!(connection, "{method} {path} HTTP/1.1\r\nHost: admin\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .with_context(context)?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer).with_context(context)?;
        let (_, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no HTTP answer: {answer:?}"))?;
        Ok(body.to_owned())
    }
}
