//! Compiles the `.proto` texts into `OUT_DIR`. protox is a compiler in Rust, so no `protoc` has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const FILES: [&str; 4] = [
        "kubelet/deviceplugin/v1beta1/api.proto",
        "kubelet/podresources/v1/api.proto",
        "kubelet/pluginregistration/v1/api.proto",
        "spaceport/nodelink/v1/nodelink.proto",
    ];
    for file in FILES {
        println!("cargo:rerun-if-changed=proto/{file}");
    }
    let descriptors = protox::compile(FILES, ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
