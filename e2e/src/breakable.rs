//! Operator and agent in builds that break one thing on purpose, installed in place of the real ones for a while.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::admin::Admin;
use crate::kubectl::{at, setting};
use crate::stories::schedule;
use crate::story::{CALLS, pids_of};
use crate::wait::eventually;
use crate::world::World;

/// A container on this machine is replaced in seconds; a new operator waits for what is left of the old one's lease.
pub(crate) const ROLLOUT_LIMIT: Duration = Duration::from_secs(120);
/// Namespace of operator and agent.
pub(crate) const SYSTEM: &str = "spaceport-system";
const FAULT: &str = "SPACEPORT_FAULT";

/// A program that can be broken.
#[derive(Clone, Copy, Debug)]
pub enum Part {
    /// The operator.
    Operator,
    /// The node agent.
    DevicePlugin,
}

/// What was installed, to be put back; dropping it does so too.
#[derive(Debug)]
pub struct Replaced<'a> {
    world: &'a World,
    part: Part,
    installed: String,
    is_back: bool,
}

/// A part of the names of the faults that are to be looked at; empty: all. From `SPACEPORT_FAULTS_ONLY`, which `cargo xtask`
/// sets.
///
/// # Errors
/// If it is not set.
pub fn faults_only() -> Result<String> {
    setting("SPACEPORT_FAULTS_ONLY")
}

impl Part {
    fn workload(self) -> &'static str {
        match self {
            Self::Operator => "deployment/spaceport-operator",
            Self::DevicePlugin => "daemonset/spaceport-device-plugin",
        }
    }

    fn container(self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::DevicePlugin => "device-plugin",
        }
    }

    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Operator => "spaceport-operator",
            Self::DevicePlugin => "spaceport-device-plugin",
        }
    }

    fn breakable_image(self) -> Result<String> {
        setting(match self {
            Self::Operator => "SPACEPORT_BREAKABLE_OPERATOR",
            Self::DevicePlugin => "SPACEPORT_BREAKABLE_DEVICE_PLUGIN",
        })
    }

    /// Notes what is installed. Nothing changes until [`Replaced::with`].
    ///
    /// # Errors
    /// If the part is not installed.
    pub fn replace(self, world: &World) -> Result<Replaced<'_>> {
        let workload = world.kubectl.json(&["--namespace", SYSTEM, "get", self.workload()])?;
        let image = at(&workload, "/spec/template/spec/containers/0/image");
        let installed = image.as_str().with_context(|| format!("{} has no image", self.workload()))?.to_owned();
        Ok(Replaced { world, part: self, installed, is_back: false })
    }
}

impl Replaced<'_> {
    /// Installs the breakable build with this fault, which outlives a kill of the process, and waits until leases are
    /// granted again.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn with(&self, fault: &str) -> Result<()> {
        let image = self.part.breakable_image()?;
        self.install(&image, &json!({ "name": FAULT, "value": fault }))
            .with_context(|| format!("{} with the fault {fault}", self.part.workload()))
    }

    /// Installs the breakable build with nothing broken: it has places where it can be made to stand still.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn for_tests(&self) -> Result<()> {
        let image = self.part.breakable_image()?;
        self.install(&image, &json!({ "name": FAULT, "$patch": "delete" }))
            .with_context(|| format!("{} as a build for tests", self.part.workload()))
    }

    /// Chooses this fault in the breakable build that is installed and waits until leases are granted. Ended with the process.
    ///
    /// # Errors
    /// If it does not know the fault, or does not come to grant leases.
    pub fn switch(&self, fault: &str) -> Result<()> {
        let said = Admin::of(self.world, self.part)?.ask("PUT", &format!("/fault/{fault}"))?;
        ensure!(said == format!("{fault}\n"), "{} does not know {fault}: {said}", self.part.program());
        leases_are_granted(self.world).with_context(|| format!("{} with the fault {fault}", self.part.workload()))
    }

    /// # Errors
    /// If this is not the fault any more that was chosen: the process has ended meanwhile.
    pub fn is_still(&self, fault: &str) -> Result<()> {
        let said = Admin::of(self.world, self.part)?.ask("GET", "/fault")?;
        ensure!(said == format!("{fault}\n"), "{} began anew without {fault}: {said}", self.part.program());
        Ok(())
    }

    /// Installs again what was there.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn put_back(mut self) -> Result<()> {
        self.is_back = true;
        self.restore()
    }

    fn restore(&self) -> Result<()> {
        self.install(&self.installed, &json!({ "name": FAULT, "$patch": "delete" }))
            .with_context(|| format!("{} as it was", self.part.workload()))
    }

    fn install(&self, image: &str, fault: &Value) -> Result<()> {
        let container = json!({ "name": self.part.container(), "image": image, "env": [fault] });
        let patch = json!({ "spec": { "template": { "spec": { "containers": [container] } } } }).to_string();
        let kubectl = &self.world.kubectl;
        let workload = self.part.workload();
        kubectl.run(&["--namespace", SYSTEM, "patch", workload, "--patch", &patch])?;
        let limit = format!("--timeout={}s", ROLLOUT_LIMIT.as_secs());
        kubectl.run(&["--namespace", SYSTEM, "rollout", "status", workload, &limit])?;
        eventually(&format!("one {} runs", self.part.program()), ROLLOUT_LIMIT, || {
            let pids = pids_of(self.part.program())?;
            Ok(if pids.len() == 1 { Ok(()) } else { Err(format!("{pids:?}")) })
        })?;
        leases_are_granted(self.world)
    }
}

/// Waits until a lease is granted, after operator or agent came up anew.
///
/// # Errors
/// If none is within the limit of a rollout.
pub(crate) fn leases_are_granted(world: &World) -> Result<()> {
    let account = world.new_account("probe")?;
    let probe = probe(&schedule(&world.token(&account)?, "1", ""));
    eventually("leases are granted", ROLLOUT_LIMIT, || {
        let seen = world.app(&probe)?;
        Ok(if seen["granted"] == true { Ok(()) } else { Err(seen.to_string()) })
    })
}

impl Drop for Replaced<'_> {
    fn drop(&mut self) {
        if !self.is_back
            && let Err(error) = self.restore()
        {
            eprintln!("{error:#}");
        }
    }
}

/// Asks for a lease and gives it back, whether it came at once or after a wait in the queue.
fn probe(path: &str) -> String {
    format!(
        r#"{CALLS}
try:
    status, body = post({path:?})
    token = re.search(r'"allowToken"\s*:\s*"([^"]+)"', body)
    granted = status == 200 and token is not None
    if granted:
        post(f"/release?allowToken={{token[1]}}&fail=true")
    print(json.dumps({{"granted": granted, "status": status, "body": body}}))
except OSError as error:
    print(json.dumps({{"granted": False, "error": str(error)}}))
"#
    )
}
