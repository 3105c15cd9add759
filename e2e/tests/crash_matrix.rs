//! The crash matrix: somebody is killed at each place of a lease's path.
#![cfg(feature = "cluster")]
#![allow(clippy::unwrap_used)] // A test fails by panicking.

use spaceport_e2e::{World, crash_matrix};

#[test]
fn everyone_may_die_everywhere() {
    let world = World::connect().unwrap();
    world.apply_examples().unwrap();
    world.story_space().unwrap();
    crash_matrix::tell(&world).unwrap();
}

#[test]
fn what_is_wrong_in_a_crash_is_seen() {
    let world = World::connect().unwrap();
    world.apply_examples().unwrap();
    world.story_space().unwrap();
    crash_matrix::tell_broken(&world).unwrap();
}
