//! What `/proc/<pid>/status` says about who forked a process and which signals wait for it.

use std::fs;

/// A set of signals, as the kernel prints it: bit `n - 1` is signal `n`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SignalSet(u64);

impl SignalSet {
    /// The signals by which a process is asked to end and which it may handle first. SIGKILL is not among them: it ends a
    /// process in a frozen cgroup by itself, as do these where it has no handler (SIGQUIT, which dumps core, does not).
    pub const ASK_TO_END: Self = Self::of(&[libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM]);

    /// Of these signal numbers, each from 1 to 64.
    pub const fn of(signals: &[libc::c_int]) -> Self {
        let (mut bits, mut at) = (0, 0);
        while at < signals.len() {
            bits |= 1 << (signals[at] - 1);
            at += 1;
        }
        Self(bits)
    }

    /// In either.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// In both.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// In this one and not in the other.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The lowest signal number in it.
    pub fn first(self) -> Option<u32> {
        (self.0 != 0).then(|| self.0.trailing_zeros() + 1)
    }
}

/// A process at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessStatus {
    /// Pid of its parent, as the host counts. When the parent ends, the kernel gives the child to another one.
    pub parent: u32,
    /// Sent and not yet acted on: to its first thread, or to the process as a whole.
    pub pending: SignalSet,
    /// Without effect on it.
    pub ignored: SignalSet,
}

impl ProcessStatus {
    /// Reads it. `None` if there is no such process. The pid may have passed to another one: hold it while this is called.
    pub fn read(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
    }

    fn parse(status: &str) -> Option<Self> {
        // The name of a process is printed escaped, in one line, so no line can be forged.
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let signals = |name: &str| u64::from_str_radix(field(name)?, 16).ok().map(SignalSet);
        Some(Self {
            parent: field("PPid:")?.parse().ok()?,
            pending: signals("SigPnd:")?.union(signals("ShdPnd:")?),
            ignored: signals("SigIgn:")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of a frozen Python worker with a handler for SIGTERM, which it was sent; SIGPIPE is ignored.
    const FROZEN: &str = "Name:\tpython3\nState:\tS (sleeping)\nTgid:\t4711\nPid:\t4711\nPPid:\t4700\nTracerPid:\t0\n\
        SigQ:\t1/63432\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000004000\nSigBlk:\t0000000000000000\n\
        SigIgn:\t0000000001001000\nSigCgt:\t0000000100004002\n";

    #[test]
    fn parent_and_signals_are_read_from_the_kernels_lines() {
        let status = ProcessStatus::parse(FROZEN).unwrap();
        assert_eq!(status.parent, 4_700);
        assert_eq!(status.pending, SignalSet::of(&[libc::SIGTERM]));
        assert_eq!(status.ignored, SignalSet::of(&[libc::SIGPIPE, libc::SIGXFSZ]));
    }

    #[test]
    fn a_signal_to_the_thread_counts_as_one_to_the_process() {
        let text = FROZEN.replace("SigPnd:\t0000000000000000", "SigPnd:\t0000000000000002");
        let pending = ProcessStatus::parse(&text).unwrap().pending;
        assert_eq!(pending, SignalSet::of(&[libc::SIGINT, libc::SIGTERM]));
        assert_eq!(pending.without(SignalSet::of(&[libc::SIGINT])).first(), Some(15));
    }

    #[test]
    fn what_lacks_a_line_or_has_a_name_like_one_is_not_guessed_at() {
        for line in ["PPid:", "SigPnd:", "ShdPnd:", "SigIgn:"] {
            assert_eq!(ProcessStatus::parse(&FROZEN.replace(line, "X:")), None, "{line}");
        }
        let named = FROZEN.replace("python3", "PPid:\\n1");
        assert_eq!(ProcessStatus::parse(&named), ProcessStatus::parse(FROZEN));
    }

    #[test]
    fn this_process_has_its_parent() {
        let status = ProcessStatus::read(std::process::id()).unwrap();
        assert_eq!(status.parent, std::os::unix::process::parent_id());
        assert_eq!(ProcessStatus::read(u32::MAX), None);
    }
}
