//! An ordered set that also knows how many members, and how much of their amounts, come before any of them.
//!
//! A treap: a search tree by key that is a heap by priority. Priorities are drawn from the keys, so the shape depends on
//! the members alone, and every operation takes O(log n) steps on average whatever the order in which they come.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher as _};

/// No node.
const NIL: usize = usize::MAX;

/// Members with amounts, in the order of their keys.
#[derive(Clone)]
pub struct Ranked<K> {
    nodes: Vec<Node<K>>,
    /// Places in `nodes` that can be used again.
    vacant: Vec<usize>,
    root: usize,
}

#[derive(Clone, Debug)]
struct Node<K> {
    key: K,
    amount: u64,
    priority: u64,
    left: usize,
    right: usize,
    /// Of the tree below, this one included.
    count: u64,
    /// Of the tree below, this one included.
    sum: u64,
}

/// What comes before a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ahead {
    /// Members.
    pub count: u64,
    /// Their amounts together.
    pub sum: u64,
}

/// Members in order.
#[derive(Debug)]
pub struct Iter<'a, K> {
    ranked: &'a Ranked<K>,
    /// Nodes whose left side is done; the next one is on top. Never longer than the tree is high.
    open: Vec<usize>,
}

// === impl Ranked ===

impl<K> Default for Ranked<K> {
    fn default() -> Self {
        Self { nodes: Vec::new(), vacant: Vec::new(), root: NIL }
    }
}

impl<K: Ord + Copy + Hash> Ranked<K> {
    /// Takes a member in. One with this key is replaced.
    pub fn insert(&mut self, key: K, amount: u64) {
        self.remove(&key);
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        let node = Node { key, amount, priority: hasher.finish(), left: NIL, right: NIL, count: 1, sum: amount };
        let new = match self.vacant.pop() {
            Some(index) => {
                self.nodes[index] = node;
                index
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() - 1
            }
        };
        let (before, after) = self.split(self.root, &key);
        let before = self.merge(before, new);
        self.root = self.merge(before, after);
    }

    /// Takes a member out; its amount, if it was there.
    pub fn remove(&mut self, key: &K) -> Option<u64> {
        // Looked for first: most keys that are inserted are new, and looking costs less than splitting.
        self.contains(key).then(|| {
            let (root, removed) = self.without(self.root, key);
            self.root = root;
            self.vacant.push(removed);
            self.nodes[removed].amount
        })
    }

    /// True if it is a member.
    pub fn contains(&self, key: &K) -> bool {
        let mut at = self.root;
        while at != NIL {
            match key.cmp(&self.nodes[at].key) {
                Ordering::Less => at = self.nodes[at].left,
                Ordering::Greater => at = self.nodes[at].right,
                Ordering::Equal => return true,
            }
        }
        false
    }

    /// What comes before this key, member or not.
    pub fn ahead(&self, key: &K) -> Ahead {
        let mut ahead = Ahead::default();
        let mut at = self.root;
        while at != NIL {
            let node = &self.nodes[at];
            if *key <= node.key {
                at = node.left;
            } else {
                ahead.count += 1 + self.count(node.left);
                ahead.sum = ahead.sum.saturating_add(node.amount).saturating_add(self.sum(node.left));
                at = node.right;
            }
        }
        ahead
    }

    /// The first member.
    pub fn first(&self) -> Option<K> {
        let mut at = self.root;
        let mut first = None;
        while at != NIL {
            first = Some(self.nodes[at].key);
            at = self.nodes[at].left;
        }
        first
    }

    /// All members, in order.
    pub fn iter(&self) -> Iter<'_, K> {
        let mut iter = Iter { ranked: self, open: Vec::new() };
        iter.descend(self.root);
        iter
    }

    /// How many members there are.
    pub fn len(&self) -> u64 {
        self.count(self.root)
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.root == NIL
    }

    /// All amounts together.
    pub fn total(&self) -> u64 {
        self.sum(self.root)
    }

    fn count(&self, node: usize) -> u64 {
        self.nodes.get(node).map_or(0, |node| node.count)
    }

    fn sum(&self, node: usize) -> u64 {
        self.nodes.get(node).map_or(0, |node| node.sum)
    }

    fn update(&mut self, index: usize) {
        let (left, right) = (self.nodes[index].left, self.nodes[index].right);
        let count = 1 + self.count(left) + self.count(right);
        let sum = self.nodes[index].amount.saturating_add(self.sum(left)).saturating_add(self.sum(right));
        (self.nodes[index].count, self.nodes[index].sum) = (count, sum);
    }

    /// Two trees: what comes before the key, and the rest.
    fn split(&mut self, at: usize, key: &K) -> (usize, usize) {
        if at == NIL {
            return (NIL, NIL);
        }
        if self.nodes[at].key < *key {
            let (middle, after) = self.split(self.nodes[at].right, key);
            self.nodes[at].right = middle;
            self.update(at);
            (at, after)
        } else {
            let (before, middle) = self.split(self.nodes[at].left, key);
            self.nodes[at].left = middle;
            self.update(at);
            (before, at)
        }
    }

    /// One tree of two, all of the first before all of the second.
    fn merge(&mut self, before: usize, after: usize) -> usize {
        if before == NIL || after == NIL {
            return if before == NIL { after } else { before };
        }
        if self.nodes[before].priority > self.nodes[after].priority {
            self.nodes[before].right = self.merge(self.nodes[before].right, after);
            self.update(before);
            before
        } else {
            self.nodes[after].left = self.merge(before, self.nodes[after].left);
            self.update(after);
            after
        }
    }

    /// The tree without a member, which is in it, and where that one was.
    fn without(&mut self, at: usize, key: &K) -> (usize, usize) {
        let (left, right) = (self.nodes[at].left, self.nodes[at].right);
        let removed = match key.cmp(&self.nodes[at].key) {
            Ordering::Equal => return (self.merge(left, right), at),
            Ordering::Less => {
                let (left, removed) = self.without(left, key);
                self.nodes[at].left = left;
                removed
            }
            Ordering::Greater => {
                let (right, removed) = self.without(right, key);
                self.nodes[at].right = right;
                removed
            }
        };
        self.update(at);
        (at, removed)
    }
}

/// The same members with the same amounts; where they lie does not matter.
impl<K: Ord + Copy + Hash> PartialEq for Ranked<K> {
    fn eq(&self, other: &Self) -> bool {
        let amounts = |ranked: &Self, key: &K| {
            let before = ranked.ahead(key).sum;
            (*key, before)
        };
        self.len() == other.len()
            && self.total() == other.total()
            && self.iter().zip(other.iter()).all(|(one, two)| amounts(self, &one) == amounts(other, &two))
    }
}

impl<K: Ord + Copy + Hash> Eq for Ranked<K> {}

/// Its members, in order.
impl<K: fmt::Debug> fmt::Debug for Ranked<K> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut iter = Iter { ranked: self, open: Vec::new() };
        iter.descend(self.root);
        let members = std::iter::from_fn(|| {
            let at = iter.open.pop()?;
            let node = &self.nodes[at];
            iter.descend(node.right);
            Some((&node.key, node.amount))
        });
        formatter.debug_map().entries(members).finish()
    }
}

// === impl Iter ===

impl<K> Iter<'_, K> {
    fn descend(&mut self, from: usize) {
        let mut at = from;
        while at != NIL {
            self.open.push(at);
            at = self.ranked.nodes[at].left;
        }
    }
}

impl<K: Copy> Iterator for Iter<'_, K> {
    type Item = K;

    fn next(&mut self) -> Option<K> {
        let at = self.open.pop()?;
        self.descend(self.ranked.nodes[at].right);
        Some(self.ranked.nodes[at].key)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_counts_like_a_sorted_list(script in prop::collection::vec((any::<bool>(), 0_u16..64, 0_u64..1000), 0..300)) {
            let (mut ranked, mut model) = (Ranked::default(), BTreeMap::new());
            for (insert, key, amount) in script {
                if insert {
                    ranked.insert(key, amount);
                    model.insert(key, amount);
                } else {
                    prop_assert_eq!(ranked.remove(&key), model.remove(&key));
                }
                prop_assert_eq!(ranked.first(), model.keys().next().copied());
            }
            prop_assert_eq!(ranked.iter().collect::<Vec<_>>(), model.keys().copied().collect::<Vec<_>>());
            prop_assert_eq!((ranked.len(), ranked.total()), (model.len() as u64, model.values().sum::<u64>()));
            for key in 0..65_u16 {
                let before = model.range(..key);
                let ahead = Ahead { count: before.clone().count() as u64, sum: before.map(|(_, amount)| amount).sum() };
                prop_assert_eq!(ranked.ahead(&key), ahead);
            }
        }
    }

    #[test]
    fn the_same_members_are_equal_whatever_their_history() {
        let (mut one, mut other) = (Ranked::default(), Ranked::default());
        for key in 0..20_u32 {
            one.insert(key, u64::from(key));
        }
        for key in (0..40).rev() {
            other.insert(key, u64::from(key));
        }
        assert_ne!(one, other);
        for key in 20..40 {
            other.remove(&key);
        }
        assert_eq!(one, other);
        other.insert(3, 4);
        assert_ne!(one, other);
    }
}
