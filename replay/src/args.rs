//! The command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgGroup, Args, Parser, ValueEnum};
use spaceport_core::queue::{LaneSettings, QueueBounds};
use spaceport_replay::admission::Quota;
use spaceport_replay::demand::Declare;
use spaceport_replay::promise::HoldLimits;
use spaceport_replay::replay::Rules;

/// Replays requests for GPUs under several queueing policies and compares what people would have waited
#[derive(Parser)]
#[command(version, group(ArgGroup::new("demand").required(true).args(["trace", "generate"])))]
pub struct Arguments {
    /// Replay this CSV file: arrival_s,duration_s,gpu_fraction_or_count,user[,declared_s[,tier[,function]]]
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Replay demand in the shape of real demand; what is declared by default too (60 s) stands beside it
    #[arg(long)]
    pub generate: bool,
    #[command(flatten)]
    pub shape: Shape,
    #[command(flatten)]
    pub site: Site,
    /// Instead of policies, compare quotas: what each refuses and what the others wait
    #[arg(long)]
    pub quota_sweep: bool,
    /// Write the generated trace as CSV; needs a single seed
    #[arg(long, value_name = "FILE", conflicts_with = "trace")]
    pub write: Option<PathBuf>,
    /// Print exactly one JSON object on standard output
    #[arg(long)]
    pub json: bool,
    /// Write a plot of the waits
    #[arg(long, value_name = "FILE", conflicts_with = "quota_sweep")]
    pub svg: Option<PathBuf>,
}

/// What `--generate` makes up.
#[derive(Args)]
pub struct Shape {
    /// Asked slot-seconds over those there are
    #[arg(long, default_value_t = 1.2, conflicts_with = "trace", value_parser = positive)]
    pub load: f64,
    /// Hours in which requests come
    #[arg(long, default_value_t = 4.0, conflicts_with = "trace", value_parser = positive)]
    pub hours: f64,
    /// Seeds, first and last: 1..5 is five of them
    #[arg(long, default_value = "1..5", conflicts_with = "trace")]
    pub seeds: Seeds,
    /// What functions declare
    #[arg(long, default_value = "as-fitted", conflicts_with = "trace")]
    pub declare: DeclareArgument,
    /// Share of the variance of (logarithmic) durations that lies between functions, not within; an assumption
    #[arg(long, default_value_t = 0.5, conflicts_with = "trace", value_parser = share)]
    pub between_functions: f64,
}

/// What is replayed on.
#[derive(Args)]
pub struct Site {
    /// Nodes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub nodes: u16,
    /// Cards of each node, of two halves
    #[arg(long, default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub cards: u32,
    /// off, tiers (with their longest calls), or slot-seconds a day for every account
    #[arg(long, default_value = "off", conflicts_with = "quota_sweep")]
    pub quota: QuotaArgument,
    /// Refuse what the product's bounds of a queue refuse; without, queues have none
    #[arg(long)]
    pub queue_bounds: bool,
    /// Share of the age lane, percent
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u64).range(1..=99))]
    pub age_lane_percent: u64,
    /// Key of a blocked whole-card request, percent of the first half's, below which the fast lane drains a card
    #[arg(long, default_value_t = 70, value_parser = clap::value_parser!(u64).range(0..=100))]
    pub reserve_percent: u64,
}

/// First and last seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seeds {
    /// First.
    pub first: u64,
    /// Last.
    pub last: u64,
}

/// `--declare`.
#[derive(Clone, Copy, ValueEnum)]
pub enum DeclareArgument {
    /// What the call needs
    Exact,
    /// Too much, as people do
    AsFitted,
    /// Nothing, so that 60 s count
    #[value(name = "60")]
    Default,
}

/// `--quota`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaArgument(pub Quota);

/// Most seeds at once: more add nothing to the figures and take minutes.
const SEEDS_MAX: u64 = 1000;
/// Largest load and longest time: what fits memory.
const POSITIVE_MAX: f64 = 1000.0;

// === impl Site ===

impl Site {
    /// The rules of the replay.
    pub fn rules(&self) -> Rules {
        let Self { nodes, cards, quota, queue_bounds, age_lane_percent, reserve_percent } = self;
        Rules {
            nodes: usize::from(*nodes),
            cards: *cards,
            limits: HoldLimits::PRODUCT,
            quota: quota.0,
            bounds: queue_bounds.then(QueueBounds::default),
            lanes: LaneSettings {
                age_percent: *age_lane_percent,
                reserve_percent: *reserve_percent,
                ..LaneSettings::default()
            },
        }
    }
}

impl From<DeclareArgument> for Declare {
    fn from(argument: DeclareArgument) -> Self {
        match argument {
            DeclareArgument::Exact => Self::Exact,
            DeclareArgument::AsFitted => Self::AsFitted,
            DeclareArgument::Default => Self::Default,
        }
    }
}

impl FromStr for Seeds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (first, last) = text.split_once("..").unwrap_or((text, text));
        let number = |text: &str| text.parse::<u64>().map_err(|_| format!("{text:?} is no number; expected 3 or 1..5"));
        let (first, last) = (number(first)?, number(last)?);
        if last < first || last - first >= SEEDS_MAX {
            return Err(format!("expected first..last, at most {SEEDS_MAX} seeds"));
        }
        Ok(Self { first, last })
    }
}

impl FromStr for QuotaArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self(Quota::Off)),
            "tiers" => Ok(Self(Quota::Tiers)),
            seconds => match seconds.parse::<u32>() {
                Ok(seconds) if seconds > 0 => Ok(Self(Quota::Each(u64::from(seconds) * 1000))),
                _ => Err("expected off, tiers, or slot-seconds a day above 0".to_owned()),
            },
        }
    }
}

fn positive(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    if number > 0.0 && number <= POSITIVE_MAX {
        Ok(number)
    } else {
        Err(format!("expected more than 0 and at most {POSITIVE_MAX}"))
    }
}

fn share(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    if (0.0..1.0).contains(&number) { Ok(number) } else { Err("expected 0 or more, and less than 1".to_owned()) }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn seeds_are_first_and_last() {
        assert_eq!("1..5".parse(), Ok(Seeds { first: 1, last: 5 }));
        assert_eq!("7".parse(), Ok(Seeds { first: 7, last: 7 }));
        for wrong in ["5..1", "a..b", "", "1..", "0..1000"] {
            assert!(wrong.parse::<Seeds>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_would_be_ignored_is_refused() {
        let refused = |line: &[&str]| {
            Arguments::try_parse_from([&["spaceport-replay"], line].concat()).err().map(|error| error.kind())
        };
        use clap::error::ErrorKind;
        assert_eq!(refused(&["--generate", "--quota", "600"]), None);
        assert_eq!(refused(&[]), Some(ErrorKind::MissingRequiredArgument));
        assert_eq!(refused(&["--generate", "--trace", "a.csv"]), Some(ErrorKind::ArgumentConflict));
        assert_eq!(refused(&["--trace", "a.csv", "--load", "2"]), Some(ErrorKind::ArgumentConflict));
        assert_eq!(refused(&["--trace", "a.csv", "--write", "b.csv"]), Some(ErrorKind::ArgumentConflict));
        assert_eq!(refused(&["--generate", "--load", "0"]), Some(ErrorKind::ValueValidation));
        assert_eq!(refused(&["--generate", "--quota", "no"]), Some(ErrorKind::ValueValidation));
    }
}
