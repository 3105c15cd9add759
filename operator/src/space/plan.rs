//! What a valid Space is made of. Pure and infallible: nothing here can be refused by a healthy API server.
//!
//! One Deployment with one pod: two init containers fetch the source and install the environment (lane A, into the pod's own
//! emptyDir), a third waits for the device API, then the app. A Service in front, a NetworkPolicy around it.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment};
use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMap, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvFromSource,
    EnvVar, HTTPGetAction, KeyToPath, PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ResourceRequirements,
    SeccompProfile, SecretEnvSource, SecretVolumeSource, SecurityContext, Service, ServicePort, ServiceSpec, Volume,
    VolumeMount,
};
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPort, NetworkPolicySpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use sha2::{Digest as _, Sha256};
use spaceport_crds::names::{API_VERSION, SEAT_RESOURCE, SPACE_LABEL};

use super::Settings;
use super::validate::{AppSource, ValidSpace};

/// Label with the Space's uid; the node agent takes the pod's identity from it, an admission policy protects it.
pub const LABEL_SPACE_UID: &str = "spaceport.dev/space-uid";
/// Annotation of the pod template with the hash of everything that should restart the app.
pub const ANNOTATION_REVISION: &str = "spaceport.dev/revision";

/// Init container that brings the source.
pub const CONTAINER_SOURCE: &str = "source";
/// Init container that installs the environment.
pub const CONTAINER_ENVIRONMENT: &str = "environment";
/// Init container that waits for the device API.
pub const CONTAINER_DEVICE_API: &str = "device-api";
/// The app.
pub const CONTAINER_APP: &str = "app";

/// Port of the device API on the pod's own loopback (N14); the node agent has the same default.
const DEVICE_API_PORT: u16 = 7999;
/// Gradio's port.
pub const APP_PORT: i32 = 7860;
/// Uid of everything in a Space's pod.
const USER: i64 = 1000;
const HOME: &str = "/home/user";
const APP_FOLDER: &str = "/home/user/app";
const ENVIRONMENT_FOLDER: &str = "/opt/environment";
const INLINE_FOLDER: &str = "/opt/spaceport/inline";
const CA_FOLDER: &str = "/etc/spaceport/ca";
const CREDENTIAL_HELPER: &str = "!f() { printf 'username='; cat /etc/spaceport/git/username; printf '\\npassword='; \
     cat /etc/spaceport/git/password; printf '\\n'; }; f";
const PREPARE: &str = "/opt/spaceport/prepare.py";

/// Everything a Space is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Inline source files, if that is where the source is.
    pub source: Option<ConfigMap>,
    /// CA bundle for package indexes, if the chart has one.
    pub ca_bundle: Option<ConfigMap>,
    /// The app.
    pub deployment: Deployment,
    /// In front of it.
    pub service: Service,
    /// Around it.
    pub network_policy: NetworkPolicy,
    /// Hash of everything that should restart the app.
    pub revision: String,
}

/// Builds the plan.
pub fn plan(space: &ValidSpace, settings: &Settings) -> Plan {
    let source = inline_config_map(space);
    let ca_bundle = ca_config_map(space, settings);
    let mut pod = pod_template(space, settings, source.as_ref(), ca_bundle.is_some());
    let revision = revision(space, settings, &pod);
    if let Some(metadata) = &mut pod.metadata {
        metadata.annotations = Some(BTreeMap::from([(ANNOTATION_REVISION.to_owned(), revision.clone())]));
    }
    let deployment = Deployment {
        metadata: metadata(space, space.name.clone()),
        spec: Some(DeploymentSpec {
            replicas: Some(i32::from(space.runs)),
            selector: LabelSelector { match_labels: Some(selector(space)), ..LabelSelector::default() },
            // The old pod answers until the new one does. A Space keeps one pod, so surge is one.
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".to_owned()),
                rolling_update: Some(RollingUpdateDeployment {
                    max_surge: Some(IntOrString::Int(1)),
                    max_unavailable: Some(IntOrString::Int(0)),
                }),
            }),
            // Two old revisions are enough to see what changed.
            revision_history_limit: Some(2),
            progress_deadline_seconds: Some(space.startup_timeout_seconds),
            template: pod,
            ..DeploymentSpec::default()
        }),
        status: None,
    };
    let service = Service {
        metadata: metadata(space, space.name.clone()),
        spec: Some(ServiceSpec {
            selector: Some(selector(space)),
            ports: Some(vec![ServicePort {
                name: Some("http".to_owned()),
                port: 80,
                target_port: Some(IntOrString::String("http".to_owned())),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        status: None,
    };
    let network_policy = NetworkPolicy {
        metadata: metadata(space, space.name.clone()),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(LabelSelector { match_labels: Some(selector(space)), ..LabelSelector::default() }),
            policy_types: Some(vec!["Ingress".to_owned()]),
            // Only the app's own port. From whom is narrowed to the gateway once there is one.
            ingress: Some(vec![NetworkPolicyIngressRule {
                from: None,
                ports: Some(vec![NetworkPolicyPort {
                    port: Some(IntOrString::Int(APP_PORT)),
                    protocol: Some("TCP".to_owned()),
                    end_port: None,
                }]),
            }]),
            egress: None,
        }),
    };
    Plan { source, ca_bundle, deployment, service, network_policy, revision }
}

fn selector(space: &ValidSpace) -> BTreeMap<String, String> {
    BTreeMap::from([(SPACE_LABEL.to_owned(), space.name.clone()), (LABEL_SPACE_UID.to_owned(), space.uid.clone())])
}

fn metadata(space: &ValidSpace, name: String) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(space.namespace.clone()),
        labels: Some(BTreeMap::from([
            (SPACE_LABEL.to_owned(), space.name.clone()),
            ("app.kubernetes.io/managed-by".to_owned(), "spaceport".to_owned()),
        ])),
        owner_references: Some(vec![OwnerReference {
            api_version: API_VERSION.to_owned(),
            kind: "Space".to_owned(),
            name: space.name.clone(),
            uid: space.uid.clone(),
            controller: Some(true),
            block_owner_deletion: Some(true),
        }]),
        ..ObjectMeta::default()
    }
}

/// ConfigMap keys cannot hold every file name, so the keys count and the volume maps them back.
fn inline_key(index: usize) -> String {
    format!("file-{index}")
}

fn inline_config_map(space: &ValidSpace) -> Option<ConfigMap> {
    let AppSource::Inline(files) = &space.source else { return None };
    let binary = files
        .values()
        .enumerate()
        .map(|(index, content)| (inline_key(index), ByteString(content.clone().into_bytes())))
        .collect();
    Some(ConfigMap {
        metadata: metadata(space, format!("{}-source", space.name)),
        binary_data: Some(binary),
        ..ConfigMap::default()
    })
}

fn ca_config_map(space: &ValidSpace, settings: &Settings) -> Option<ConfigMap> {
    settings.ca_bundle.as_ref().map(|bundle| ConfigMap {
        metadata: metadata(space, format!("{}-ca", space.name)),
        data: Some(BTreeMap::from([("ca.crt".to_owned(), bundle.clone())])),
        ..ConfigMap::default()
    })
}

fn revision(space: &ValidSpace, settings: &Settings, pod: &PodTemplateSpec) -> String {
    let mut hash = Sha256::new();
    // serde_json writes maps in a fixed order (BTreeMap), so equal plans hash equally.
    hash.update(serde_json::to_vec(pod).unwrap_or_default());
    if let AppSource::Inline(files) = &space.source {
        for (name, content) in files {
            hash.update(name.as_bytes());
            hash.update([0]);
            hash.update(content.as_bytes());
            hash.update([0]);
        }
    }
    hash.update(space.restarted_at.as_deref().unwrap_or_default());
    hash.update(settings.ca_bundle.as_deref().unwrap_or_default());
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn pod_template(space: &ValidSpace, settings: &Settings, source: Option<&ConfigMap>, ca: bool) -> PodTemplateSpec {
    let mut init = vec![
        prepare(CONTAINER_SOURCE, "source", space, settings, ca),
        prepare(CONTAINER_ENVIRONMENT, "environment", space, settings, ca),
    ];
    if space.zero_gpu {
        init.push(Container {
            name: CONTAINER_DEVICE_API.to_owned(),
            image: Some(settings.tools_image.clone()),
            image_pull_policy: Some(settings.image_pull_policy.clone()),
            command: Some(vec!["/spaceport-wait".to_owned()]),
            args: Some(vec!["--address".to_owned(), format!("127.0.0.1:{DEVICE_API_PORT}")]),
            resources: Some(resources("50m", "16Mi", "100m", "64Mi")),
            security_context: Some(restricted()),
            ..Container::default()
        });
    }
    PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(selector(space)), ..ObjectMeta::default() }),
        spec: Some(PodSpec {
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            // A visitor's running call may finish.
            termination_grace_period_seconds: Some(30),
            security_context: Some(PodSecurityContext {
                run_as_non_root: Some(true),
                run_as_user: Some(USER),
                run_as_group: Some(USER),
                fs_group: Some(USER),
                seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
                ..PodSecurityContext::default()
            }),
            init_containers: Some(init),
            containers: vec![app(space, settings, ca)],
            volumes: Some(volumes(space, source, ca)),
            ..PodSpec::default()
        }),
    }
}

fn volumes(space: &ValidSpace, source: Option<&ConfigMap>, ca: bool) -> Vec<Volume> {
    let empty = |name: &str| Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource {
            size_limit: Some(Quantity(space.storage.clone())),
            ..EmptyDirVolumeSource::default()
        }),
        ..Volume::default()
    };
    let config = |name: &str, object: String, items| Volume {
        name: name.to_owned(),
        config_map: Some(ConfigMapVolumeSource { name: object, items, ..ConfigMapVolumeSource::default() }),
        ..Volume::default()
    };
    let mut volumes = vec![empty("home"), empty("environment"), empty("tmp")];
    if let (Some(_), AppSource::Inline(files)) = (source, &space.source) {
        let items = files
            .keys()
            .enumerate()
            .map(|(index, path)| KeyToPath { key: inline_key(index), path: path.clone(), mode: None })
            .collect();
        volumes.push(config("source", format!("{}-source", space.name), Some(items)));
    }
    if ca {
        volumes.push(config("ca", format!("{}-ca", space.name), None));
    }
    if let AppSource::Git { secret: Some(secret), .. } = &space.source {
        volumes.push(Volume {
            name: "git".to_owned(),
            secret: Some(SecretVolumeSource { secret_name: Some(secret.clone()), ..SecretVolumeSource::default() }),
            ..Volume::default()
        });
    }
    volumes
}

fn mount(name: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    }
}

fn variable(name: &str, value: impl Into<String>) -> EnvVar {
    EnvVar { name: name.to_owned(), value: Some(value.into()), value_from: None }
}

/// Pod Security *restricted*, with a read-only root.
fn restricted() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
        ..SecurityContext::default()
    }
}

fn resources(cpu: &str, memory: &str, cpu_limit: &str, memory_limit: &str) -> ResourceRequirements {
    let map = |cpu: &str, memory: &str| {
        BTreeMap::from([
            ("cpu".to_owned(), Quantity(cpu.to_owned())),
            ("memory".to_owned(), Quantity(memory.to_owned())),
        ])
    };
    ResourceRequirements { requests: Some(map(cpu, memory)), limits: Some(map(cpu_limit, memory_limit)), claims: None }
}

/// Settings that `prepare.py` reads, in every container that runs it.
fn prepare_environment(space: &ValidSpace, settings: &Settings, ca: bool) -> Vec<EnvVar> {
    let mut environment = vec![
        variable("HOME", HOME),
        variable("SPACEPORT_APP_DIR", APP_FOLDER),
        variable("SPACEPORT_ENVIRONMENT_DIR", ENVIRONMENT_FOLDER),
        variable("SPACEPORT_SDK", space.sdk.as_str()),
    ];
    let mut optional = |name: &str, value: &Option<String>| {
        if let Some(value) = value {
            environment.push(variable(name, value.as_str()));
        }
    };
    optional("SPACEPORT_APP_FILE", &space.app_file);
    optional("SPACEPORT_SDK_VERSION", &space.sdk_version);
    optional("UV_DEFAULT_INDEX", &settings.index_url);
    optional("UV_INDEX", &settings.extra_index_urls);
    if let AppSource::Git { url, reference, path, .. } = &space.source {
        environment.push(variable("SPACEPORT_GIT_URL", url.as_str()));
        environment.push(variable("SPACEPORT_GIT_REF", reference.as_str()));
        environment.push(variable("SPACEPORT_GIT_PATH", path.as_str()));
        // A repository that asks for a password has none to get here: fail with its message, never wait for a prompt.
        environment.push(variable("GIT_TERMINAL_PROMPT", "0"));
    }
    if ca {
        for name in ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO"] {
            environment.push(variable(name, format!("{CA_FOLDER}/ca.crt")));
        }
    }
    if space.zero_gpu {
        environment.push(variable("SPACES_ZERO_GPU", "true"));
    }
    environment
}

/// The way out while a Space is prepared. Not for the app: a proxy that catches its calls to the device API would end them,
/// and what the app needs is its own `variables`.
fn proxies(settings: &Settings) -> Vec<EnvVar> {
    let proxies = [
        (["HTTP_PROXY", "http_proxy"], &settings.http_proxy),
        (["HTTPS_PROXY", "https_proxy"], &settings.https_proxy),
        (["NO_PROXY", "no_proxy"], &settings.no_proxy),
    ];
    // git reads the small names only, others the large ones.
    let named = |(names, value): ([&'static str; 2], &Option<String>)| {
        value.iter().flat_map(|value| names.map(|name| variable(name, value.as_str()))).collect::<Vec<_>>()
    };
    proxies.into_iter().flat_map(named).collect()
}

fn prepare(name: &str, step: &str, space: &ValidSpace, settings: &Settings, ca: bool) -> Container {
    let mut mounts =
        vec![mount("home", HOME, false), mount("environment", ENVIRONMENT_FOLDER, false), mount("tmp", "/tmp", false)];
    if matches!(space.source, AppSource::Inline(_)) {
        mounts.push(mount("source", INLINE_FOLDER, true));
    }
    if ca {
        mounts.push(mount("ca", CA_FOLDER, true));
    }
    let mut environment = prepare_environment(space, settings, ca);
    environment.extend(proxies(settings));
    if matches!(&space.source, AppSource::Git { secret: Some(_), .. }) && name == CONTAINER_SOURCE {
        mounts.push(mount("git", "/etc/spaceport/git", true));
        // git asks this helper; the secret stays in its volume and in no argument or variable.
        environment.push(variable("GIT_CONFIG_COUNT", "1"));
        environment.push(variable("GIT_CONFIG_KEY_0", "credential.helper"));
        environment.push(variable("GIT_CONFIG_VALUE_0", CREDENTIAL_HELPER));
    }
    Container {
        name: name.to_owned(),
        image: Some(settings.python_image.clone()),
        image_pull_policy: Some(settings.image_pull_policy.clone()),
        command: Some(vec!["/usr/bin/python3".to_owned(), PREPARE.to_owned(), step.to_owned()]),
        env: Some(environment),
        volume_mounts: Some(mounts),
        resources: Some(resources("100m", "256Mi", &space.cpu, &space.memory)),
        security_context: Some(restricted()),
        ..Container::default()
    }
}

fn app(space: &ValidSpace, settings: &Settings, ca: bool) -> Container {
    let mut environment = prepare_environment(space, settings, ca);
    environment.extend([
        variable("PYTHONUNBUFFERED", "1"),
        variable("SPACE_ID", format!("{}/{}", space.namespace, space.name)),
        variable("SPACE_HOST", format!("{}-{}.{}", space.namespace, space.name, settings.domain)),
        variable("SPACE_AUTHOR_NAME", space.namespace.as_str()),
        variable("SPACE_REPO_NAME", space.name.as_str()),
        variable("SPACE_TITLE", space.title.as_deref().unwrap_or(&space.name)),
        variable("ACCELERATOR", if space.zero_gpu { "zero-gpu" } else { "none" }),
        variable("CPU_CORES", space.cpu.as_str()),
        variable("MEMORY", space.memory.as_str()),
        variable("GRADIO_SERVER_NAME", "0.0.0.0"),
        variable("GRADIO_SERVER_PORT", APP_PORT.to_string()),
        variable("GRADIO_ROOT_PATH", ""),
        variable("GRADIO_ANALYTICS_ENABLED", "False"),
        variable("HF_HUB_DISABLE_TELEMETRY", "1"),
        // Gradio probes its own address at launch, and the device API is on loopback.
        variable("NO_PROXY", "127.0.0.1,localhost"),
        variable("no_proxy", "127.0.0.1,localhost"),
    ]);
    if space.zero_gpu {
        environment.extend([
            variable("SPACES_ZERO_DEVICE_API_URL", format!("http://127.0.0.1:{DEVICE_API_PORT}")),
            // Without it Gradio's own queue has size 1 under ZeroGPU.
            variable("GRADIO_DEFAULT_CONCURRENCY_LIMIT", "none"),
            variable("ZEROGPU_OFFLOAD_DIR", format!("{HOME}/.zerogpu/tensors")),
            variable("ZEROGPU_MMAP_AUTOPRUNE_PATTERN", ""),
        ]);
    }
    // The owner's variables come last and may set what they like, except what makes the pod a Space: those stay first in
    // `validate`, which refuses their names.
    environment.extend(space.variables.iter().map(|(name, value)| variable(name, value.as_str())));
    let secrets = space.secrets.iter().map(|secret| EnvFromSource {
        secret_ref: Some(SecretEnvSource { name: secret.clone(), optional: Some(false) }),
        ..EnvFromSource::default()
    });
    let mut limits = resources("100m", "256Mi", &space.cpu, &space.memory);
    if space.zero_gpu
        && let Some(limits) = &mut limits.limits
    {
        limits.insert(SEAT_RESOURCE.to_owned(), Quantity("1".to_owned()));
    }
    let probe = |period, failures| Probe {
        http_get: Some(HTTPGetAction {
            path: Some("/".to_owned()),
            port: IntOrString::String("http".to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        failure_threshold: Some(failures),
        timeout_seconds: Some(5),
        ..Probe::default()
    };
    let mut mounts =
        vec![mount("home", HOME, false), mount("environment", ENVIRONMENT_FOLDER, true), mount("tmp", "/tmp", false)];
    if ca {
        mounts.push(mount("ca", CA_FOLDER, true));
    }
    Container {
        name: CONTAINER_APP.to_owned(),
        image: Some(settings.python_image.clone()),
        image_pull_policy: Some(settings.image_pull_policy.clone()),
        command: Some(vec!["/usr/bin/python3".to_owned(), PREPARE.to_owned(), "run".to_owned()]),
        env: Some(environment),
        env_from: Some(secrets.collect()),
        ports: Some(vec![ContainerPort {
            name: Some("http".to_owned()),
            container_port: space.port,
            ..ContainerPort::default()
        }]),
        // Until the first answer the app may take its start limit; afterwards a busy app is slow, not dead, so there is no
        // liveness probe.
        startup_probe: Some(probe(1, space.startup_timeout_seconds.max(1))),
        readiness_probe: Some(probe(5, 6)),
        volume_mounts: Some(mounts),
        resources: Some(limits),
        security_context: Some(restricted()),
        ..Container::default()
    }
}
