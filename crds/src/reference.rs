//! The reference page, written from the definitions themselves: what it says is what the API server enforces.

use std::fmt::Write as _;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::Value;

use crate::conditions::{Documented, Explained, documented};
use crate::schema::all;

/// Text of `docs/reference/crds.md`.
pub fn reference_markdown() -> String {
    let definitions = all();
    let documented = documented();
    let mut page = String::from(
        "# Custom resources\n\n\
         Written by `cargo xtask gen` from the types in `crds/src`; do not edit. Group `spaceport.dev`, version `v1alpha1`,\n\
         category `spaceport` (`kubectl get spaceport -A`).\n\n\
         | Kind | Scope | Short | What it is |\n| --- | --- | --- | --- |\n",
    );
    for definition in &definitions {
        let schema = root_schema(definition);
        line(
            &mut page,
            format_args!(
                "| [`{0}`](#{1}) | {2} | `{3}` | {4} |",
                definition.spec.names.kind,
                definition.spec.names.kind.to_lowercase(),
                definition.spec.scope,
                definition.spec.names.short_names.iter().flatten().next().map_or("", String::as_str),
                text(&schema["description"]),
            ),
        );
    }
    for definition in &definitions {
        let conditions = documented.iter().find(|entry| entry.kind == definition.spec.names.kind);
        write_kind(&mut page, definition, conditions);
    }
    page
}

fn write_kind(page: &mut String, definition: &CustomResourceDefinition, conditions: Option<&Documented>) {
    let names = &definition.spec.names;
    let schema = root_schema(definition);
    line(page, format_args!("\n## {}\n\n{}", names.kind, text(&schema["description"])));
    line(page, format_args!("\n`kubectl get {}` prints:\n\n| Column | From |\n| --- | --- |", names.plural));
    for column in
        definition.spec.versions.iter().flat_map(|version| version.additional_printer_columns.iter().flatten())
    {
        let wide = if column.priority.unwrap_or(0) > 0 { " (`-o wide`)" } else { "" };
        line(page, format_args!("| {}{wide} | `{}` |", column.name.to_uppercase(), column.json_path));
    }
    for part in ["spec", "status"] {
        let fields = &schema["properties"][part];
        if fields.is_object() {
            line(page, format_args!("\n### {} {part}\n", names.kind));
            if let Some(description) = fields["description"].as_str() {
                line(page, format_args!("{}\n", flat(description)));
            }
            line(page, format_args!("| Field | Type | What it is |\n| --- | --- | --- |"));
            write_fields(page, fields, "");
        }
    }
    let mut rules = Vec::new();
    collect_rules(&schema, "", &mut rules);
    if !rules.is_empty() {
        line(page, format_args!("\n### {} rules\n\n| At | Refused with |\n| --- | --- |", names.kind));
        for (path, message) in rules {
            line(page, format_args!("| `{path}` | {message} |"));
        }
    }
    if let Some(conditions) = conditions {
        write_explained(page, &format!("{} conditions", names.kind), &conditions.types);
        for (heading, reasons) in &conditions.reasons {
            write_explained(page, &format!("{}: {}", names.kind, with_small_initial(heading)), reasons);
        }
    }
}

/// `Reasons of Ready` as part of another heading; names inside keep their case.
fn with_small_initial(heading: &str) -> String {
    let mut letters = heading.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

fn write_explained(page: &mut String, heading: &str, values: &[Explained]) {
    if values.is_empty() {
        return;
    }
    line(page, format_args!("\n### {heading}\n\n| Name | Meaning |\n| --- | --- |"));
    for (name, meaning) in values {
        line(page, format_args!("| `{name}` | {} |", flat(meaning)));
    }
}

fn write_fields(page: &mut String, object: &Value, prefix: &str) {
    let required: Vec<&str> = object["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    for (name, field) in object["properties"].as_object().into_iter().flatten() {
        let path = format!("{prefix}{name}");
        // A condition is Kubernetes' own type, the same everywhere: one line says enough.
        let condition = path == "conditions";
        let mut about = text(&field["description"]);
        if let Some(default) = field.get("default") {
            let _ = write!(about, " Default: `{default}`.");
        }
        let kind = if condition { "list of `metav1.Condition`".to_owned() } else { type_of(field) };
        let need = if required.contains(&name.as_str()) { ", required" } else { "" };
        line(page, format_args!("| `{path}` | {kind}{need} | {about} |"));
        if !condition {
            write_fields(page, field, &format!("{path}."));
            write_fields(page, &field["items"], &format!("{path}[]."));
        }
    }
}

/// Type of a field with what bounds it.
fn type_of(field: &Value) -> String {
    if field["x-kubernetes-int-or-string"] == Value::Bool(true) {
        return "quantity".to_owned();
    }
    if let Some(values) = field["enum"].as_array() {
        let values: Vec<String> = values.iter().filter_map(Value::as_str).map(|value| format!("`{value}`")).collect();
        return values.join(", ");
    }
    let name = match (field["type"].as_str().unwrap_or("any"), field["format"].as_str()) {
        ("array", _) => {
            let of = type_of(&field["items"]);
            return match field["maxItems"].as_u64() {
                Some(most) => format!("list of {of} (max {most})"),
                None => format!("list of {of}"),
            };
        }
        ("object", _) if field["additionalProperties"].is_object() => {
            return format!("map of {}", type_of(&field["additionalProperties"]));
        }
        ("string", Some("date-time")) => "time",
        ("integer", Some(format)) => format,
        (other, _) => other,
    };
    let bound = |key: &str, sign: &str| field[key].as_f64().map(|limit| format!(" {sign} {limit}")).unwrap_or_default();
    format!("{name}{}{}", bound("minimum", "&ge;"), bound("maximum", "&le;"))
}

fn collect_rules(schema: &Value, path: &str, rules: &mut Vec<(String, String)>) {
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        let at = if path.is_empty() { "(object)" } else { path };
        rules.push((at.to_owned(), text(&rule["message"])));
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let below = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        collect_rules(field, &below, rules);
    }
    if schema["items"].is_object() {
        collect_rules(&schema["items"], &format!("{path}[]"), rules);
    }
}

fn root_schema(definition: &CustomResourceDefinition) -> Value {
    let schema = definition.spec.versions.first().and_then(|version| version.schema.as_ref());
    serde_json::to_value(schema.and_then(|schema| schema.open_api_v3_schema.as_ref())).expect("a schema is JSON")
}

fn text(value: &Value) -> String {
    flat(value.as_str().unwrap_or_default())
}

/// One line that fits a table cell.
fn flat(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

fn line(page: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(page, "{text}");
}
