//! What must hold. Each check names the rule that it is of; the rules are those of docs/rules.md.
//!
//! | Rule | Looked at |
//! | --- | --- |
//! | 1, 3, 4, 5, L1, L5, L12 | at every page that is written, [`pages`] |
//! | 2 | at every order, acknowledgement and receipt that leaves a broker, [`ledger`] |
//! | 3, 12, 11, 10, L2, L3, L17, L18, L20 | at every command of a broker, [`ledger`] and [`calls`] |
//! | 6, 7, 8, L8, L9 | at every step of a node, [`nodes`] |
//! | 6, L16 | at every command of a broker, against its nodes, [`nodes`] |
//! | 4, L10 | at every page that is written, against its nodes, [`nodes`] |
//! | 3, 11, 12, L10, replay | when everything has healed, [`end`] |
//!
//! Invariant 9 needs a kernel.

pub mod calls;
pub mod end;
pub mod ledger;
pub mod nodes;
pub mod pages;
