//! gRPC interfaces: those of kubelet that the node agent speaks, and `nodelink` between agent and broker.
//!
//! The `.proto` texts under `proto/` are ours; for kubelet they follow kubelet's names and field numbers. The code is
//! generated at build time and stays out of the repository.
#![allow(missing_docs)] // Generated code; the .proto texts carry the docs.
#![allow(clippy::all)] // Generated code.

/// Interfaces of kubelet.
pub mod kubelet {
    /// Device plugin v1beta1: registration and the plugin itself.
    pub mod device_plugin {
        tonic::include_proto!("v1beta1");
        /// Version string of the interface in `RegisterRequest.version`.
        pub const VERSION: &str = "v1beta1";
        /// `Device.health` of a usable device.
        pub const HEALTHY: &str = "Healthy";
        /// `Device.health` of a device that must not be given out.
        pub const UNHEALTHY: &str = "Unhealthy";
    }
    /// Pod-resources v1: which pod holds which device.
    pub mod pod_resources {
        tonic::include_proto!("v1");
    }
    /// Plugin-watcher registration v1.
    pub mod plugin_registration {
        tonic::include_proto!("pluginregistration");
    }
}

/// The link between node agent and lease broker.
pub mod nodelink {
    tonic::include_proto!("spaceport.nodelink.v1");
}
