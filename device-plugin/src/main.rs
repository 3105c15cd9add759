//! The `spaceport-device-plugin` binary; everything is in the library.

use clap::Parser as _;

fn main() -> anyhow::Result<()> {
    spaceport_device_plugin::runtime::run(spaceport_device_plugin::args::Args::parse())
}
