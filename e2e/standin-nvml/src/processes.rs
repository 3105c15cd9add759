//! Which processes are on a card right now.
//!
//! A process is on a card if the state file lists it or a file `processes/<card index>/<pid>` beside the state file
//! announces it, and if it is alive. Such files let processes come and go without anyone rewriting the state.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use crate::{Card, Process, store};

/// The file that announces a process: `<directory of the state file>/processes/<card index>/<pid>`.
///
/// It holds numbers, parted by white space: the used bytes and, optionally, the share of the multiprocessors in
/// percent, the GPU instance and the compute instance.
pub fn process_file(state_path: &Path, card_index: u32, pid: u32) -> PathBuf {
    directory(state_path, card_index).join(pid.to_string())
}

/// Announces that `process` is on a card, or that what it uses has changed.
///
/// # Errors
/// When the file cannot be written.
pub fn announce_process(state_path: &Path, card_index: u32, process: &Process) -> io::Result<()> {
    let directory = directory(state_path, card_index);
    fs::create_dir_all(&directory)?;
    let mut text = format!("{} {}", process.used_bytes, process.sm_util);
    if let Some(gpu_instance) = process.gpu_instance_id {
        text += &format!(" {gpu_instance} {}", process.compute_instance_id.unwrap_or(0));
    }
    store::replace_file(&directory.join(process.pid.to_string()), text.as_bytes())
}

/// Takes the announcement of a process back; that there is none is fine.
///
/// # Errors
/// When the file is there and cannot be removed.
pub fn withdraw_process(state_path: &Path, card_index: u32, pid: u32) -> io::Result<()> {
    match fs::remove_file(process_file(state_path, card_index, pid)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn directory(state_path: &Path, card_index: u32) -> PathBuf {
    state_path.with_file_name("processes").join(card_index.to_string())
}

/// The living processes on a card, in the order of their pids. An announcement wins over the state file.
pub(crate) fn live(state_path: &Path, card: &Card) -> Vec<Process> {
    let listed = card.processes.iter().cloned();
    let all: BTreeMap<u32, Process> =
        listed.chain(announced(state_path, card.index)).map(|process| (process.pid, process)).collect();
    all.into_values().filter(|process| is_alive(process.pid)).collect()
}

/// Files that are not named by a number are the hidden ones of a writer; one that vanishes between listing and
/// reading was withdrawn.
fn announced(state_path: &Path, card_index: u32) -> Vec<Process> {
    let Ok(entries) = fs::read_dir(directory(state_path, card_index)) else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| parse(pid, &fs::read_to_string(process_file(state_path, card_index, pid)).ok()?)).collect()
}

fn parse(pid: u32, text: &str) -> Option<Process> {
    let mut words = text.split_whitespace();
    let used_bytes = words.next()?.parse().ok()?;
    let mut number = || words.next().and_then(|word| word.parse::<u32>().ok());
    let sm_util = number().unwrap_or(0);
    Some(Process { pid, used_bytes, sm_util, gpu_instance_id: number(), compute_instance_id: number() })
}

/// Whether the driver would still count it: a zombie has closed its device files long before it is reaped.
fn is_alive(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The state follows the name, which is in brackets and may itself hold brackets and spaces.
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    !matches!(state, None | Some('Z' | 'X' | 'x'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_have_one_to_four_numbers() {
        let bare = parse(9, "1024\n").unwrap();
        assert_eq!((bare.pid, bare.used_bytes, bare.sm_util, bare.gpu_instance_id), (9, 1024, 0, None));
        let full = parse(9, "1024 50 2 0").unwrap();
        assert_eq!((full.sm_util, full.gpu_instance_id, full.compute_instance_id), (50, Some(2), Some(0)));
        assert_eq!(parse(9, ""), None);
    }

    #[test]
    fn this_process_is_alive() {
        assert!(is_alive(std::process::id()));
        assert!(!is_alive(u32::MAX));
    }
}
