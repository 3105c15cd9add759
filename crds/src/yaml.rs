//! The chart's files: every definition as YAML, byte for byte the same each time.

use serde_json::Value as Json;
use serde_norway::{Mapping, Value as Yaml};

use crate::schema::definitions;

/// First line of every file.
const HEADER: &str = "# Written by `cargo xtask gen` from the types in crds/src; do not edit.\n";

/// File name and text of every definition, sorted by name, for `charts/spaceport-crds/templates`.
///
/// Keys are sorted here, whatever order the JSON library keeps. The text is plain YAML and a Helm template at once: it
/// holds no `{{` (tests/schema.rs).
pub fn yaml_files() -> Vec<(&'static str, String)> {
    definitions()
        .into_iter()
        .map(|(file, definition)| {
            let json = serde_json::to_value(&definition).expect("a definition is JSON");
            let yaml = serde_norway::to_string(&sorted(json)).expect("JSON is YAML");
            (file, format!("{HEADER}{yaml}"))
        })
        .collect()
}

fn sorted(json: Json) -> Yaml {
    match json {
        Json::Object(map) => {
            let mut entries: Vec<(String, Json)> = map.into_iter().collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Yaml::Mapping(
                entries.into_iter().map(|(key, value)| (Yaml::String(key), sorted(value))).collect::<Mapping>(),
            )
        }
        Json::Array(items) => Yaml::Sequence(items.into_iter().map(sorted).collect()),
        other => serde_norway::to_value(other).expect("a JSON scalar is YAML"),
    }
}
