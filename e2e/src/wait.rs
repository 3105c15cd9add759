//! Waiting for values.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};

/// Between two looks: below what a person notices, above what loads the API server.
const INTERVAL: Duration = Duration::from_millis(100);

/// Looks until `look` gives a value, at most `limit`. The last thing seen is in the error.
pub fn eventually<T>(what: &str, limit: Duration, look: impl FnMut() -> Result<Result<T, String>>) -> Result<T> {
    eventually_every(INTERVAL, what, limit, look)
}

/// The same with another time between two looks, for what takes minutes and is disturbed by who looks.
pub(crate) fn eventually_every<T>(
    interval: Duration,
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<Result<T, String>>,
) -> Result<T> {
    let start = now();
    loop {
        match look()? {
            Ok(value) => return Ok(value),
            Err(seen) if now().duration_since(start) >= limit => {
                bail!("{what}: not within {} s; last seen: {seen}", limit.as_secs());
            }
            Err(_) => std::thread::sleep(interval),
        }
    }
}

#[allow(clippy::disallowed_methods)] // Bounds a wait in tests; nothing is decided by it.
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Seconds since 1970, on the clock that pods have too.
#[allow(clippy::disallowed_methods)] // Compared with what a program in a pod of this machine wrote down.
pub(crate) fn wall() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}
