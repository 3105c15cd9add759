//! Comparisons for people: tables and a plot.

mod plot;
mod table;

pub use plot::plot;
pub use table::{comparison_table, sweep_table};
