//! The `spaceport-operator` binary; everything is in the library.

use clap::Parser as _;

fn main() -> anyhow::Result<()> {
    spaceport_operator::runtime::run(spaceport_operator::args::Args::parse())
}
