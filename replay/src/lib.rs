//! Replays traces of GPU requests under several queueing policies and compares what people would have waited.
//!
//! - [`demand`] makes demand up, in the shape of real demand; [`trace`] reads and writes traces.
//! - [`replay`](mod@replay) plays one on a number of cards, under a [`policy`], with [`admission`] before it and the
//!   [`promise`] of a latest start beside it.
//! - [`comparison`] and [`report`] say what came of it.

#![forbid(unsafe_code)]

pub mod admission;
pub mod comparison;
pub mod demand;
pub mod node;
pub mod policy;
pub mod promise;
pub mod random;
pub mod replay;
pub mod report;
pub mod request;
pub mod sweep;
pub mod trace;
