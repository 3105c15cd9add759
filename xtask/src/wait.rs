//! Waiting for a value, never longer than said.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// The only clock of xtask: it measures how long something took, nothing is decided from the date.
#[allow(clippy::disallowed_methods)]
pub fn now() -> Instant {
    Instant::now()
}

/// Calls `look` until it finds a value; an error of `look` ends the wait at once.
pub fn until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = now();
    loop {
        if let Some(value) = look()? {
            return Ok(value);
        }
        if start.elapsed() >= limit {
            bail!("{what}: not within {} s", limit.as_secs());
        }
        // Short against anything waited for here (processes and their first answers take 10 ms to 10 s).
        std::thread::sleep(Duration::from_millis(50));
    }
}
