//! Registration with kubelet: one attempt. Who calls it retries (see [`super::plugin`]).

use std::path::{Path, PathBuf};
use std::time::Duration;

use spaceport_proto::kubelet::device_plugin::registration_client::RegistrationClient;
use spaceport_proto::kubelet::device_plugin::{DevicePluginOptions, RegisterRequest, VERSION};
use tonic::transport::Endpoint;

use super::Resource;

/// Kubelet's socket in the device-plugin directory.
pub const KUBELET_SOCKET: &str = "kubelet.sock";

/// Kubelet dials us back before it answers, with a limit of 10 s of its own; its answer is worth waiting for.
const LIMIT: Duration = Duration::from_secs(15);

/// Kubelet did not take the registration.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// Nobody listens.
    #[error("kubelet does not answer at {}", socket.display())]
    Unreachable {
        /// Its socket.
        socket: PathBuf,
        /// Why.
        source: tonic::transport::Error,
    },
    /// It answered with an error.
    #[error("kubelet refuses {}", resource.name())]
    Refused {
        /// What was registered.
        resource: Resource,
        /// Its words.
        source: Box<tonic::Status>,
    },
    /// No answer.
    #[error("kubelet did not answer within {} s", LIMIT.as_secs())]
    TimedOut,
}

/// What kubelet may ask of our plugins.
pub(super) const fn options() -> DevicePluginOptions {
    DevicePluginOptions { pre_start_required: false, get_preferred_allocation_available: true }
}

/// Tells kubelet that `resource` is served at its socket in `directory`. The server must listen already.
///
/// # Errors
/// [`RegisterError`].
pub async fn register(directory: &Path, resource: Resource) -> Result<(), RegisterError> {
    let attempt = async {
        let socket = directory.join(KUBELET_SOCKET);
        let unreachable = |source| RegisterError::Unreachable { socket: socket.clone(), source };
        let channel = Endpoint::from_shared(format!("unix://{}", socket.display())).map_err(unreachable)?;
        let channel = channel.connect().await.map_err(unreachable)?;
        let request = RegisterRequest {
            version: VERSION.to_owned(),
            endpoint: resource.socket().to_owned(),
            resource_name: resource.name().to_owned(),
            options: Some(options()),
        };
        let answer = RegistrationClient::new(channel).register(request).await;
        answer.map(drop).map_err(|source| RegisterError::Refused { resource, source: Box::new(source) })
    };
    tokio::time::timeout(LIMIT, attempt).await.unwrap_or(Err(RegisterError::TimedOut))
}
