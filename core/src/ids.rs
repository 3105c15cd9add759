//! Names and numbers that travel through the whole system, each as a type of its own.

use std::cmp::Ordering;
use std::collections::{HashMap, hash_map};
use std::fmt;
use std::hash::{BuildHasher as _, Hash, Hasher};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use foldhash::fast::FixedState;
use serde::{Deserialize, Serialize};

/// A map that is looked into by name. The hasher has no random seed, so the same history gives the same map; names are made
/// by the cluster, not by strangers who could choose them to collide. Its text is in the order of the names, so that two maps
/// with the same entries have the same text, whatever their histories.
#[derive(Clone, PartialEq, Eq)]
pub struct ByName<K: Eq + Hash, V>(HashMap<K, V, FixedState>);

impl<K: Eq + Hash, V> Default for ByName<K, V> {
    fn default() -> Self {
        Self(HashMap::default())
    }
}

impl<K: Eq + Hash, V> Deref for ByName<K, V> {
    type Target = HashMap<K, V, FixedState>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<K: Eq + Hash, V> DerefMut for ByName<K, V> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl<'a, K: Eq + Hash, V> IntoIterator for &'a ByName<K, V> {
    type Item = (&'a K, &'a V);
    type IntoIter = hash_map::Iter<'a, K, V>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl<K: Eq + Hash + Ord + fmt::Debug, V: fmt::Debug> fmt::Debug for ByName<K, V> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut entries: Vec<(&K, &V)> = self.0.iter().collect();
        entries.sort_by_key(|(name, _)| *name);
        formatter.debug_map().entries(entries).finish()
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        ///
        /// Cheap to clone, and mostly compared without a look at the text: names travel through every command, event and
        /// row.
        #[derive(Clone, Serialize, Deserialize)]
        #[serde(from = "String", into = "String")]
        pub struct $name {
            text: Arc<str>,
            /// Follows from the text.
            hash: u64,
        }

        impl PartialEq for $name {
            fn eq(&self, other: &Self) -> bool {
                self.hash == other.hash && (Arc::ptr_eq(&self.text, &other.text) || self.text == other.text)
            }
        }

        impl Eq for $name {}

        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }

        impl Ord for $name {
            fn cmp(&self, other: &Self) -> Ordering {
                self.text.cmp(&other.text)
            }
        }

        impl Hash for $name {
            fn hash<H: Hasher>(&self, hasher: &mut H) {
                hasher.write_u64(self.hash);
            }
        }

        impl $name {
            /// Takes the name as it stands on the object it comes from.
            pub fn new(name: impl AsRef<str>) -> Self {
                let name = name.as_ref();
                Self { text: Arc::from(name), hash: FixedState::default().hash_one(name) }
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.text
            }
        }

        impl From<String> for $name {
            fn from(name: String) -> Self {
                Self::new(name)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.as_str().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(&self.text)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.debug_tuple(stringify!($name)).field(&&*self.text).finish()
            }
        }
    };
}

name_type! {
    /// Object name of a GPUAccount.
    AccountName
}
name_type! {
    /// Name of a Kubernetes node.
    NodeName
}
name_type! {
    /// A visitor who is not signed in, within an address prefix: the opaque id of a signed cookie (docs/rules.md, Tiers).
    CookieId
}
impl AccountName {
    /// What the names of guest pages begin with (L4).
    pub const GUEST_PREFIX: &str = "guest-";

    /// True for the page of an address prefix, on which cookies are rows (L1).
    pub fn is_guests(&self) -> bool {
        self.as_str().starts_with(Self::GUEST_PREFIX)
    }

    /// The account of a Space's own calls, those without a token (docs/rules.md, tier `space`; the prefix is reserved, L4).
    pub fn of_space(uid: &str) -> Self {
        Self::new(format!("space-{uid}"))
    }
}

name_type! {
    /// A lease: ULID minted by the broker, 26 characters in lower case so that it can end an object name.
    LeaseId
}

/// The broker's term (L6). The fence of invariant 7.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// One HTTP request at one start of one node agent: the idempotency key of a request (L15).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ticket {
    /// Fresh at every start of the agent. Shared, like a name.
    pub agent_instance: Arc<str>,
    /// Counts up within the instance.
    pub number: u64,
}

/// A Space: the object that a pod belongs to. Cheap to clone, like a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SpaceKey(Arc<SpaceNames>);

/// What a Space is called.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SpaceNames {
    /// Namespace of the Space.
    pub namespace: String,
    /// Name of the Space.
    pub name: String,
    /// `metadata.uid`; the audience of its tokens.
    pub uid: String,
}

impl SpaceKey {
    /// Takes the names as they stand on the object.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>, uid: impl Into<String>) -> Self {
        Self(Arc::new(SpaceNames { namespace: namespace.into(), name: name.into(), uid: uid.into() }))
    }
}

impl Deref for SpaceKey {
    type Target = SpaceNames;

    fn deref(&self) -> &SpaceNames {
        &self.0
    }
}

/// Whose calls one worker can serve, one after the other (L16): those of one function in one container. Cheap to clone, like
/// a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkerKey(Arc<WorkerNames>);

/// What a function in a container is called.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerNames {
    /// uid of the pod.
    pub pod_uid: String,
    /// Id of the container; another one after a restart of it.
    pub container: String,
    /// CPython `id()` of the function; another one after a restart of the app.
    pub task: u64,
}

impl WorkerKey {
    /// Longest uid of a pod or id of a container, bytes: both are below 100.
    const NAME_MAX: usize = 128;

    /// None where a name is empty or too long: such a function has no workers.
    pub fn new(pod_uid: impl Into<String>, container: impl Into<String>, task: u64) -> Option<Self> {
        let (pod_uid, container) = (pod_uid.into(), container.into());
        let is_name = |name: &String| (1..=Self::NAME_MAX).contains(&name.len());
        let names = is_name(&pod_uid) && is_name(&container);
        names.then(|| Self(Arc::new(WorkerNames { pod_uid, container, task })))
    }
}

impl Deref for WorkerKey {
    type Target = WorkerNames;

    fn deref(&self) -> &WorkerNames {
        &self.0
    }
}

/// Which version of its app a pod runs, as the Space controller wrote it on the pod: one that is made anew of the same
/// version has the same. 0 where it is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl Revision {
    /// Of its text, 16 hexadecimal digits; anything else is a revision that is not known.
    pub fn of(text: &str) -> Self {
        let is_whole = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        Self(u64::from_str_radix(text, 16).ok().filter(|_| is_whole).unwrap_or_default())
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:016x}", self.0)
    }
}

/// Size of a lease (docs/rules.md). The weight is what a second of it costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Size {
    /// Half a card, weight 1.
    Large,
    /// A whole card, weight 2.
    Xlarge,
}

impl Size {
    /// Charged seconds per second of use.
    pub const fn weight(self) -> u64 {
        match self {
            Self::Large => 1,
            Self::Xlarge => 2,
        }
    }

    /// The name that apps and people use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Large => "large",
            Self::Xlarge => "xlarge",
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// Ledger time: milliseconds since the Unix epoch, never going back on one page (L20).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LedgerTime(pub i64);

impl LedgerTime {
    /// This time plus `milliseconds`; stays at the largest time instead of overflowing.
    #[must_use]
    pub const fn plus(self, milliseconds: u64) -> Self {
        Self(self.0.saturating_add_unsigned(milliseconds))
    }

    /// Milliseconds from `earlier` to this time; 0 if it is not earlier.
    pub const fn since(self, earlier: Self) -> u64 {
        let difference = self.0.saturating_sub(earlier.0);
        if difference > 0 { difference.unsigned_abs() } else { 0 }
    }
}

/// Milliseconds on the leader's monotonic clock since its term began. Intervals are measured with it, so that a stepped
/// wall clock neither ends a lease early nor keeps one (L9, L20).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Steady(pub u64);

impl Steady {
    /// This time plus `milliseconds`; stays at the largest time instead of overflowing.
    #[must_use]
    pub const fn plus(self, milliseconds: u64) -> Self {
        Self(self.0.saturating_add(milliseconds))
    }

    /// Milliseconds from `earlier` to this time; 0 if it is not earlier.
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Where fresh ids come from: a ULID that the shell draws for each command. The ids that one command needs are its
/// successors, as ULIDs drawn in the same millisecond are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdSeed(pub u128);

impl IdSeed {
    /// The next id; the seed moves on.
    pub fn draw(&mut self) -> String {
        let text = ulid_text(self.0);
        self.0 = self.0.wrapping_add(1);
        text
    }
}

/// The 26 characters of a ULID, in lower case (Crockford's base 32, most significant first).
pub fn ulid_text(ulid: u128) -> String {
    const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
    const CHARACTERS: usize = 26;
    let mut text = [0; CHARACTERS];
    let mut rest = ulid;
    for character in text.iter_mut().rev() {
        // Five bits a character; the first has only three left.
        *character = ALPHABET[usize::from(rest as u8 & 0x1f)];
        rest >>= 5;
    }
    text.iter().copied().map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ulids_are_written_as_the_standard_says() {
        assert_eq!(ulid_text(0), "00000000000000000000000000");
        assert_eq!(ulid_text(u128::MAX), "7zzzzzzzzzzzzzzzzzzzzzzzzz");
        // The example of the ULID specification.
        assert_eq!(ulid_text(0x0156_3e3a_b5d3_d676_4c61_efb9_9302_bd5b), "01arz3ndektsv4rrffq69g5fav");
    }

    #[test]
    fn a_revision_is_its_text_or_not_known() {
        let revision = Revision::of("00c4f2a19b7e55d3");
        assert_eq!((revision.0, revision.to_string().as_str()), (0x00c4_f2a1_9b7e_55d3, "00c4f2a19b7e55d3"));
        for text in ["", "c4f2", "+0c4f2a19b7e55d3", "00c4f2a19b7e55d3a", "zzzzzzzzzzzzzzzz"] {
            assert_eq!(Revision::of(text), Revision::default(), "{text}");
        }
    }

    #[test]
    fn a_function_without_a_pod_or_a_container_has_no_workers() {
        let key = WorkerKey::new("pod", "container", 7).expect("it has both");
        assert_eq!((key.pod_uid.as_str(), key.container.as_str(), key.task), ("pod", "container", 7));
        let long = "x".repeat(WorkerKey::NAME_MAX + 1);
        for (pod_uid, container) in [("", "c"), ("p", ""), (long.as_str(), "c"), ("p", long.as_str())] {
            assert_eq!(WorkerKey::new(pod_uid, container, 7), None, "{pod_uid:?} {container:?}");
        }
    }

    #[test]
    fn drawn_ids_differ_and_ascend() {
        let mut seed = IdSeed(31);
        let (first, second) = (seed.draw(), seed.draw());
        assert!(first < second);
    }
}
