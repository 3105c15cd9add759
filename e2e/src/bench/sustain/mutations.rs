//! How many mutating calls the API server answered, by its own count.
//!
//! `apiserver_request_total` counts every request, also those that were refused or met a conflict, and knows nothing of
//! ours: no change of operator or agent can hide a call from it. It does not say who called, so all calls are counted of
//! the kinds that operator and agent may write (their roles in the chart; a test compares); whatever else writes those
//! kinds, as kubelet its own Lease, counts against us.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Result, ensure};

use crate::breakable::SYSTEM;
use crate::kubectl::at;
use crate::world::World;

/// The API server's counter.
const REQUESTS: &str = "apiserver_request_total";
/// The operator's own counter, where it has one.
const OWN_REQUESTS: &str = "spaceport_api_mutations_total";
/// The operator's number of leases whose receipt is not written.
const PENDING: &str = "spaceport_receipts_pending";
/// 1 while the operator writes receipts at their end only.
const PRESSURE: &str = "spaceport_write_pressure";
/// As the API server names them; an apply is a PATCH on the wire.
const VERBS: [&str; 6] = ["POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION"];
/// All kinds of this group are ours.
const GROUP: &str = spaceport_crds::names::GROUP;
/// What operator and agent may write beside them: group, resource.
const RESOURCES: [(&str, &str); 9] = [
    ("", "configmaps"),
    ("", "events"),
    ("", "secrets"),
    ("", "services"),
    ("apps", "deployments"),
    ("authentication.k8s.io", "tokenreviews"),
    ("coordination.k8s.io", "leases"),
    ("events.k8s.io", "events"),
    ("networking.k8s.io", "networkpolicies"),
];

/// One kind of call: `PUT gpuaccounts/status`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Call {
    verb: String,
    resource: String,
}

/// Calls by kind, since the API server started or since an earlier count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::bench) struct Mutations(BTreeMap<Call, u64>);

impl Mutations {
    /// Asks the API server.
    pub(super) fn read(world: &World) -> Result<Self> {
        let text = world.kubectl.run(&["get", "--raw", "/metrics"])?;
        let counted = Self::parse(&text);
        ensure!(!counted.0.is_empty(), "the API server's /metrics count no write of ours in {REQUESTS}");
        Ok(counted)
    }

    fn parse(text: &str) -> Self {
        let mut counted = Self::default();
        for (labels, value) in series(text, REQUESTS) {
            let label = |name: &str| labels.get(name).copied().unwrap_or_default();
            let (verb, group, resource) = (label("verb"), label("group"), label("resource"));
            if VERBS.contains(&verb) && (group == GROUP || RESOURCES.contains(&(group, resource))) {
                let resource = match label("subresource") {
                    "" => resource.to_owned(),
                    subresource => format!("{resource}/{subresource}"),
                };
                *counted.0.entry(Call { verb: verb.to_owned(), resource }).or_default() += value;
            }
        }
        counted
    }

    /// What was called since `before`.
    pub(super) fn since(&self, before: &Self) -> Result<Self> {
        let mut more = Self::default();
        for (call, count) in &self.0 {
            let old = before.0.get(call).copied().unwrap_or_default();
            ensure!(*count >= old, "{call} fell from {old} to {count}: the API server was started anew meanwhile");
            if *count > old {
                more.0.insert(call.clone(), count - old);
            }
        }
        Ok(more)
    }

    /// Without calls of this kind that the benchmark itself made.
    pub(super) fn without(mut self, verb: &str, resource: &str, own: u64) -> Result<Self> {
        let call = Call { verb: verb.to_owned(), resource: resource.to_owned() };
        let counted = self.0.entry(call).or_default();
        ensure!(*counted >= own, "the API server counts {counted} {verb} of {resource}, we alone made {own}");
        *counted -= own;
        Ok(self)
    }

    /// Calls of this verb on this resource.
    #[cfg(test)]
    pub(super) fn of(&self, verb: &str, resource: &str) -> u64 {
        let call = Call { verb: verb.to_owned(), resource: resource.to_owned() };
        self.0.get(&call).copied().unwrap_or_default()
    }

    /// All of them.
    pub(super) fn total(&self) -> u64 {
        self.0.values().sum()
    }

    /// Writes of pages, accounts and receipts: what goes on while a ledger is at work and stops when it has nothing to do.
    pub(super) fn of_the_ledger(&self) -> u64 {
        let is_ledger =
            |call: &Call| call.resource.starts_with("gpuaccounts") || call.resource.starts_with("gpuleases");
        self.0.iter().filter(|(call, _)| is_ledger(call)).map(|(_, count)| count).sum()
    }

    /// `PUT gpuaccounts/status 2.012, …` for each of so many leases, the most frequent first.
    pub(super) fn each_of(&self, leases: u64) -> String {
        let mut calls: Vec<(&Call, u64)> = self.0.iter().map(|(call, count)| (call, *count)).collect();
        calls.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let told = |(call, count): (&Call, u64)| format!("{call} {:.3}", count as f64 / leases.max(1) as f64);
        calls.into_iter().filter(|(_, count)| *count > 0).map(told).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for Call {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.verb, self.resource)
    }
}

/// What the operator's replicas say of themselves, all together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct OwnCount {
    /// Its own count of mutating calls by verb and resource; empty if it has none.
    mutations: Mutations,
    /// Receipts that it has still to write.
    pub(super) receipts_pending: u64,
    /// Replicas whose receipts give way at the moment.
    pub(super) under_pressure: u64,
}

impl OwnCount {
    /// Asks each replica, through the API server.
    pub(super) fn read(world: &World) -> Result<Self> {
        let selector = ["--selector", "app.kubernetes.io/name=spaceport-operator"];
        let pods = world.kubectl.items(&[&["--namespace", SYSTEM, "get", "pods"], &selector[..]].concat())?;
        let mut own = Self::default();
        for pod in &pods {
            let name = at(pod, "/metadata/name").as_str().unwrap_or_default();
            let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{name}:8080/proxy/metrics");
            own.add(&world.kubectl.run(&["get", "--raw", &path])?);
        }
        Ok(own)
    }

    fn add(&mut self, text: &str) {
        for (labels, value) in series(text, OWN_REQUESTS) {
            let label = |name: &str| labels.get(name).copied().unwrap_or_default().to_owned();
            *self.mutations.0.entry(Call { verb: label("verb"), resource: label("resource") }).or_default() += value;
        }
        self.receipts_pending += series(text, PENDING).map(|(_, value)| value).sum::<u64>();
        self.under_pressure += series(text, PRESSURE).map(|(_, value)| value).sum::<u64>();
    }

    /// Its own count since `before`, for each of so many leases; none if it does not count.
    pub(super) fn each_of(&self, before: &Self, leases: u64) -> Result<Option<String>> {
        if self.mutations.0.is_empty() {
            return Ok(None);
        }
        let since = self.mutations.since(&before.mutations)?;
        let all = since.total() as f64 / leases.max(1) as f64;
        Ok(Some(format!("{all:.3}: {}", since.each_of(leases))))
    }
}

/// The value of a metric without labels.
pub(in crate::bench) fn gauge(text: &str, name: &str) -> Option<u64> {
    series(text, name).map(|(_, value)| value).next()
}

/// Labels and values of one metric in Prometheus' text. Labels that hold quotes or commas are not ours.
fn series<'a>(text: &'a str, name: &'a str) -> impl Iterator<Item = (BTreeMap<&'a str, &'a str>, u64)> {
    text.lines().filter_map(move |line| {
        let rest = line.strip_prefix(name)?;
        let (labels, value) = match rest.strip_prefix('{') {
            Some(labelled) => labelled.split_once('}')?,
            None => ("", rest),
        };
        // Another metric whose name only begins alike has no blank here.
        let value: f64 = value.strip_prefix(' ')?.split(' ').next()?.parse().ok()?;
        let label = |pair: &'a str| {
            let (name, value) = pair.split_once('=')?;
            Some((name, value.trim_matches('"')))
        };
        // Counts are whole, and far below what an f64 holds exactly.
        Some((labels.split(',').filter_map(label).collect(), value as u64))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const BEFORE: &str = r#"
# TYPE apiserver_request_total counter
apiserver_request_total{code="200",component="apiserver",dry_run="",group="spaceport.dev",resource="gpuaccounts",scope="resource",subresource="status",verb="PUT",version="v1alpha1"} 1.2e+03
apiserver_request_total{code="409",component="apiserver",dry_run="",group="spaceport.dev",resource="gpuaccounts",scope="resource",subresource="status",verb="PUT",version="v1alpha1"} 7
apiserver_request_total{code="200",component="apiserver",dry_run="",group="spaceport.dev",resource="gpuaccounts",scope="cluster",subresource="",verb="LIST",version="v1alpha1"} 90
apiserver_request_total{code="200",component="apiserver",dry_run="",group="",resource="pods",scope="resource",subresource="status",verb="PATCH",version="v1"} 50
apiserver_request_total_of_another 3
"#;

    #[test]
    fn only_mutating_calls_of_our_kinds_count_whatever_their_answer() {
        let before = Mutations::parse(BEFORE);
        assert_eq!((before.total(), before.of("PUT", "gpuaccounts/status")), (1207, 1207));
        let after = format!(
            "{}{}",
            BEFORE.replace(" 1.2e+03", " 1400").replace(" 90", " 95"),
            r#"apiserver_request_total{code="201",group="spaceport.dev",resource="gpuleases",subresource="",verb="POST"} 100
apiserver_request_total{code="200",group="spaceport.dev",resource="gpunodes",subresource="status",verb="APPLY"} 10
apiserver_request_total{code="200",group="coordination.k8s.io",resource="leases",subresource="",verb="PUT"} 5
apiserver_request_total{code="200",group="events.k8s.io",resource="events",subresource="",verb="POST"} 1
"#
        );
        let more = Mutations::parse(&after).since(&before).unwrap();
        assert_eq!(more.total(), 200 + 100 + 10 + 5 + 1);
        assert_eq!(more.of_the_ledger(), 300);
        let theirs = more.clone().without("PUT", "gpuaccounts/status", 150).unwrap();
        assert_eq!((theirs.total(), theirs.of("PUT", "gpuaccounts/status")), (166, 50));
        let told = theirs.each_of(100);
        assert!(told.starts_with("POST gpuleases 1.000, PUT gpuaccounts/status 0.500, "), "{told}");
        assert!(more.without("PUT", "gpuaccounts/status", 201).is_err());
    }

    #[test]
    fn an_api_server_that_was_started_anew_is_noticed() {
        let (before, after) = (Mutations::parse(BEFORE), Mutations::parse(&BEFORE.replace("1.2e+03", "12")));
        assert!(after.since(&before).unwrap_err().to_string().contains("fell from 1207 to 19"));
    }

    #[test]
    fn the_operators_own_count_is_told_where_there_is_one() {
        let text = |receipts| format!("spaceport_receipts_pending {receipts}\nspaceport_write_pressure 1\n");
        let count =
            |number| format!("spaceport_api_mutations_total{{verb=\"create\",resource=\"gpuleases\"}} {number}\n");
        let (mut before, mut after) = (OwnCount::default(), OwnCount::default());
        before.add(&text(0));
        after.add(&text(3));
        assert_eq!(after.under_pressure, 1);
        assert_eq!((after.receipts_pending, after.each_of(&before, 10).unwrap()), (3, None));
        before.add(&count(5));
        // Two replicas.
        after.add(&count(15));
        after.add(&count(10));
        assert_eq!(after.each_of(&before, 10).unwrap().unwrap(), "2.000: create gpuleases 2.000");
    }

    /// Whatever the roles in the chart let operator and agent write is counted.
    #[test]
    fn every_kind_that_the_charts_roles_let_us_write_is_counted() {
        let mut written = BTreeSet::new();
        let roles = [
            include_str!("../../../../charts/spaceport/templates/operator-rbac.yaml"),
            include_str!("../../../../charts/spaceport/templates/device-plugin-rbac.yaml"),
        ];
        for role in roles {
            let (mut groups, mut resources) = (Vec::new(), Vec::new());
            for line in role.lines() {
                let line = line.trim().trim_start_matches("- ");
                let list = |text: &str| -> Vec<String> {
                    let words = text.trim().trim_matches(['[', ']']).split(',');
                    words.map(|word| word.trim().trim_matches('"').to_owned()).collect()
                };
                if let Some(text) = line.strip_prefix("apiGroups:") {
                    groups = list(text);
                } else if let Some(text) = line.strip_prefix("resources:") {
                    resources = list(text);
                } else if let Some(text) = line.strip_prefix("verbs:")
                    && list(text).iter().any(|verb| !["get", "list", "watch"].contains(&verb.as_str()))
                {
                    let kinds = groups.iter().flat_map(|group| resources.iter().map(move |kind| (group, kind)));
                    written.extend(kinds.map(|(group, kind)| (group.clone(), kind.clone())));
                }
            }
        }
        assert!(written.len() > 10, "the roles were not read: {written:?}");
        for (group, kind) in &written {
            let resource = kind.split('/').next().unwrap();
            let counted = group == GROUP || RESOURCES.contains(&(group.as_str(), resource));
            assert!(counted, "{group}/{kind} may be written and is not counted");
        }
    }
}
