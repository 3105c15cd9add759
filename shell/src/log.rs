//! The log of a process: its flags and its start.

use std::io::IsTerminal as _;

use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// How logs look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// Lines for people.
    Text,
}

/// Logs go to standard error.
#[derive(Debug, Args)]
pub struct LogArgs {
    /// How logs look.
    #[arg(long, env = "SPACEPORT_LOG_FORMAT", value_enum, default_value = "json")]
    pub log_format: LogFormat,
    /// What is logged, in `tracing` filter syntax.
    #[arg(long, env = "SPACEPORT_LOG", default_value = "info,tower=warn,hyper=warn,kube_client=warn")]
    pub log_filter: String,
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is malformed.
    #[error("--log-filter {filter:?} is no filter")]
    Filter {
        /// The filter as given.
        filter: String,
        /// What is wrong with it.
        #[source]
        source: ParseError,
    },
    /// Another log was started before.
    #[error("the log cannot be started")]
    Start(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Starts the log, once a process.
///
/// # Errors
/// See [`LogError`].
pub fn start(args: &LogArgs) -> Result<(), LogError> {
    let LogArgs { log_format, log_filter } = args;
    let filter =
        EnvFilter::try_new(log_filter).map_err(|source| LogError::Filter { filter: log_filter.clone(), source })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match log_format {
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
        // Colours are for a terminal; a file would be full of escapes.
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
    }
    .map_err(LogError::Start)
}

#[cfg(test)]
mod tests {
    use clap::{Command, FromArgMatches as _};

    use super::*;
    use crate::error_chain;

    fn parsed(flags: &[&str]) -> LogArgs {
        let command = LogArgs::augment_args(Command::new("test").no_binary_name(true));
        LogArgs::from_arg_matches(&command.try_get_matches_from(flags).unwrap()).unwrap()
    }

    #[test]
    fn flags_and_their_environment_twins_keep_their_names() {
        let args = parsed(&["--log-format", "text", "--log-filter", "debug"]);
        assert_eq!((args.log_format, args.log_filter.as_str()), (LogFormat::Text, "debug"));
        let command = LogArgs::augment_args(Command::new("test"));
        let twins: Vec<_> = command.get_arguments().filter_map(|argument| argument.get_env()).collect();
        assert_eq!(twins, ["SPACEPORT_LOG_FORMAT", "SPACEPORT_LOG"]);
    }

    #[test]
    fn a_malformed_filter_and_a_second_log_are_errors() {
        let args = |log_filter: &str| LogArgs { log_format: LogFormat::Json, log_filter: log_filter.to_owned() };
        let error = start(&args("info,kube=loud")).unwrap_err();
        assert!(error_chain(&error).starts_with("--log-filter \"info,kube=loud\" is no filter: "), "{error:?}");
        start(&args("off")).unwrap();
        assert!(matches!(start(&args("off")), Err(LogError::Start(_))));
    }
}
