//! The example pool with other settings for a while.

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::kubectl::at;
use crate::world::World;

/// What the pool said before; dropping it puts that back.
#[derive(Debug)]
pub(crate) struct ChangedPool<'a> {
    world: &'a World,
    before: Value,
    is_back: bool,
}

impl<'a> ChangedPool<'a> {
    /// Changes these fields of the spec. The broker watches pools, so it knows before the next program in a pod is started.
    pub(crate) fn with(world: &'a World, changes: &Value) -> Result<Self> {
        let pool = world.kubectl.json(&["get", "gpupool", "default"])?;
        let changed = Self { world, before: fields_of(at(&pool, "/spec"), changes), is_back: false };
        changed.patch(changes)?;
        Ok(changed)
    }

    /// Puts back what was there.
    pub(crate) fn put_back(mut self) -> Result<()> {
        self.is_back = true;
        self.patch(&self.before)
    }

    fn patch(&self, spec: &Value) -> Result<()> {
        let patch = json!({ "spec": spec }).to_string();
        self.world.kubectl.run(&["patch", "gpupool", "default", "--type", "merge", "--patch", &patch])?;
        Ok(())
    }
}

impl Drop for ChangedPool<'_> {
    fn drop(&mut self) {
        if !self.is_back
            && let Err(error) = self.patch(&self.before)
        {
            eprintln!("the pool `default` is not as it was: {error:#}");
        }
    }
}

/// The fields of `spec` that `changes` names, at any depth; null where there is none, which a merge patch takes away again.
fn fields_of(spec: &Value, changes: &Value) -> Value {
    let Value::Object(changes) = changes else { return spec.clone() };
    let of = |(name, change): (&String, &Value)| (name.clone(), fields_of(&spec[name.as_str()], change));
    Value::Object(changes.iter().map(of).collect::<Map<_, _>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_back_is_what_was_there_and_nothing_else() {
        let spec = json!({ "mode": "Shared", "receipts": { "timing": "Live", "perSpace": 1000 } });
        let changes = json!({ "receipts": { "perSpace": 100_000 }, "allowLimitSeconds": 4 });
        let before = json!({ "receipts": { "perSpace": 1000 }, "allowLimitSeconds": null });
        assert_eq!(fields_of(&spec, &changes), before);
    }
}
