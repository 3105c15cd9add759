//! Waiting requests by key, halves and whole cards apart: a policy asks for the first of each, and for the first half
//! that would end in time.

use std::collections::BTreeSet;

use spaceport_core::ids::Size;

/// A place: the key, then who came first.
pub type Place<K> = (K, usize);

/// An ordered queue.
#[derive(Clone, Debug)]
pub struct Line<K> {
    halves: BTreeSet<Place<K>>,
    wholes: BTreeSet<Place<K>>,
}

impl<K: Ord + Copy> Line<K> {
    /// An empty one.
    pub const fn new() -> Self {
        Self { halves: BTreeSet::new(), wholes: BTreeSet::new() }
    }

    /// Takes a request in.
    pub fn insert(&mut self, size: Size, key: K, id: usize) {
        self.of_mut(size).insert((key, id));
    }

    /// Takes one out.
    pub fn remove(&mut self, size: Size, key: K, id: usize) -> bool {
        self.of_mut(size).remove(&(key, id))
    }

    /// The first of a size.
    pub fn first(&self, size: Size) -> Option<Place<K>> {
        self.of(size).first().copied()
    }

    /// The first of all.
    pub fn head(&self) -> Option<(Size, Place<K>)> {
        let first = |size| self.first(size).map(|place| (size, place));
        match (first(Size::Large), first(Size::Xlarge)) {
            (Some(half), Some(whole)) => Some(if half.1 < whole.1 { half } else { whole }),
            (half, whole) => half.or(whole),
        }
    }

    /// Halves in order.
    pub fn halves(&self) -> impl Iterator<Item = &Place<K>> {
        self.halves.iter()
    }

    const fn of(&self, size: Size) -> &BTreeSet<Place<K>> {
        match size {
            Size::Large => &self.halves,
            Size::Xlarge => &self.wholes,
        }
    }

    const fn of_mut(&mut self, size: Size) -> &mut BTreeSet<Place<K>> {
        match size {
            Size::Large => &mut self.halves,
            Size::Xlarge => &mut self.wholes,
        }
    }
}
