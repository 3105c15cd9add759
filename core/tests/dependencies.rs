//! Nothing in this crate can do I/O, read a clock or draw random numbers: its dependencies are these and no others.

#[test]
fn the_dependency_list_is_exactly_this() {
    let manifest = include_str!("../Cargo.toml");
    let mut section = "";
    let mut dependencies = Vec::new();
    for line in manifest.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = name;
            assert!(!section.contains("dependencies."), "{section}: a dependency in a table of its own");
            assert!(!section.starts_with("target"), "{section}: a dependency that only some targets have");
        } else if section == "dependencies" && !line.is_empty() && !line.starts_with('#') {
            dependencies.push(line.split(['.', ' ', '=']).next().unwrap_or_default());
        }
    }
    assert_eq!(dependencies, ["foldhash", "form_urlencoded", "jiff", "serde", "serde_json", "thiserror"]);
}
