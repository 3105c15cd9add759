//! The state file's types: what the cards are and what is happening to them.
//!
//! Every field may be left out of the file; what stands in its place is the H200 of [`Card::h200`] with index 0. A
//! field that nobody knows is an error, so a slip of the pen does not pass for a healthy card.

use serde::{Deserialize, Serialize};

use crate::catalog;

/// How many events a card keeps. Sets are read within milliseconds of an event; older ones only make the file grow.
const EVENTS_MAX: usize = 64;
/// NVML's and the kernel's limit on GPUs of one machine.
const CARDS_MAX: usize = 32;

/// Everything the stand-in knows: the whole state file.
///
/// Where no file exists, the library behaves as if it held `State::h200(1)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct State {
    /// False: `nvmlInit` answers that no driver is loaded.
    pub driver_loaded: bool,
    /// The driver's version, as `nvidia-smi` prints it.
    pub driver_version: String,
    /// NVML's own version: CUDA's major number before the driver's version.
    pub nvml_version: String,
    /// The CUDA version of the driver: major times 1000 plus minor times 10.
    pub cuda_driver_version: i32,
    /// The cards, in the order of their NVML index.
    pub cards: Vec<Card>,
}

impl State {
    /// A node with `count` H200 cards, nothing running on them.
    pub fn h200(count: u32) -> Self {
        Self { cards: (0..count).map(Card::h200).collect(), ..Self::default() }
    }

    /// What is wrong with this state, if anything: an index that is not the card's place in the list, an identity
    /// that two cards share, or a MIG profile without a place.
    pub(crate) fn fault(&self) -> Option<String> {
        if self.cards.len() > CARDS_MAX {
            return Some(format!("{} cards; at most {CARDS_MAX} are possible", self.cards.len()));
        }
        for (place, card) in self.cards.iter().enumerate() {
            if card.index as usize != place {
                return Some(format!("the card at place {place} has index {}", card.index));
            }
            if self.cards[..place].iter().any(|other| other.uuid == card.uuid || other.minor == card.minor) {
                return Some(format!("card {place} shares its uuid or minor number with an earlier card"));
            }
            if let Some(profile) = card.mig.profiles.iter().find(|p| !matches!(p.placement_size, 1 | 2 | 4 | 8)) {
                return Some(format!("MIG profile {} has placement_size {}", profile.name, profile.placement_size));
            }
        }
        None
    }
}

impl Default for State {
    fn default() -> Self {
        Self {
            driver_loaded: true,
            driver_version: "580.95.05".into(),
            nvml_version: "13.580.95.05".into(),
            cuda_driver_version: 13_000,
            cards: vec![Card::h200(0)],
        }
    }
}

/// One card.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Card {
    /// NVML's index; must be the card's place in [`State::cards`].
    pub index: u32,
    /// The minor number of its device node: `/dev/nvidia<minor>`.
    pub minor: u32,
    /// `GPU-` and a UUID. Handles follow it; a card that goes from the file is a lost card to those who hold one.
    pub uuid: String,
    /// The product name.
    pub name: String,
    /// The board's serial number.
    pub serial: String,
    /// Its PCI address: the domain,
    pub pci_domain: u32,
    /// the bus,
    pub pci_bus: u32,
    /// and the device on it.
    pub pci_device: u32,
    /// Device id in the upper half, vendor id in the lower.
    pub pci_device_id: u32,
    /// Subsystem id in the upper half, its vendor's id in the lower.
    pub pci_sub_system_id: u32,
    /// CUDA compute capability, major and minor.
    pub compute_capability: (i32, i32),
    /// All of its memory, the driver's part included.
    pub memory_total_bytes: u64,
    /// What the driver keeps for itself.
    pub memory_reserved_bytes: u64,
    /// Processes that use the card. One whose pid is gone, or a zombie, is not reported. More can be announced in
    /// files beside the state file, see [`crate::process_file`].
    pub processes: Vec<Process>,
    /// Temperature of the chip.
    pub temperature_celsius: u32,
    /// What the board draws.
    pub power_usage_milliwatts: u32,
    /// What it may draw.
    pub power_limit_milliwatts: u32,
    /// Error counters of the memory.
    pub ecc: Ecc,
    /// Memory rows taken out of use.
    pub remapped_rows: RemappedRows,
    /// What the driver says must be done with the card.
    pub recovery_action: RecoveryAction,
    /// What happened to the card. Each event set gets each event once, if it was registered before.
    #[serde(alias = "xid_events")]
    pub events: Vec<Event>,
    /// While true, every call about this card blocks.
    pub hang: bool,
    /// While true, every call about this card answers GPU_IS_LOST.
    pub lost: bool,
    /// Names of calls, such as `nvmlDeviceGetTotalEccErrors`, that answer NOT_SUPPORTED on this card.
    pub unsupported_calls: Vec<String>,
    /// Multi-instance GPU: profiles and instances.
    pub mig: Mig,
}

impl Card {
    /// Adds an XID error, as if the driver had just reported it.
    pub fn push_xid(&mut self, xid: u64) {
        self.push_event(EventKind::Xid, xid);
    }

    /// Adds an event behind the last one. `data` is the number of an XID error and 0 for other kinds.
    pub fn push_event(&mut self, kind: EventKind, data: u64) {
        let sequence = self.last_sequence() + 1;
        self.events.push(Event { sequence, kind, data, gpu_instance_id: None, compute_instance_id: None });
        let surplus = self.events.len().saturating_sub(EVENTS_MAX);
        self.events.drain(..surplus);
    }

    /// The sequence number of the newest event, 0 before the first.
    pub(crate) fn last_sequence(&self) -> u64 {
        self.events.iter().map(|event| event.sequence).max().unwrap_or(0)
    }
}

impl Default for Card {
    fn default() -> Self {
        Self::h200(0)
    }
}

/// A process with memory on a card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Its pid in the pid namespace of whoever asks NVML: the host's, for the agent.
    pub pid: u32,
    /// Device memory that it holds, in bytes.
    #[serde(default)]
    pub used_bytes: u64,
    /// Its share of the multiprocessors over the last sample, in percent.
    #[serde(default)]
    pub sm_util: u32,
    /// The MIG GPU instance it runs on, if the card is divided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_instance_id: Option<u32>,
    /// The compute instance within it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compute_instance_id: Option<u32>,
}

/// Memory errors that the card counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ecc {
    /// False: the counters answer NOT_SUPPORTED.
    pub enabled: bool,
    /// Corrected errors since the driver was loaded.
    pub volatile_corrected: u64,
    /// Uncorrected errors since the driver was loaded.
    pub volatile_uncorrected: u64,
    /// Corrected errors over the card's life.
    pub aggregate_corrected: u64,
    /// Uncorrected errors over the card's life.
    pub aggregate_uncorrected: u64,
}

impl Default for Ecc {
    fn default() -> Self {
        Self {
            enabled: true,
            volatile_corrected: 0,
            volatile_uncorrected: 0,
            aggregate_corrected: 0,
            aggregate_uncorrected: 0,
        }
    }
}

/// Rows of memory that were replaced by spare ones.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RemappedRows {
    /// Rows remapped for correctable errors.
    pub correctable: u32,
    /// Rows remapped for uncorrectable errors.
    pub uncorrectable: u32,
    /// A row waits for the next reset to be remapped.
    pub pending: bool,
    /// A remapping failed: the card is to be replaced.
    pub failure: bool,
}

/// What the driver says must be done before the card can be trusted again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecoveryAction {
    /// Nothing.
    #[default]
    None,
    /// A reset of the card.
    GpuReset,
    /// A reboot of the node.
    NodeReboot,
    /// Traffic between cards has to be drained.
    DrainP2p,
    /// Work has to be drained, then the card reset.
    DrainAndReset,
}

/// Something that happened to a card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    /// Grows with each event of a card; the first is 1.
    pub sequence: u64,
    /// What happened.
    #[serde(default)]
    pub kind: EventKind,
    /// The number of an XID error; 0 for the other kinds.
    #[serde(default, alias = "xid")]
    pub data: u64,
    /// The GPU instance it happened on, where one is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_instance_id: Option<u32>,
    /// The compute instance within it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compute_instance_id: Option<u32>,
}

/// The kinds of event that the stand-in can deliver.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A critical XID error.
    #[default]
    Xid,
    /// A corrected memory error.
    SingleBitEcc,
    /// An uncorrected memory error.
    DoubleBitEcc,
}

/// Multi-instance GPU on one card.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mig {
    /// Whether the card is in MIG mode. The library never changes it (N17).
    pub enabled: bool,
    /// What the card can be divided into. None at all: a card without MIG.
    pub profiles: Vec<MigProfile>,
    /// The GPU instances there are. Made and destroyed by calls, or by whoever writes the file.
    pub gpu_instances: Vec<GpuInstance>,
}

impl Default for Mig {
    fn default() -> Self {
        Self { enabled: false, profiles: catalog::h200_profiles(), gpu_instances: Vec::new() }
    }
}

/// One GPU-instance profile. Counts are those of one instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigProfile {
    /// Such as `3g.71gb`.
    pub name: String,
    /// NVML's enumerator, one of `NVML_GPU_INSTANCE_PROFILE_*`, by which profile information is asked for.
    pub profile: u32,
    /// The id by which instances are made.
    pub id: u32,
    /// Compute slices.
    pub slices: u32,
    /// How many can exist at once.
    pub instances_max: u32,
    /// Memory, in MiB.
    pub memory_mib: u64,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Copy engines.
    pub copy_engines: u32,
    /// Video decoders.
    pub decoders: u32,
    /// Video encoders.
    pub encoders: u32,
    /// JPEG engines.
    pub jpeg_engines: u32,
    /// Optical flow engines.
    pub optical_flow_engines: u32,
    /// Memory slices that one takes: 1, 2, 4 or 8.
    pub placement_size: u32,
    /// The memory slices at which one can start.
    pub placement_starts: Vec<u32>,
}

/// One GPU instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuInstance {
    /// Its id on the card; it follows from its place.
    pub id: u32,
    /// [`MigProfile::id`] of its profile.
    pub profile_id: u32,
    /// The memory slice at which it starts.
    pub start: u32,
    /// How many memory slices it takes.
    pub size: u32,
    /// What it is divided into. Only a compute instance makes a MIG device.
    #[serde(default)]
    pub compute_instances: Vec<ComputeInstance>,
}

/// One compute instance within a GPU instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ComputeInstance {
    /// Its id within the GPU instance.
    pub id: u32,
    /// The compute slice at which it starts.
    pub start: u32,
    /// How many compute slices it takes.
    pub slices: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_object_is_one_h200() {
        let state: State = serde_json::from_str("{}").unwrap();
        assert_eq!(state, State::h200(1));
        assert_eq!(state.cards[0].memory_total_bytes, 150_754_820_096);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut state = State::h200(3);
        state.cards[2].push_xid(79);
        state.cards[1].processes.push(Process {
            pid: 7,
            used_bytes: 1,
            sm_util: 2,
            gpu_instance_id: Some(1),
            compute_instance_id: None,
        });
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<State>(&text).unwrap(), state);
    }

    #[test]
    fn a_slip_of_the_pen_is_an_error() {
        assert!(serde_json::from_str::<State>(r#"{"cards":[{"hangs":true}]}"#).is_err());
        let twins = State { cards: vec![Card::h200(0), Card { index: 1, ..Card::h200(0) }], ..State::default() };
        assert!(twins.fault().is_some_and(|fault| fault.contains("shares")));
        let misplaced = State { cards: vec![Card::h200(1)], ..State::default() };
        assert!(misplaced.fault().is_some());
    }

    #[test]
    fn a_card_keeps_the_newest_events() {
        let mut card = Card::h200(0);
        for _ in 0..EVENTS_MAX + 5 {
            card.push_xid(31);
        }
        assert_eq!(card.events.len(), EVENTS_MAX);
        assert_eq!(card.last_sequence(), EVENTS_MAX as u64 + 5);
    }
}
