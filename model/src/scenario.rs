//! The clusters that are checked. Each is small enough to be looked at as a whole; together they have every fault, and the
//! faults that meet in the scenarios of the design (an old leader and its late writes, a lost answer and a fail-over, a cut
//! session and an expiry).

use crate::bounds::{Bounds, Budget, Call, Fault};

/// Bounds without faults.
pub fn calm(name: &'static str, nodes: usize, calls: &[Call]) -> Bounds {
    Bounds {
        name,
        nodes,
        calls: calls.to_vec(),
        budget: Budget::NONE,
        running: 0,
        never_allowed: true,
        clearing: true,
        receipts: false,
        fault: Fault::None,
        begin: |state| state,
    }
}

/// A call on a node, paid by an account.
pub const fn call(node: usize, account: usize) -> Call {
    Call { node, account }
}

/// What is checked each time. One fault more or one call more in any of these makes ten times as many states; so each has what must meet.
pub fn all() -> Vec<Bounds> {
    let mut all = without_fail_over();
    all.extend(two_leaders());
    all.extend(faults_in_a_fail_over());
    all
}

/// What takes many minutes: for whoever changes the protocol.
pub fn long() -> Vec<Bounds> {
    let again = Budget { terms: 1, ..NONE };
    let brief = |bounds: Bounds| Bounds { never_allowed: false, clearing: false, ..bounds };
    vec![
        brief(Bounds {
            budget: Budget { pauses: 1, ..again },
            ..calm("long: fail-over, a call and an expiry", 1, &ONE)
        }),
        brief(Bounds { budget: again, running: 2, ..calm("long: two leaders, two nodes, two accounts", 2, &APART) }),
    ]
}

const NONE: Budget = Budget::NONE;
const ONE: [Call; 1] = [call(0, 0)];
/// Of the account with quota for two.
const TWO: [Call; 2] = [call(0, 0), call(0, 0)];
/// Of the account with quota for one.
const POOR: [Call; 2] = [call(0, 1), call(0, 1)];
/// On two nodes, of one account.
const SHARED: [Call; 2] = [call(0, 0), call(1, 0)];
/// On two nodes, of two accounts.
const APART: [Call; 2] = [call(0, 0), call(1, 1)];

fn without_fail_over() -> Vec<Bounds> {
    let three = [call(0, 0), call(0, 1), call(1, 0)];
    let writes = Budget { unknown: 2, rejected: 1, ticks: 1, ..NONE };
    let links = Budget { cuts: 1, stalls: 1, pauses: 1, leaves: 1, ..NONE };
    vec![
        Bounds { receipts: true, ..calm("two nodes, two accounts", 2, &APART) },
        Bounds {
            receipts: true,
            budget: Budget { repeats: 1, leaves: 1, ..NONE },
            ..calm("hand-over with receipts, repeated reports, a visitor who leaves", 1, &TWO)
        },
        Bounds { never_allowed: false, clearing: false, ..calm("three calls across nodes and accounts", 2, &three) },
        Bounds { budget: writes, ..calm("writes of unknown outcome and refused ones", 1, &TWO) },
        Bounds { budget: links, ..calm("a cut session, a stalled order, an expiry", 1, &ONE) },
        Bounds { budget: Budget { restarts: 1, reboots: 1, ..NONE }, ..calm("agents and nodes start anew", 1, &TWO) },
    ]
}

fn two_leaders() -> Vec<Bounds> {
    let again = Budget { terms: 1, ..NONE };
    let brief = |bounds: Bounds| Bounds { never_allowed: false, ..bounds };
    vec![
        brief(Bounds {
            budget: again,
            running: 2,
            clearing: false,
            ..calm("two leaders, two nodes, one account", 2, &SHARED)
        }),
        brief(Bounds { budget: again, clearing: false, ..calm("two leaders, two nodes, a call", 2, &ONE) }),
        brief(Bounds { budget: again, running: 1, ..calm("two leaders, one queue", 1, &TWO) }),
        brief(Bounds {
            budget: Budget { leaves: 1, ..again },
            running: 1,
            clearing: false,
            ..calm("two leaders, a visitor who leaves", 1, &TWO)
        }),
        brief(Bounds {
            budget: Budget { crashes: 1, ..again },
            running: 1,
            ..calm("a leader dies or not, quota for one", 1, &POOR)
        }),
        brief(Bounds { budget: Budget { terms: 2, ..NONE }, running: 1, ..calm("three terms", 1, &ONE) }),
    ]
}

fn faults_in_a_fail_over() -> Vec<Bounds> {
    let again = Budget { terms: 1, ..NONE };
    let brief = |bounds: Bounds| Bounds { never_allowed: false, ..bounds };
    vec![
        Bounds { budget: Budget { unknown: 1, ..again }, ..calm("fail-over and an unknown outcome", 1, &ONE) },
        Bounds { budget: Budget { rejected: 1, ticks: 1, ..again }, ..calm("fail-over and a refused write", 1, &ONE) },
        brief(Bounds { budget: Budget { cuts: 1, ..again }, ..calm("fail-over and a cut session", 1, &ONE) }),
        brief(Bounds { budget: Budget { stalls: 1, ..again }, ..calm("fail-over and a stalled order", 1, &ONE) }),
        brief(Bounds { budget: Budget { pauses: 1, ..again }, running: 1, ..calm("fail-over and an expiry", 1, &ONE) }),
        brief(Bounds {
            budget: Budget { restarts: 1, reboots: 1, ..again },
            ..calm("fail-over while agent and node start anew", 1, &ONE)
        }),
        brief(Bounds {
            budget: Budget { losses: 1, ..again },
            running: 1,
            ..calm("fail-over and a lost node", 1, &ONE)
        }),
    ]
}
