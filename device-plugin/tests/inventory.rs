//! The inventory through a real library behind NVML's own C interface: the stand-in of `e2e/`.

// The lint's exception for tests covers test functions only, and here even the helpers are test code.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use spaceport_device_plugin::inventory::{
    Health, InventoryError, LibraryState, NodeInventory, NvmlHandle, NvmlLimits, NvmlSettings, nvml,
};
use standin_nvml::{Process, STATE_PATH_VARIABLE, State, announce_process};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A call that does return takes microseconds; this is for a machine that is busy with builds.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs `story` in a process of its own: a loaded library has one state file, and it learns its path from the
/// environment, which must not change under running threads.
fn alone<F: Future<Output = ()>>(test: &str, state: &State, story: impl FnOnce(PathBuf) -> F) {
    #[allow(clippy::disallowed_methods, reason = "the library under test is told its state file this way")]
    if let Some(path) = std::env::var_os(STATE_PATH_VARIABLE) {
        let path = PathBuf::from(path);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(story(path.clone()));
        fs::write(path.with_file_name("done"), "").unwrap();
        // Not by returning: a thread may be stuck in the library for good.
        std::process::exit(0);
    }
    let directory = std::env::temp_dir().join(format!("sp-inventory-{test}-{}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let path = directory.join("state.json");
    state.save(&path).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args([test, "--exact", "--nocapture"]).env(STATE_PATH_VARIABLE, &path).output().unwrap();
    let told = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let done = output.status.success() && directory.join("done").exists();
    assert!(done, "{test}\n{}\n{}", told(&output.stdout), told(&output.stderr));
    fs::remove_dir_all(&directory).unwrap();
}

/// Cargo puts the library beside the test, in `deps`, or one folder up.
fn library() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let mut places = test.ancestors().skip(1).take(2).map(|folder| folder.join("libstandin_nvml.so"));
    places.find(|path| path.exists()).expect("libstandin_nvml.so is built with this test")
}

struct Agent {
    nvml: NvmlHandle,
    inventory: watch::Receiver<Arc<NodeInventory>>,
}

impl Agent {
    fn start(library: &Path) -> Self {
        let limits = NvmlLimits {
            call: Duration::from_millis(500),
            library_call: Duration::from_secs(10),
            answer: Duration::from_secs(5),
            refresh: Duration::from_millis(100),
        };
        let (nvml, supervisor) = nvml(NvmlSettings { library: library.to_owned(), driver: None, limits });
        tokio::spawn(supervisor.run(CancellationToken::new()));
        Self { inventory: nvml.inventory(), nvml }
    }

    async fn until(&mut self, what: &str, holds: impl Fn(&NodeInventory) -> bool) -> NodeInventory {
        match tokio::time::timeout(PATIENCE, self.inventory.wait_for(|inventory| holds(inventory))).await {
            Ok(inventory) => NodeInventory::clone(&inventory.unwrap()),
            Err(_) => panic!("it never came to: {what}"),
        }
    }

    async fn with_cards(&mut self, count: usize) -> NodeInventory {
        self.until("all cards healthy", |inventory| {
            inventory.cards.len() == count && inventory.cards.iter().all(|card| card.health.is_healthy())
        })
        .await
    }
}

fn worker() -> Child {
    Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap()
}

fn healths(inventory: &NodeInventory) -> Vec<bool> {
    inventory.cards.iter().map(|card| card.health.is_healthy()).collect()
}

#[test]
fn cards_versions_and_processes_are_as_the_library_says() {
    alone("cards_versions_and_processes_are_as_the_library_says", &State::h200(2), |path| async move {
        let mut agent = Agent::start(&library());
        let inventory = agent.with_cards(2).await;
        assert_eq!(inventory.library, LibraryState::Loaded);
        assert_eq!(inventory.driver_version.as_deref(), Some("580.95.05"));
        assert_eq!(inventory.cuda_version.as_deref(), Some("13.0"));
        assert_eq!(inventory.missing, Vec::<String>::new());
        let card = &inventory.cards[1];
        assert_eq!((card.index, card.minor, card.memory_total_bytes), (1, 1, 150_754_820_096));
        assert_eq!((card.model.as_str(), card.compute_capability.as_deref()), ("NVIDIA H200", Some("9.0")));
        assert!(card.uuid.starts_with("GPU-") && !card.mig_enabled);

        assert_eq!(agent.nvml.processes(1).await.unwrap(), []);
        assert_eq!(agent.nvml.utilisation(1, &[1], 0).await.unwrap(), 0);
        let (mut busy, mut idle) = (worker(), worker());
        for (child, used_bytes, sm_util) in [(&busy, 3 << 30, 40), (&idle, 1 << 20, 0)] {
            let process =
                Process { pid: child.id(), used_bytes, sm_util, gpu_instance_id: None, compute_instance_id: None };
            announce_process(&path, 1, &process).unwrap();
        }
        let mut found: Vec<_> = agent.nvml.processes(1).await.unwrap().iter().map(|p| (p.pid, p.used_bytes)).collect();
        found.sort_unstable();
        let mut expected = vec![(busy.id(), Some(3 << 30)), (idle.id(), Some(1 << 20))];
        expected.sort_unstable();
        assert_eq!(found, expected);
        assert_eq!(agent.nvml.utilisation(1, &[busy.id(), idle.id()], 0).await.unwrap(), 40);
        assert_eq!(agent.nvml.utilisation(1, &[idle.id()], 0).await.unwrap(), 0);
        assert_eq!(agent.nvml.utilisation(1, &[busy.id()], u64::MAX).await.unwrap(), 0);
        let (nvml, pid) = (agent.nvml.clone(), idle.id());
        let blocking = tokio::task::spawn_blocking(move || nvml.utilisation_blocking(1, &[pid], 0));
        assert_eq!(blocking.await.unwrap().unwrap(), 0);
        assert!(matches!(agent.nvml.processes(7).await, Err(InventoryError::UnknownCard { card: 7 })));
        for child in [&mut busy, &mut idle] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(agent.nvml.processes(1).await.unwrap(), []);
    });
}

#[test]
fn a_hung_card_is_unmonitored_and_the_others_are_watched_on() {
    alone("a_hung_card_is_unmonitored_and_the_others_are_watched_on", &State::h200(2), |path| async move {
        let mut agent = Agent::start(&library());
        agent.with_cards(2).await;
        State::update(&path, |state| state.cards[0].hang = true).unwrap();
        let inventory = agent.until("card 0 unmonitored", |inventory| healths(inventory) == [false, true]).await;
        let Health::Unmonitored { reason } = &inventory.cards[0].health else { panic!("{inventory:?}") };
        assert!(reason.ends_with("has not returned for more than its limit"), "{reason}");
        // The hung card is refused at once, the other is answered, and its news still come.
        assert!(matches!(agent.nvml.processes(0).await, Err(InventoryError::Unmonitored { card: 0, .. })));
        assert_eq!(agent.nvml.processes(1).await.unwrap(), []);
        State::update(&path, |state| state.cards[1].lost = true).unwrap();
        let inventory = agent.until("card 1 lost", |inventory| healths(inventory) == [false, false]).await;
        assert!(matches!(inventory.cards[1].health, Health::Lost { .. }), "{inventory:?}");
        // Both come back.
        State::update(&path, |state| {
            state.cards[0].hang = false;
            state.cards[1].lost = false;
        })
        .unwrap();
        agent.with_cards(2).await;
        assert_eq!(agent.nvml.processes(0).await.unwrap(), []);
    });
}

#[test]
fn cards_that_hang_one_after_the_other_are_all_given_up_and_the_agent_lives() {
    alone(
        "cards_that_hang_one_after_the_other_are_all_given_up_and_the_agent_lives",
        &State::h200(3),
        |path| async move {
            let mut agent = Agent::start(&library());
            agent.with_cards(3).await;
            for card in 0..3 {
                State::update(&path, |state| state.cards[card].hang = true).unwrap();
                agent.until("one more hung", |inventory| !inventory.cards[card].health.is_healthy()).await;
            }
            assert!(matches!(agent.nvml.processes(2).await, Err(InventoryError::Unmonitored { .. })));
            State::update(&path, |state| state.cards.iter_mut().for_each(|card| card.hang = false)).unwrap();
            agent.with_cards(3).await;
        },
    );
}

#[test]
fn a_card_that_falls_off_the_bus_is_lost_and_the_others_keep_their_index() {
    alone(
        "a_card_that_falls_off_the_bus_is_lost_and_the_others_keep_their_index",
        &State::h200(2),
        |path| async move {
            let mut agent = Agent::start(&library());
            let before = agent.with_cards(2).await;
            State::update(&path, |state| {
                state.cards.remove(0);
                state.cards[0].index = 0;
            })
            .unwrap();
            let inventory = agent.until("card 0 lost", |inventory| healths(inventory) == [false, true]).await;
            assert!(matches!(inventory.cards[0].health, Health::Lost { .. }));
            assert_eq!((inventory.cards[1].index, inventory.cards[1].nvml_index), (1, 0));
            assert_eq!(inventory.cards[1].uuid, before.cards[1].uuid);
            assert_eq!(agent.nvml.processes(1).await.unwrap(), []);
        },
    );
}

#[test]
fn what_the_library_lacks_is_said_and_the_rest_works() {
    let mut state = State::h200(1);
    state.cards[0].unsupported_calls = vec!["nvmlDeviceGetCudaComputeCapability".to_owned()];
    alone("what_the_library_lacks_is_said_and_the_rest_works", &state, |_| async move {
        let mut agent = Agent::start(&library());
        let inventory = agent.with_cards(1).await;
        assert_eq!(inventory.cards[0].compute_capability, None);
        let [missing] = inventory.missing.as_slice() else { panic!("{:?}", inventory.missing) };
        assert!(missing.starts_with("nvmlDeviceGetCudaComputeCapability on card 0"), "{missing}");
    });
}

#[test]
fn without_a_driver_the_agent_says_so_and_goes_on_when_it_comes() {
    let state = State { driver_loaded: false, ..State::h200(1) };
    alone("without_a_driver_the_agent_says_so_and_goes_on_when_it_comes", &state, |path| async move {
        let mut agent = Agent::start(&library());
        let unavailable = |inventory: &NodeInventory| matches!(inventory.library, LibraryState::Unavailable { .. });
        agent.until("no driver", unavailable).await;
        assert!(matches!(agent.nvml.processes(0).await, Err(InventoryError::LibraryUnavailable { .. })));
        State::update(&path, |state| state.driver_loaded = true).unwrap();
        agent.with_cards(1).await;

        // A library that is not there at all.
        let mut elsewhere = Agent::start(Path::new("/nonexistent/libnvidia-ml.so.1"));
        let inventory = elsewhere.until("no library", unavailable).await;
        let LibraryState::Unavailable { reason } = inventory.library else { panic!() };
        assert!(reason.starts_with("/nonexistent/libnvidia-ml.so.1 cannot be used"), "{reason}");
    });
}

#[test]
fn a_node_without_a_card_has_an_empty_inventory() {
    alone("a_node_without_a_card_has_an_empty_inventory", &State::h200(0), |_| async move {
        let mut agent = Agent::start(&library());
        let inventory = agent.until("loaded", |inventory| inventory.library == LibraryState::Loaded).await;
        assert_eq!(inventory.cards, []);
    });
}
