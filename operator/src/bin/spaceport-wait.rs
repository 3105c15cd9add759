//! Init container of Space pods: waits until the node agent listens on the pod's own loopback (N14).
//!
//! A Gradio app reports its start to the device API before its port listens, and a refused connection aborts the app; so
//! the app container starts only once the API is there.

use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;

/// Waits until something accepts connections on an address of this pod.
#[derive(Debug, Parser)]
#[command(name = "spaceport-wait", version)]
struct Args {
    /// Address of the device API inside the pod.
    #[arg(long, default_value = "127.0.0.1:7999")]
    address: SocketAddr,
    /// Give up after this many seconds; kubelet restarts the container and shows the message.
    #[arg(long, default_value_t = 120)]
    timeout_seconds: u64,
}

/// Between two tries: the listener appears within milliseconds of the pod's sandbox, and a try costs one loopback packet.
const INTERVAL: Duration = Duration::from_millis(50);

fn main() -> ExitCode {
    let Args { address, timeout_seconds } = Args::parse();
    let limit = Duration::from_secs(timeout_seconds);
    let start = now();
    loop {
        let error = match TcpStream::connect_timeout(&address, Duration::from_secs(1)) {
            Ok(_) => {
                println!("device API answers on {address} after {} ms", now().duration_since(start).as_millis());
                return ExitCode::SUCCESS;
            }
            Err(error) => error,
        };
        if now().duration_since(start) >= limit {
            eprintln!(
                "no device API on {address} after {timeout_seconds} s ({error}). The node agent opens it for each Space pod: \
                 see the logs of DaemonSet spaceport-device-plugin on this node"
            );
            return ExitCode::FAILURE;
        }
        std::thread::sleep(INTERVAL);
    }
}

#[allow(clippy::disallowed_methods)] // This program waits for real time and decides nothing else by it.
fn now() -> Instant {
    Instant::now()
}
