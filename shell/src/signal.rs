//! The signals by which a process is told to stop.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGTERM and SIGINT. From [`StopSignals::listen`] on they no longer end the process by themselves.
#[derive(Debug)]
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

/// A signal cannot be listened for.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for {signal}")]
pub struct SignalError {
    /// Its name.
    pub signal: &'static str,
    /// Why.
    #[source]
    pub source: std::io::Error,
}

impl StopSignals {
    /// Begins to listen, inside a runtime.
    ///
    /// # Errors
    /// [`SignalError`].
    pub fn listen() -> Result<Self, SignalError> {
        let listen = |kind, name: &'static str| signal(kind).map_err(|source| SignalError { signal: name, source });
        Ok(Self {
            terminate: listen(SignalKind::terminate(), "SIGTERM")?,
            interrupt: listen(SignalKind::interrupt(), "SIGINT")?,
        })
    }

    /// Waits for one of them and returns its name. Without a bound: most processes are never told.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::{Signal, getpid, kill_process};

    use super::*;

    #[tokio::test]
    async fn both_signals_are_heard_by_name() {
        let mut signals = StopSignals::listen().unwrap();
        for (signal, name) in [(Signal::TERM, "SIGTERM"), (Signal::INT, "SIGINT")] {
            kill_process(getpid(), signal).unwrap();
            assert_eq!(signals.next().await, name);
        }
    }
}
