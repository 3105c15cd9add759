//! The tasks of a process. Each has a name, and one that ends before it is told to is dead, which ends the process.

use std::error::Error;
use std::time::Duration;

use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::error_chain;

type BoxError = Box<dyn Error + Send + Sync>;

/// A task's name and how it ended.
type Ended = (&'static str, Result<(), BoxError>);

/// A group of tasks that end together. Those that still run when it is dropped are aborted.
#[derive(Debug)]
pub struct Tasks {
    set: JoinSet<Ended>,
    stop: CancellationToken,
}

/// How a task died.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// It ended although nothing had told it to.
    #[error("task {name:?} ended by itself")]
    Ended {
        /// Its name.
        name: &'static str,
    },
    /// It failed.
    #[error("task {name:?} failed")]
    Failed {
        /// Its name.
        name: &'static str,
        /// Why.
        #[source]
        source: BoxError,
    },
    /// It panicked.
    #[error("a task panicked")]
    Panicked(#[source] JoinError),
    /// Tasks ran on after they were told to stop.
    #[error("tasks did not end within {} s", limit.as_secs())]
    Slow {
        /// How long was waited.
        limit: Duration,
    },
}

impl Tasks {
    /// No tasks yet; `stop` is what tells them to end.
    pub fn new(stop: CancellationToken) -> Self {
        Self { set: JoinSet::new(), stop }
    }

    /// Tells the tasks to end; for them to wait on.
    pub fn stop_token(&self) -> &CancellationToken {
        &self.stop
    }

    /// Starts a task that cannot fail.
    pub fn spawn(&mut self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        self.set.spawn(async move {
            work.await;
            (name, Ok(()))
        });
    }

    /// Starts a task that can fail.
    pub fn spawn_fallible<E: Into<BoxError>>(
        &mut self,
        name: &'static str,
        work: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        self.set.spawn(async move { (name, work.await.map_err(Into::into)) });
    }

    /// Starts a task on a thread where it may block. It cannot be aborted.
    pub fn spawn_blocking<E: Into<BoxError>>(
        &mut self,
        name: &'static str,
        work: impl FnOnce() -> Result<(), E> + Send + 'static,
    ) {
        self.set.spawn_blocking(move || (name, work().map_err(Into::into)));
    }

    /// Tasks that have not ended, or whose end was not taken by [`Self::next`].
    pub fn len(&self) -> usize {
        self.set.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.set.is_empty()
    }

    /// Waits for the next task to end; none if there is none left. Nothing is lost if the wait is given up.
    ///
    /// # Errors
    /// The task failed, or it ended before it was told to.
    pub async fn next(&mut self) -> Option<Result<(), TaskError>> {
        let ended = self.set.join_next().await?;
        Some(self.judge(ended))
    }

    /// Waits for the first task to end, stops the others and waits for them, `limit` at most. The first reason is the
    /// result.
    ///
    /// # Errors
    /// See [`TaskError`].
    pub async fn wait(mut self, limit: Duration) -> Result<(), TaskError> {
        let mut result = self.next().await.unwrap_or(Ok(()));
        self.stop.cancel();
        let rest = async {
            while let Some(ended) = self.next().await {
                if result.is_ok() {
                    result = ended;
                }
            }
        };
        if tokio::time::timeout(limit, rest).await.is_err() {
            tracing::warn!(?limit, "Some tasks did not end in time; the process ends without them");
            return result.and(Err(TaskError::Slow { limit }));
        }
        result
    }

    /// Tells the tasks to end and waits for them, `limit` at most; what runs on then is aborted, and that is no error. For
    /// a group after which the process goes on: nothing of it is left when this returns.
    ///
    /// # Errors
    /// The first task that failed.
    pub async fn end(mut self, limit: Duration) -> Result<(), TaskError> {
        self.stop.cancel();
        let mut result = Ok(());
        let ends = async {
            while let Some(ended) = self.next().await {
                if result.is_ok() {
                    result = ended;
                }
            }
        };
        if tokio::time::timeout(limit, ends).await.is_err() {
            tracing::warn!(?limit, left = self.len(), "Some tasks did not end in time; they are cut off");
            self.set.shutdown().await;
        }
        result
    }

    fn judge(&self, ended: Result<Ended, JoinError>) -> Result<(), TaskError> {
        let stopping = self.stop.is_cancelled();
        match ended {
            Ok((name, Ok(()))) if stopping => {
                tracing::debug!(task = name, "Task ended");
                Ok(())
            }
            Ok((name, Ok(()))) => Err(TaskError::Ended { name }),
            Ok((name, Err(source))) => {
                tracing::error!(task = name, error = %error_chain(source.as_ref()), "Task failed");
                Err(TaskError::Failed { name, source })
            }
            Err(error) => Err(TaskError::Panicked(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing here takes that long.
    const LIMIT: Duration = Duration::from_secs(20);

    fn tasks() -> Tasks {
        Tasks::new(CancellationToken::new())
    }

    #[tokio::test]
    async fn a_dead_task_stops_the_others_and_is_the_reason() {
        let mut tasks = tasks();
        let stop = tasks.stop_token().clone();
        tasks.spawn("long", stop.cancelled_owned());
        tasks.spawn_fallible("dead", async { Err("no disk") });
        let error = tasks.wait(LIMIT).await.unwrap_err();
        assert_eq!(error_chain(&error), "task \"dead\" failed: no disk");
    }

    #[tokio::test]
    async fn a_task_that_just_ends_is_dead_too() {
        let mut tasks = tasks();
        tasks.spawn("short", async {});
        assert_eq!(tasks.wait(LIMIT).await.unwrap_err().to_string(), "task \"short\" ended by itself");
    }

    #[tokio::test]
    async fn a_panic_is_an_end_with_a_reason() {
        let mut tasks = tasks();
        tasks.spawn_blocking::<BoxError>("wrong", || panic!("on purpose"));
        assert!(matches!(tasks.next().await, Some(Err(TaskError::Panicked(_)))));
        assert!(tasks.is_empty() && tasks.next().await.is_none());
    }

    #[tokio::test]
    async fn a_stop_ends_well() {
        let mut tasks = tasks();
        let stop = tasks.stop_token().clone();
        tasks.spawn("long", stop.clone().cancelled_owned());
        stop.cancel();
        assert!(tasks.wait(LIMIT).await.is_ok());
    }

    #[tokio::test]
    async fn who_does_not_stop_is_not_waited_for_without_end() {
        let mut tasks = tasks();
        tasks.spawn("deaf", std::future::pending());
        tasks.stop_token().cancel();
        tasks.spawn("good", async {});
        let short = Duration::from_millis(10);
        assert!(matches!(tasks.wait(short).await, Err(TaskError::Slow { limit }) if limit == short));
    }
    #[tokio::test]
    async fn who_does_not_stop_is_cut_off_where_the_process_goes_on() {
        let mut tasks = tasks();
        let (alive, mut left) = tokio::sync::oneshot::channel::<()>();
        tasks.spawn("deaf", async move {
            std::future::pending::<()>().await;
            drop(alive);
        });
        assert!(tasks.end(Duration::from_millis(10)).await.is_ok());
        assert!(matches!(left.try_recv(), Err(tokio::sync::oneshot::error::TryRecvError::Closed)), "nothing is left");
    }
}
