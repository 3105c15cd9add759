//! The demonstration that `cargo xtask demo` ends with. The cluster and the charts are up when it runs.

use spaceport_e2e::{World, demo};

fn main() -> anyhow::Result<()> {
    demo::run(&World::connect()?, "bob", &mut |line| println!("{line}"))
}
