//! The network of the pods: one bridge on this machine, translated to the machine's own address on the way out.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

use super::machine::write_sysctl;
use crate::command::{command, output, run, succeeds};
use crate::workspace::{Workspace, write_atomically};

/// Everything below lies in here. An unusual corner of 10/8; Docker, Podman, kind and k3s take others. `up` refuses
/// if the machine routes part of it.
pub const RANGE: &str = "10.213.0.0/16";
/// Addresses of pods; the first is the bridge's.
pub const PODS: &str = "10.213.0.0/20";
/// Addresses of Services.
pub const SERVICES: &str = "10.213.128.0/20";
/// The bridge's address, which is also the node's, the API server's and kubelet's: it is no loopback address, pods
/// reach it, and the world outside this machine does not. Every port of the cluster is on it and not on the loopback
/// address, which is shared with everything else on the machine.
pub const BRIDGE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 1);
/// The Service `kubernetes`: the first address of the range.
pub const API_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 213, 128, 1);
/// The bridge's name.
pub const BRIDGE: &str = "spaceport0";
/// Our nft table, and the comment on our iptables rules.
pub const TABLE: &str = "spaceport-local";
/// The name of the CNI network, by which its cached results are found again.
pub const CNI_NETWORK: &str = "spaceport-local";

/// Makes the bridge, routes, address translation and the CNI configuration. Does nothing twice.
pub fn ensure(workspace: &Workspace) -> Result<()> {
    let mtu = uplink_mtu()?;
    if !succeeds(&mut command("ip", &["link", "show", BRIDGE])) {
        run(&mut command("ip", &["link", "add", BRIDGE, "type", "bridge"]))?;
    }
    // Without this the first pod would change the bridge's address and drop every neighbour entry.
    run(&mut command("ip", &["link", "set", BRIDGE, "mtu", &mtu, "up"]))?;
    run(&mut command("ip", &["address", "replace", &format!("{BRIDGE_ADDRESS}/20"), "dev", BRIDGE]))?;
    // A packet to a Service that kube-proxy has not translated (yet) ends here and does not leave the machine.
    run(&mut command("ip", &["route", "replace", SERVICES, "dev", BRIDGE]))?;
    write_sysctl("net/ipv4/ip_forward", "1")?;
    let rules = format!(
        "add table ip {TABLE}; delete table ip {TABLE}; table ip {TABLE} {{ chain postrouting {{ \
         type nat hook postrouting priority srcnat; ip saddr {PODS} ip daddr != {RANGE} masquerade; }}; }}"
    );
    run(&mut command("nft", &[&rules])).context("cannot set up address translation for pods")?;
    accept_forwarding()?;
    write_cni(workspace, &mtu)
}

/// Docker and ufw set the policy of FORWARD to DROP, which no other table can overrule: then two rules let pods out.
fn accept_forwarding() -> Result<()> {
    let Ok(rules) = output(&mut command("iptables", &["-S", "FORWARD"])) else {
        // No iptables on this machine, so no such policy.
        return Ok(());
    };
    if !rules.lines().any(|line| line == "-P FORWARD DROP") {
        return Ok(());
    }
    for direction in ["-i", "-o"] {
        let rule = ["FORWARD", direction, BRIDGE, "-m", "comment", "--comment", TABLE, "-j", "ACCEPT"];
        if !succeeds(command("iptables", &["-C"]).args(rule)) {
            run(command("iptables", &["-I"]).args(rule))?;
        }
    }
    Ok(())
}

/// Removes those two rules again; the rules that were removed.
pub fn withdraw_forwarding() -> Result<Vec<String>> {
    let Ok(rules) = output(&mut command("iptables", &["-S", "FORWARD"])) else { return Ok(Vec::new()) };
    let ours: Vec<String> = rules.lines().filter(|line| line.contains(TABLE)).map(str::to_owned).collect();
    for rule in &ours {
        run(command("iptables", &["-D"]).args(rule.split(' ').skip(1))).context("cannot remove an iptables rule")?;
    }
    Ok(ours)
}

/// The MTU of the interface that leads out: pods with a larger one would depend on path MTU discovery.
fn uplink_mtu() -> Result<String> {
    let routes = output(&mut command("ip", &["-4", "route", "show", "default"]))?;
    let interface = routes.split_whitespace().skip_while(|word| *word != "dev").nth(1);
    let mtu = interface.and_then(|name| fs::read_to_string(Path::new("/sys/class/net").join(name).join("mtu")).ok());
    // A machine without a way out has nothing to fit: Ethernet's 1500.
    Ok(mtu.map_or_else(|| "1500".to_owned(), |text| text.trim().to_owned()))
}

fn write_cni(workspace: &Workspace, mtu: &str) -> Result<()> {
    let mtu: u32 = mtu.parse().context("an MTU is a number")?;
    let list = json!({
        "cniVersion": "1.0.0",
        "name": CNI_NETWORK,
        "plugins": [{
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": true,
            "hairpinMode": true,
            "mtu": mtu,
            "ipam": {
                "type": "host-local",
                "dataDir": workspace.short_text("cni/addresses"),
                "ranges": [[{ "subnet": PODS, "gateway": BRIDGE_ADDRESS.to_string() }]],
                "routes": [{ "dst": "0.0.0.0/0" }],
            },
        }],
    });
    let path = workspace.local.join("cni/net.d/10-spaceport.conflist");
    write_atomically(&path, &serde_json::to_vec_pretty(&list)?)
}
