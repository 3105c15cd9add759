//! Makes operator or agent stand still at a named place, in builds for tests (`operator/src/fault.rs`,
//! `device-plugin/src/fault.rs`), through their admin endpoint.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::admin::Admin;
use crate::breakable::Part;
use crate::wait::eventually;
use crate::world::World;

/// A lease reaches any place within a second or two; a slow machine needs more.
const REACH_LIMIT: Duration = Duration::from_secs(40);

/// A process that was told where to stand still.
#[derive(Debug)]
pub(crate) struct Failpoint {
    admin: Admin,
    place: &'static str,
}

impl Failpoint {
    /// Wants the only pod of `part` to stand still at `place`.
    pub(crate) fn want(world: &World, part: Part, place: &'static str) -> Result<Self> {
        let point = Self { admin: Admin::of(world, part)?, place };
        let said = point.admin.ask("PUT", &format!("/failpoint/{place}"))?;
        ensure!(said == format!("waits for {place}\n"), "{} does not know {place}: {said}", part.program());
        Ok(point)
    }

    /// Waits until it stands there.
    pub(crate) fn reached(&self) -> Result<()> {
        let stands = format!("stands at {}\n", self.place);
        eventually(&format!("somebody {}", stands.trim()), REACH_LIMIT, || {
            let said = self.admin.ask("GET", "/failpoint")?;
            Ok(if said == stands { Ok(()) } else { Err(said) })
        })
    }

    /// Lets the process go on; one that is gone does not mind.
    pub(crate) fn let_go(&self) {
        if let Err(error) = self.admin.ask("DELETE", "/failpoint") {
            println!("  nobody stands at {} any more ({error:#})", self.place);
        }
    }
}
