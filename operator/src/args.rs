//! Settings. Every flag has an environment twin, so that a chart can set either; nothing else reads the environment
//! (`kube` itself looks at KUBECONFIG and at the service-account files of its pod).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ArgGroup, Parser};
use spaceport_shell::admin::AdminArgs;
use spaceport_shell::log::LogArgs;

use crate::space::SpaceArgs;

/// Controllers and the lease broker of Spaceport.
#[derive(Debug, Parser)]
#[command(name = "spaceport-operator", version, about)]
pub struct Args {
    /// Where it runs.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Logs.
    #[command(flatten)]
    pub log: LogArgs,
    /// Who leads.
    #[command(flatten)]
    pub leader: LeaderArgs,
    /// Pages and receipts.
    #[command(flatten)]
    pub ledger: LedgerArgs,
    /// The link to node agents.
    #[command(flatten)]
    pub node_link: NodeLinkArgs,
    /// What Space pods are made of.
    #[command(flatten)]
    pub space: SpaceArgs,
    /// The admin endpoint.
    #[command(flatten)]
    pub admin: AdminArgs,
    /// Breaks this on purpose; only builds for tests know it.
    #[cfg(feature = "faults")]
    #[arg(long, env = "SPACEPORT_FAULT", value_enum)]
    pub fault: Option<crate::fault::Fault>,
}

/// Where the operator runs and which cluster it works on.
#[derive(Debug, ArgGroup)]
pub struct PlaceArgs {
    /// Kubeconfig file; without it, KUBECONFIG or the pod's own service account.
    #[arg(long, env = "SPACEPORT_KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of the operator: its Lease, Secrets and ConfigMaps live there.
    #[arg(long, env = "POD_NAMESPACE", default_value = "spaceport-system")]
    pub namespace: String,
    /// Name of this replica, unique among replicas; the chart passes the pod's name.
    #[arg(long, env = "POD_NAME", default_value = "spaceport-operator")]
    pub replica: String,
}

/// Leader election by a coordination.k8s.io Lease. Safety never rests on it: the epoch fences (invariant 7).
#[derive(Debug, ArgGroup)]
pub struct LeaderArgs {
    /// Name of the Lease object.
    #[arg(long, env = "SPACEPORT_LEASE_NAME", default_value = "spaceport-operator")]
    pub lease_name: String,
    /// How long a silent leader keeps the lease. The Lease object stores whole seconds, rounded up. Two seconds, so that a
    /// standby grants within five of its leader's end; whoever leads wrongly is fenced by the epoch (invariant 7).
    #[arg(long, env = "SPACEPORT_LEASE_DURATION", default_value = "2s", value_parser = duration)]
    pub lease_duration: Duration,
    /// A leader that could not renew for this long stands by; below the lease duration, so that it stops before another
    /// starts.
    #[arg(long, env = "SPACEPORT_RENEW_DEADLINE", default_value = "1500ms", value_parser = duration)]
    pub renew_deadline: Duration,
    /// Time between tries to renew or to take the lease.
    #[arg(long, env = "SPACEPORT_RETRY_PERIOD", default_value = "300ms", value_parser = duration)]
    pub retry_period: Duration,
}

/// Pages and receipts.
#[derive(Debug, ArgGroup)]
pub struct LedgerArgs {
    /// After this long without an answer the outcome of a page write is unknown (L2). Five seconds let etcd elect a new
    /// leader and answer; a visitor waits meanwhile.
    #[arg(long, env = "SPACEPORT_PAGE_WRITE_TIMEOUT", default_value = "5s", value_parser = duration)]
    pub page_write_timeout: Duration,
    /// A clock further off than this from the API server's grants nothing (L20).
    #[arg(long, env = "SPACEPORT_CLOCK_SKEW_MAX", default_value = "5s", value_parser = duration)]
    pub clock_skew_max: Duration,
    /// Issuer of the tokens that name a caller (docs/rules.md).
    #[arg(long, env = "SPACEPORT_TOKEN_ISSUER", default_value = "spaceport-gateway")]
    pub token_issuer: String,
}

/// The link to node agents.
#[derive(Debug, ArgGroup)]
pub struct NodeLinkArgs {
    /// Address of the gRPC endpoint for node agents.
    #[arg(long, env = "SPACEPORT_NODELINK_LISTEN", default_value = "0.0.0.0:7443")]
    pub nodelink_listen: SocketAddr,
    /// Service account of the agents, as `namespace:name`; tokens of any other are refused.
    #[arg(long, env = "SPACEPORT_AGENT_SERVICE_ACCOUNT", default_value = "spaceport-system:spaceport-device-plugin")]
    pub agent_service_account: ServiceAccountName,
    /// Further DNS names for the certificate that the operator makes, besides `spaceport-operator` and its Service names.
    #[arg(long, env = "SPACEPORT_NODELINK_DNS_NAMES", value_delimiter = ',')]
    pub nodelink_dns_names: Vec<String>,
}

/// A service account as `namespace:name`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccountName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl ServiceAccountName {
    /// The user name that a TokenReview answers for its tokens.
    pub fn user_name(&self) -> String {
        format!("system:serviceaccount:{}:{}", self.namespace, self.name)
    }
}

impl std::str::FromStr for ServiceAccountName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains(':') => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err(format!("{text:?} is not of the form namespace:name")),
        }
    }
}

/// Parses `300ms`, `15s`, `2m` or `168h`. One unit, so that a value has one spelling.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| format!("{text:?} does not begin with a number"))?;
    let milliseconds = match unit {
        "ms" => Some(number),
        "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        _ => return Err(format!("{text:?} has no unit of ms, s, m or h")),
    };
    milliseconds.map(Duration::from_millis).ok_or_else(|| format!("{text:?} is too long"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn durations_have_one_unit() {
        assert_eq!(duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(duration("15s"), Ok(Duration::from_secs(15)));
        assert_eq!(duration("168h"), Ok(Duration::from_secs(168 * 3600)));
        for bad in ["", "15", "s", "-1s", "1.5s", "1s5ms", "99999999999999999999h", "18446744073709551615h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn service_accounts_name_their_namespace() {
        let account: ServiceAccountName = "a:b".parse().unwrap();
        assert_eq!(account.user_name(), "system:serviceaccount:a:b");
        for bad in ["", "a", ":b", "a:", "a:b:c"] {
            assert!(bad.parse::<ServiceAccountName>().is_err(), "{bad}");
        }
    }
}
