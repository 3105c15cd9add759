//! The gate's program text: default deny for the NVIDIA majors, driven by two maps (N8).
//!
//! In words:
//! ```text
//! not a character device, or its major is not gated      -> allow
//! only mknod is asked                                    -> allow
//! (current cgroup id, major, minor) is in `allow`        -> note the time of the first, count it, allow
//! an ancestor of the current cgroup is in `exempt`       -> allow
//! otherwise                                              -> deny (EPERM)
//! ```
//! mknod is let through because a node is no access: whoever opens it, here or elsewhere in the pod, comes by this program
//! again. Denying it would only push container runtimes onto their fall-back of bind-mounting the host's node of the
//! same path, which does not exist where the driver lives under its own root (`driverRoot`).
//!
//! The time of the first open is stored before it is counted. If two opens are the first at once, the later of the two may
//! stay, which is nanoseconds off.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Major number of `/dev/nvidia*` and `/dev/nvidiactl`, fixed by the driver.
pub const NVIDIA_MAJOR: u32 = 195;

/// Levels of the cgroup tree searched for an exempt ancestor. `kubepods/<qos>/<pod>/<container>` is 4; nested runtimes put
/// a few levels on top (kind: `kubelet/kubepods/...`), and the search is only made for gated devices.
pub const EXEMPT_LEVELS_MAX: i32 = 10;

const CONTEXT_ACCESS_TYPE: i16 = 0;
const CONTEXT_MAJOR: i16 = 4;
const CONTEXT_MINOR: i16 = 8;
const DEVICE_IS_CHARACTER: i32 = 2;
const ACCESS_MKNOD: i32 = 1;

const HELPER_MAP_LOOKUP: i32 = 1;
const HELPER_CURRENT_CGROUP_ID: i32 = 80;
const HELPER_CURRENT_ANCESTOR_CGROUP_ID: i32 = 123;
const HELPER_BOOTTIME_NS: i32 = 125; // Kernel 5.8.

// Offsets in the value of `allow`.
const VALUE_OPENS: i16 = 0;
const VALUE_FIRST_OPEN_NS: i16 = 8;

// Registers: r0 result, r1-r5 arguments, r6-r9 kept over calls, r10 frame.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R6: u8 = 6;
const R7: u8 = 7;
const R8: u8 = 8;
const R9: u8 = 9;
const R10: u8 = 10;

// Operation codes (class | size or source | operation), as in the kernel's instruction-set document.
const LOAD_IMMEDIATE_64: u8 = 0x18;
const LOAD_WORD: u8 = 0x61;
const LOAD_DOUBLE: u8 = 0x79;
const STORE_WORD: u8 = 0x63;
const STORE_DOUBLE: u8 = 0x7b;
const ATOMIC_DOUBLE: u8 = 0xdb;
const MOVE_IMMEDIATE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const ADD_IMMEDIATE: u8 = 0x07;
const AND_IMMEDIATE: u8 = 0x57;
const SHIFT_RIGHT_IMMEDIATE: u8 = 0x77;
const JUMP: u8 = 0x05;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_IF_NOT_EQUAL: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const ATOMIC_ADD: i32 = 0;
const PSEUDO_MAP_FD: u8 = 1;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Label {
    Gated,
    Count,
    NotALease,
    Allow,
}

#[derive(Default)]
struct Assembler {
    code: Vec<u64>,
    jumps: Vec<(usize, Label)>,
    places: Vec<(Label, usize)>,
}

impl Assembler {
    fn emit(&mut self, operation: u8, to: u8, from: u8, offset: i16, immediate: i32) {
        let registers = to | (from << 4);
        self.code.push(
            u64::from(operation)
                | u64::from(registers) << 8
                | u64::from(offset.cast_unsigned()) << 16
                | u64::from(immediate.cast_unsigned()) << 32,
        );
    }

    fn jump(&mut self, operation: u8, register: u8, immediate: i32, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.emit(operation, register, 0, 0, immediate);
    }

    fn place(&mut self, label: Label) {
        self.places.push((label, self.code.len()));
    }

    fn map(&mut self, register: u8, map: BorrowedFd<'_>) {
        self.emit(LOAD_IMMEDIATE_64, register, PSEUDO_MAP_FD, 0, map.as_raw_fd());
        self.code.push(0); // The upper half of the 64-bit immediate.
    }

    /// Looks the key at `r10 + key` up in `map`; the result is in r0.
    fn lookup(&mut self, map: BorrowedFd<'_>, key: i32) {
        self.map(R1, map);
        self.emit(MOVE_REGISTER, R2, R10, 0, 0);
        self.emit(ADD_IMMEDIATE, R2, 0, 0, key);
        self.emit(CALL, 0, 0, 0, HELPER_MAP_LOOKUP);
    }

    fn finish(mut self) -> Vec<u64> {
        for (at, label) in &self.jumps {
            let place = self.places.iter().find(|(placed, _)| placed == label).map_or(0, |(_, place)| *place);
            // Jump offsets count from the next instruction; the program is far shorter than an i16 reaches.
            let offset = (place as i64 - *at as i64 - 1) as i16;
            self.code[*at] |= u64::from(offset.cast_unsigned()) << 16;
        }
        self.code
    }
}

/// The instruction stream for these majors and maps. `allow` is keyed by `(cgroup id u64, major u32, minor u32)` with
/// `(opens u64, BOOTTIME of the first in nanoseconds u64)` as value, `exempt` by cgroup id.
pub fn assemble(majors: &BTreeSet<u32>, allow: BorrowedFd<'_>, exempt: BorrowedFd<'_>) -> Vec<u64> {
    let mut a = Assembler::default();
    a.emit(MOVE_REGISTER, R6, R1, 0, 0);
    a.emit(LOAD_WORD, R9, R6, CONTEXT_ACCESS_TYPE, 0);
    a.emit(LOAD_WORD, R7, R6, CONTEXT_MAJOR, 0);
    a.emit(LOAD_WORD, R8, R6, CONTEXT_MINOR, 0);
    a.emit(MOVE_REGISTER, R1, R9, 0, 0);
    a.emit(AND_IMMEDIATE, R1, 0, 0, 0xffff);
    a.jump(JUMP_IF_NOT_EQUAL, R1, DEVICE_IS_CHARACTER, Label::Allow);
    for major in majors {
        a.jump(JUMP_IF_EQUAL, R7, major.cast_signed(), Label::Gated);
    }
    a.jump(JUMP, 0, 0, Label::Allow);

    a.place(Label::Gated);
    a.emit(SHIFT_RIGHT_IMMEDIATE, R9, 0, 0, 16);
    a.jump(JUMP_IF_EQUAL, R9, ACCESS_MKNOD, Label::Allow);
    a.emit(CALL, 0, 0, 0, HELPER_CURRENT_CGROUP_ID);
    a.emit(STORE_DOUBLE, R10, R0, -16, 0);
    a.emit(STORE_WORD, R10, R7, -8, 0);
    a.emit(STORE_WORD, R10, R8, -4, 0);
    a.lookup(allow, -16);
    a.jump(JUMP_IF_EQUAL, R0, 0, Label::NotALease);
    // The value has to outlive the call; the access type that r9 held is done with.
    a.emit(MOVE_REGISTER, R9, R0, 0, 0);
    a.emit(LOAD_DOUBLE, R1, R9, VALUE_OPENS, 0);
    a.jump(JUMP_IF_NOT_EQUAL, R1, 0, Label::Count);
    a.emit(CALL, 0, 0, 0, HELPER_BOOTTIME_NS);
    a.emit(STORE_DOUBLE, R9, R0, VALUE_FIRST_OPEN_NS, 0);
    a.place(Label::Count);
    a.emit(MOVE_IMMEDIATE, R1, 0, 0, 1);
    a.emit(ATOMIC_DOUBLE, R9, R1, VALUE_OPENS, ATOMIC_ADD);
    a.jump(JUMP, 0, 0, Label::Allow);

    a.place(Label::NotALease);
    for level in 1..=EXEMPT_LEVELS_MAX {
        a.emit(MOVE_IMMEDIATE, R1, 0, 0, level);
        a.emit(CALL, 0, 0, 0, HELPER_CURRENT_ANCESTOR_CGROUP_ID);
        a.emit(STORE_DOUBLE, R10, R0, -24, 0);
        a.lookup(exempt, -24);
        a.jump(JUMP_IF_NOT_EQUAL, R0, 0, Label::Allow);
    }
    a.emit(MOVE_IMMEDIATE, R0, 0, 0, 0);
    a.emit(EXIT, 0, 0, 0, 0);

    a.place(Label::Allow);
    a.emit(MOVE_IMMEDIATE, R0, 0, 0, 1);
    a.emit(EXIT, 0, 0, 0, 0);
    a.finish()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn every_jump_lands_on_an_instruction_of_the_program() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let code = assemble(&BTreeSet::from([195, 234, 235]), file.as_fd(), file.as_fd());
        let mut second_half = false;
        for (at, instruction) in code.iter().enumerate() {
            let operation = (instruction & 0xff) as u8;
            if std::mem::replace(&mut second_half, operation == LOAD_IMMEDIATE_64) {
                continue;
            }
            if [JUMP, JUMP_IF_EQUAL, JUMP_IF_NOT_EQUAL].contains(&operation) {
                let offset = ((instruction >> 16) & 0xffff) as u16 as i16;
                let target = at as i64 + 1 + i64::from(offset);
                assert!(target > at as i64 && target < code.len() as i64, "jump at {at} to {target}");
            }
        }
        assert_eq!(code.last().map(|last| last & 0xff), Some(u64::from(EXIT)));
    }
}
