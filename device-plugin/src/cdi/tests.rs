use std::fs;
use std::os::unix::fs::symlink;

use super::*;
use crate::inventory::tests::h200;

fn directory(test: &str) -> PathBuf {
    let directory = std::env::temp_dir().join(format!("spaceport-cdi-{test}-{}", std::process::id()));
    drop(fs::remove_dir_all(&directory));
    fs::create_dir_all(&directory).unwrap();
    directory
}

fn elf(path: &Path, class: u8, machine: u16) {
    let mut head = [0; 64];
    head[..4].copy_from_slice(b"\x7fELF");
    head[4] = class;
    head[18..20].copy_from_slice(&machine.to_le_bytes());
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, head).unwrap();
}

fn native() -> u16 {
    if cfg!(target_arch = "x86_64") { 62 } else { 183 }
}

fn shown(libraries: &[Library]) -> Vec<(&str, &str)> {
    libraries.iter().map(|library| (library.soname.as_str(), library.host_path.to_str().unwrap())).collect()
}

#[test]
fn a_machine_without_a_driver_has_a_spec_that_runtimes_accept() {
    let cards = CdiCards { time_shared: vec![h200(0)], dedicated: vec![h200(1)] };
    let spec = spec(&cards, &DeviceNodes::new("/nonexistent".into()), &[]).unwrap();
    // Golden: a device without any edit would be refused by runtimes.
    assert_eq!(
        serde_json::to_value(spec).unwrap(),
        serde_json::json!({
            "cdiVersion": "0.6.0",
            "kind": "spaceport.dev/gpu",
            "devices": [
                { "name": "seat", "containerEdits": { "env": ["NVIDIA_VISIBLE_DEVICES=void"] } },
                { "name": "card-1", "containerEdits": { "env": ["NVIDIA_VISIBLE_DEVICES=void"] } },
            ],
            "containerEdits": {},
        })
    );
    assert_eq!(
        (seat_device().as_str(), card_device(1).as_str()),
        ("spaceport.dev/gpu=seat", "spaceport.dev/gpu=card-1")
    );
}

#[test]
fn a_seat_carries_every_shared_card_and_a_dedicated_device_its_own_only() {
    // Real character devices, under the driver's names: links to devices that every machine has.
    let dev = directory("dev");
    for (name, target) in
        [("nvidiactl", "/dev/null"), ("nvidia-uvm", "/dev/zero"), ("nvidia0", "/dev/full"), ("nvidia1", "/dev/random")]
    {
        symlink(target, dev.join(name)).unwrap();
    }
    fs::write(dev.join("nvidia2"), "").unwrap();
    let cards = CdiCards { time_shared: vec![h200(0), h200(2)], dedicated: vec![h200(1)] };
    let libraries = [Library { soname: "libcuda.so.1".to_owned(), host_path: "/usr/lib/libcuda.so.580.95.05".into() }];
    let value = serde_json::to_value(spec(&cards, &DeviceNodes::new(dev.clone()), &libraries).unwrap()).unwrap();
    let node = |name: &str, minor: u32| {
        serde_json::json!(
            { "path": format!("/dev/{name}"), "type": "c", "major": 1, "minor": minor, "permissions": "rw" }
        )
    };
    let mount = |directory: &str| {
        serde_json::json!({
            "hostPath": "/usr/lib/libcuda.so.580.95.05",
            "containerPath": format!("{directory}/libcuda.so.1"),
            "options": ["ro", "nosuid", "nodev", "bind"],
        })
    };
    let multiarch = driver_libraries::MULTIARCH_DIRECTORY;
    assert_eq!(
        value,
        serde_json::json!({
            "cdiVersion": "0.6.0",
            "kind": "spaceport.dev/gpu",
            "devices": [
                { "name": "seat", "containerEdits": {
                    "env": ["NVIDIA_VISIBLE_DEVICES=void"],
                    "deviceNodes": [node("nvidiactl", 3), node("nvidia-uvm", 5), node("nvidia0", 7)],
                } },
                { "name": "card-1", "containerEdits": {
                    "env": ["NVIDIA_VISIBLE_DEVICES=void"],
                    "deviceNodes": [node("nvidiactl", 3), node("nvidia-uvm", 5), node("nvidia1", 8)],
                } },
            ],
            "containerEdits": {
                "env": [format!("TRITON_LIBCUDA_PATH={multiarch}")],
                "mounts": [mount(multiarch), mount("/usr/lib64")],
            },
        })
    );
    fs::remove_dir_all(dev).unwrap();
}

#[test]
fn the_file_is_written_only_when_it_differs_and_removed_for_good() {
    let directory = directory("file").join("run/cdi");
    let file = CdiFile::new(&directory);
    let nodes = DeviceNodes::new("/nonexistent".into());
    let first = spec(&CdiCards::default(), &nodes, &[]).unwrap();
    let second = spec(&CdiCards { time_shared: Vec::new(), dedicated: vec![h200(0)] }, &nodes, &[]).unwrap();
    assert!(file.write(&first).unwrap());
    assert!(!file.write(&first).unwrap());
    assert!(file.write(&second).unwrap());
    assert_eq!(fs::read(file.path()).unwrap().last(), Some(&b'\n'));
    // Nothing else is left that a runtime would read.
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
    file.remove().unwrap();
    file.remove().unwrap();
    assert!(file.write(&second).unwrap());
    fs::remove_dir_all(directory.parent().unwrap().parent().unwrap()).unwrap();
}

#[test]
fn libraries_are_found_in_the_drivers_own_root_as_the_loader_would() {
    let here = directory("libraries");
    let root = DriverRoot { on_host: "/run/nvidia/driver".into(), here: here.clone() };
    assert_eq!(root.libraries().unwrap(), []);
    fs::create_dir_all(here.join("etc/ld.so.conf.d")).unwrap();
    fs::write(here.join("etc/ld.so.conf"), "# all\ninclude /etc/ld.so.conf.d/*.conf\n").unwrap();
    fs::write(here.join("etc/ld.so.conf.d/10-i386.conf"), "/usr/lib/i386\n").unwrap();
    fs::write(here.join("etc/ld.so.conf.d/20-nvidia.conf"), "/opt/nvidia/lib # here\n").unwrap();
    // A 32-bit library of the same name comes first on the path and must be passed over.
    elf(&here.join("usr/lib/i386/libcuda.so.1"), 1, 3);
    elf(&here.join("opt/nvidia/lib/libcuda.so.580.95.05"), 2, native());
    symlink("libcuda.so.580.95.05", here.join("opt/nvidia/lib/libcuda.so.1")).unwrap();
    // An absolute link is one inside the driver's root, not on the machine.
    elf(&here.join("data/libnvidia-ml.so.580.95.05"), 2, native());
    fs::create_dir_all(here.join("usr/lib64")).unwrap();
    symlink("/data/libnvidia-ml.so.580.95.05", here.join("usr/lib64/libnvidia-ml.so.1")).unwrap();
    elf(&here.join("usr/lib64/libnvidia-gpucomp.so.580.95.05"), 2, native());
    // Links that lead nowhere, in a circle, or to a text.
    symlink("/nowhere", here.join("usr/lib64/libnvidia-cfg.so.1")).unwrap();
    symlink("libnvidia-nvvm.so.4", here.join("usr/lib64/libnvidia-nvvm.so.4")).unwrap();
    fs::write(here.join("usr/lib64/libnvidia-opencl.so.1"), "INPUT(nothing)").unwrap();
    assert_eq!(
        shown(&root.libraries().unwrap()),
        [
            ("libcuda.so.1", "/run/nvidia/driver/opt/nvidia/lib/libcuda.so.580.95.05"),
            ("libnvidia-gpucomp.so.580.95.05", "/run/nvidia/driver/usr/lib64/libnvidia-gpucomp.so.580.95.05"),
            ("libnvidia-ml.so.1", "/run/nvidia/driver/data/libnvidia-ml.so.580.95.05"),
        ]
    );
    // This process loads the same file by the path at which it sees the root.
    assert_eq!(root.library_here("libnvidia-ml.so.1"), Some(here.join("data/libnvidia-ml.so.580.95.05")));
    assert_eq!(root.library_here("libnvidia-cfg.so.1"), None);
    fs::remove_dir_all(here).unwrap();
}
