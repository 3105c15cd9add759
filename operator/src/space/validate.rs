//! From the object a person wrote to one that cannot be wrong. Pure.
//!
//! What a person got wrong is an [`Invalid`], which becomes a condition, never an `Err` of the controller.

use std::collections::BTreeMap;

use serde::Deserialize;
use spaceport_core::stage::Override;
use spaceport_crds::conditions::SpaceReason;
use spaceport_crds::{EgressPolicy, Hardware, Sdk, Source, Space, SpaceSpec, Visibility};

use super::plan::APP_PORT;

/// Together with its metadata an inline source has to fit an object of the API server (1 MiB by default in etcd).
const INLINE_BYTES_MAX: usize = 900 * 1024;
/// Most bytes of front matter that are looked at.
const FRONT_MATTER_BYTES_MAX: usize = 16 * 1024;

/// Environment variables that make the pod a Space, or that the loader and the driver obey (N8): not for `spec.variables`.
const RESERVED_NAMES: [&str; 8] = [
    "HOME",
    "SPACE_ID",
    "SPACE_HOST",
    "ACCELERATOR",
    "GRADIO_SERVER_NAME",
    "GRADIO_SERVER_PORT",
    "GRADIO_ROOT_PATH",
    "UV_DEFAULT_INDEX",
];
const RESERVED_PREFIXES: [&str; 5] = ["SPACES_ZERO_", "ZEROGPU_", "SPACEPORT_", "LD_", "NVIDIA_"];

/// A Space that can be built and started.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidSpace {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// Where the app comes from.
    pub source: AppSource,
    /// What kind of app; from the spec, else the front matter.
    pub sdk: Sdk,
    /// Version of the sdk; None: what the requirements say.
    pub sdk_version: Option<String>,
    /// File to run; None: decided where the source is fetched (front matter, else `app.py`).
    pub app_file: Option<String>,
    /// Title for people.
    pub title: Option<String>,
    /// Port the app listens on.
    pub port: i32,
    /// Runs on time-shared cards.
    pub zero_gpu: bool,
    /// Has a pod: not paused.
    pub runs: bool,
    /// From the start of the pod to the first answer.
    pub startup_timeout_seconds: i32,
    /// `spec.variables`.
    pub variables: BTreeMap<String, String>,
    /// Names of Secrets whose keys become variables.
    pub secrets: Vec<String>,
    /// CPU limit.
    pub cpu: String,
    /// Memory limit.
    pub memory: String,
    /// Limit of each scratch volume.
    pub storage: String,
    /// Changes when a restart was asked for.
    pub restarted_at: Option<String>,
}

/// Where the app comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AppSource {
    /// Files by path.
    Inline(BTreeMap<String, String>),
    /// A git repository over http(s).
    Git {
        /// Repository.
        url: String,
        /// Branch, tag or commit.
        reference: String,
        /// Folder within it; empty: its root.
        path: String,
        /// Secret with `username` and `password`.
        secret: Option<String>,
    },
}

/// Why a Space cannot be started as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// Reason of the condition.
    pub reason: SpaceReason,
    /// What, where, and the next step.
    pub message: String,
    /// The stage it leads to.
    pub overriding: Override,
}

/// The part of the front matter that is used here; other keys are left alone, as the hosted service does.
#[derive(Debug, Default, Deserialize)]
struct FrontMatter {
    sdk: Option<String>,
    sdk_version: Option<serde_norway::Value>,
    app_file: Option<String>,
    app_port: Option<i32>,
    title: Option<String>,
}

/// Checks a Space.
///
/// # Errors
/// See [`Invalid`].
pub fn validate(space: &Space) -> Result<ValidSpace, Invalid> {
    let spec = &space.spec;
    supported(spec)?;
    let source = source(&spec.source)?;
    let front_matter = front_matter(&source)?;
    let sdk = match (spec.sdk, front_matter.sdk.as_deref()) {
        (Some(sdk), _) => sdk,
        (None, None | Some("gradio")) => Sdk::Gradio,
        (None, Some("docker")) => Sdk::Docker,
        (None, Some("static")) => Sdk::Static,
        (None, Some(other)) => {
            return Err(invalid(format!("README.md: sdk is {other:?}; known are gradio, docker and static")));
        }
    };
    if sdk != Sdk::Gradio {
        return Err(invalid(format!("sdk {sdk} is not supported by this version; use gradio")));
    }
    let zero_gpu = match spec.hardware {
        Hardware::ZeroGpu => true,
        Hardware::CpuBasic => false,
        other @ (Hardware::Large | Hardware::Xlarge) => {
            return Err(Invalid {
                reason: SpaceReason::HardwareRefused,
                message: format!("spec.hardware {other} is not supported by this version; use zero-gpu or cpu-basic"),
                overriding: Override::ConfigError,
            });
        }
    };
    let app_file = spec.app_file.clone().or(front_matter.app_file);
    if let AppSource::Inline(files) = &source {
        let wanted = app_file.as_deref().unwrap_or("app.py");
        if !files.contains_key(wanted) {
            return Err(Invalid {
                reason: SpaceReason::NoAppFile,
                message: format!("the source has no file {wanted:?}; add it or set spec.appFile"),
                overriding: Override::NoAppFile,
            });
        }
    }
    let port = spec.app_port.or(front_matter.app_port).unwrap_or(APP_PORT);
    if !(1024..=65_535).contains(&port) {
        return Err(invalid(format!("README.md: app_port is {port}; it must lie between 1024 and 65535")));
    }
    let variables = variables(space)?;
    let given: Vec<_> = spec.secret_refs.iter().map(|secret| secret.name.clone()).collect();
    if given.is_empty() && !spec.required_secrets.is_empty() {
        return Err(Invalid {
            reason: SpaceReason::MissingSecrets,
            message: format!(
                "these must come from a Secret named in spec.secretRefs: {}; add one, or remove them from spec.requiredSecrets",
                spec.required_secrets.join(", ")
            ),
            overriding: Override::ConfigError,
        });
    }
    Ok(ValidSpace {
        namespace: space.metadata.namespace.clone().unwrap_or_default(),
        name: space.metadata.name.clone().unwrap_or_default(),
        uid: space.metadata.uid.clone().unwrap_or_default(),
        source,
        sdk,
        sdk_version: spec.sdk_version.clone().or_else(|| front_matter.sdk_version.as_ref().and_then(version_text)),
        app_file,
        title: spec.title.clone().or(front_matter.title),
        port,
        zero_gpu,
        runs: spec.paused.is_none(),
        startup_timeout_seconds: spec.startup_timeout_seconds,
        variables,
        secrets: given,
        cpu: spec.resources.cpu.0.clone(),
        memory: spec.resources.memory.0.clone(),
        storage: spec.resources.storage.0.clone(),
        restarted_at: spec.restarted_at.as_ref().map(|time| time.0.to_string()),
    })
}

/// Refuses what this version would not do: an owner who asks for a private Space or a closed network must not get an open
/// one. (`sleepAfterSeconds` is left alone: a Space that stays awake breaks no promise.)
fn supported(spec: &SpaceSpec) -> Result<(), Invalid> {
    let refused =
        |field: &str, next: &str| Err(invalid(format!("spec.{field} is not supported by this version; {next}")));
    match () {
        () if spec.visibility != Visibility::Public => refused(
            &format!("visibility {}", spec.visibility),
            "use public, and a NetworkPolicy of your own until there is a gateway",
        ),
        () if spec.egress.policy != EgressPolicy::Internet => {
            refused(&format!("egress.policy {}", spec.egress.policy), "use Internet, and a NetworkPolicy of your own")
        }
        () if spec.duplicate_of.is_some() => refused("duplicateOf", "copy spec.source instead"),
        () if !spec.preload.is_empty() => refused("preload", "let the app download at its start"),
        () if spec.replicas > 1 => refused(&format!("replicas {}", spec.replicas), "use 1"),
        () => Ok(()),
    }
}

fn invalid(message: String) -> Invalid {
    Invalid { reason: SpaceReason::InvalidConfiguration, message, overriding: Override::ConfigError }
}

fn source(source: &Source) -> Result<AppSource, Invalid> {
    match source {
        Source { inline: Some(inline), git: None, image: None, archive: None } => {
            let bytes: usize = inline.files.iter().map(|(path, text)| path.len() + text.len()).sum();
            if bytes > INLINE_BYTES_MAX {
                return Err(invalid(format!(
                    "spec.source.inline holds {bytes} bytes, at most {INLINE_BYTES_MAX} fit; put the source into git"
                )));
            }
            Ok(AppSource::Inline(inline.files.clone()))
        }
        Source { git: Some(git), inline: None, image: None, archive: None } => {
            if !(git.url.starts_with("https://") || git.url.starts_with("http://")) {
                return Err(invalid("spec.source.git.url: this version fetches over https and http only".to_owned()));
            }
            Ok(AppSource::Git {
                url: git.url.clone(),
                reference: git.reference.clone(),
                path: git.path.clone().unwrap_or_default(),
                secret: git.secret_ref.as_ref().map(|secret| secret.name.clone()),
            })
        }
        Source { image: Some(_), .. } => {
            Err(invalid("spec.source.image is not supported by this version; use inline or git".to_owned()))
        }
        Source { archive: Some(_), .. } => {
            Err(invalid("spec.source.archive is not supported by this version; use inline or git".to_owned()))
        }
        Source { .. } => Err(invalid("spec.source: give exactly one of git and inline".to_owned())),
    }
}

fn variables(space: &Space) -> Result<BTreeMap<String, String>, Invalid> {
    let mut variables = BTreeMap::new();
    for variable in &space.spec.variables {
        let name = variable.name.as_str();
        if RESERVED_NAMES.contains(&name) || RESERVED_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
            return Err(invalid(format!("spec.variables: {name} is set by the platform; remove it")));
        }
        variables.insert(name.to_owned(), variable.value.clone());
    }
    Ok(variables)
}

/// The block between `---` lines at the top of README.md. For git it is read where the source is fetched.
fn front_matter(source: &AppSource) -> Result<FrontMatter, Invalid> {
    let AppSource::Inline(files) = source else { return Ok(FrontMatter::default()) };
    let Some(block) = files.get("README.md").and_then(|readme| front_matter_block(readme)) else {
        return Ok(FrontMatter::default());
    };
    if block.len() > FRONT_MATTER_BYTES_MAX {
        return Err(invalid(format!(
            "README.md: the front matter has {} bytes, at most {FRONT_MATTER_BYTES_MAX} are read",
            block.len()
        )));
    }
    serde_norway::from_str::<Option<FrontMatter>>(block)
        .map(Option::unwrap_or_default)
        .map_err(|error| invalid(format!("README.md: the front matter is not YAML as expected: {error}")))
}

fn front_matter_block(readme: &str) -> Option<&str> {
    let rest = readme.strip_prefix("---\n").or_else(|| readme.strip_prefix("---\r\n"))?;
    let mut offset = 0;
    for line in rest.split_inclusive('\n') {
        if line.trim_end() == "---" {
            return rest.get(..offset);
        }
        offset += line.len();
    }
    None
}

/// `sdk_version: 6.31.0` is a string in YAML, `sdk_version: 4.44` a number.
fn version_text(value: &serde_norway::Value) -> Option<String> {
    match value {
        serde_norway::Value::String(text) => Some(text.clone()),
        serde_norway::Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use spaceport_crds::{GitSource, InlineSource, SecretRef, SpaceSpec, Variable};

    use super::*;

    /// A Space with these inline files.
    pub fn inline(files: &[(&str, &str)]) -> Space {
        let files = files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
        let source = Source { inline: Some(InlineSource { files }), ..Source::default() };
        let spec: SpaceSpec = serde_json::from_value(serde_json::json!({ "source": source })).unwrap();
        let mut space = Space::new("app", spec);
        space.metadata.namespace = Some("team".to_owned());
        space.metadata.uid = Some("3e0f7a52-0000-4000-8000-000000000001".to_owned());
        space
    }

    #[test]
    fn what_this_version_does_not_do_is_refused_and_not_ignored() {
        let refused = |field: &str, value: serde_json::Value| {
            let mut space = serde_json::to_value(inline(&[("app.py", "")])).unwrap();
            space["spec"][field] = value;
            let refusal = validate(&serde_json::from_value(space).unwrap()).unwrap_err();
            assert!(refusal.message.contains("not supported by this version; "), "{}", refusal.message);
            refusal.message
        };
        assert!(refused("visibility", "private".into()).contains("visibility private"));
        assert!(refused("egress", serde_json::json!({ "policy": "None" })).contains("egress.policy None"));
        refused("duplicateOf", "team/other".into());
        assert!(refused("replicas", 2.into()).contains("replicas 2"));
    }

    #[test]
    fn front_matter_is_honoured_and_the_spec_wins() {
        let readme = "---\ntitle: Hello\nsdk: gradio\nsdk_version: 6.31.0\napp_file: main.py\napp_port: 8000\nemoji: x\n---\n# Hello\n";
        let mut space = inline(&[("README.md", readme), ("main.py", ""), ("other.py", "")]);
        let valid = validate(&space).unwrap();
        assert_eq!(valid.app_file.as_deref(), Some("main.py"));
        assert_eq!(valid.sdk_version.as_deref(), Some("6.31.0"));
        assert_eq!(valid.title.as_deref(), Some("Hello"));
        assert_eq!(valid.port, 8000);
        space.spec.app_file = Some("other.py".to_owned());
        space.spec.app_port = Some(9000);
        let valid = validate(&space).unwrap();
        assert_eq!((valid.app_file.as_deref(), valid.port), (Some("other.py"), 9000));
    }

    #[test]
    fn a_readme_without_front_matter_says_nothing() {
        for readme in ["", "# Title", "---\nno end", "text\n---\nsdk: docker\n---\n", "---\n---\n"] {
            let valid = validate(&inline(&[("README.md", readme), ("app.py", "")])).unwrap();
            assert_eq!(valid.port, APP_PORT, "{readme:?}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_the_next_step() {
        let message = |space: &Space| validate(space).unwrap_err();
        let missing = message(&inline(&[("main.py", "")]));
        assert_eq!(missing.overriding, Override::NoAppFile);
        assert!(missing.message.contains("\"app.py\""), "{}", missing.message);

        let docker = message(&inline(&[("README.md", "---\nsdk: docker\n---\n"), ("app.py", "")]));
        assert!(docker.message.contains("docker"), "{}", docker.message);
        let broken = message(&inline(&[("README.md", "---\nsdk: [\n---\n"), ("app.py", "")]));
        assert!(broken.message.contains("front matter"), "{}", broken.message);

        let mut space = inline(&[("app.py", "")]);
        space.spec.variables = vec![Variable { name: "LD_PRELOAD".to_owned(), value: "/x.so".to_owned() }];
        assert!(message(&space).message.contains("LD_PRELOAD"));

        let mut space = inline(&[("app.py", "")]);
        space.spec.required_secrets = vec!["HF_TOKEN".to_owned()];
        assert_eq!(message(&space).reason, SpaceReason::MissingSecrets);
        space.spec.secret_refs = vec![SecretRef { name: "tokens".to_owned() }];
        validate(&space).unwrap();

        let mut space = inline(&[("app.py", "")]);
        space.spec.hardware = Hardware::Xlarge;
        assert_eq!(message(&space).reason, SpaceReason::HardwareRefused);
    }

    #[test]
    fn git_over_http_is_a_source_and_ssh_is_refused() {
        let mut space = inline(&[]);
        let git = |url: &str| Source {
            git: Some(GitSource { url: url.to_owned(), reference: "v1".to_owned(), ..GitSource::default() }),
            ..Source::default()
        };
        space.spec.source = git("https://git.example.com/app.git");
        assert!(matches!(validate(&space).unwrap().source, AppSource::Git { .. }));
        space.spec.source = git("ssh://git.example.com/app.git");
        assert!(validate(&space).unwrap_err().message.contains("https"));
    }
}
