//! Whether a process is ready: named conditions that must all be met.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};

/// Is told of each change of a condition after its first state: the name, and whether it is met now.
pub type Changed = fn(&'static str, bool);

/// Named conditions that must all be met before the process is ready; a cheap handle.
#[derive(Clone, Debug)]
pub struct Readiness {
    /// A std mutex: it is never held across an await.
    conditions: Arc<Mutex<BTreeMap<&'static str, bool>>>,
    changed: Changed,
}

/// One condition, for the part of the process that knows.
#[derive(Clone, Debug)]
pub struct Condition {
    readiness: Readiness,
    name: &'static str,
}

// === impl Readiness ===

impl Readiness {
    /// Ready, as long as no condition is added. `changed` writes the log, whose fields are the process's own.
    pub fn new(changed: Changed) -> Self {
        Self { conditions: Arc::default(), changed }
    }

    /// Adds a condition, not met yet.
    pub fn condition(&self, name: &'static str) -> Condition {
        let condition = Condition { readiness: self.clone(), name };
        condition.set(false);
        condition
    }

    /// Whether all conditions are met, and a line for each.
    pub fn report(&self) -> (bool, String) {
        let conditions = self.conditions.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        for (name, met) in conditions.iter() {
            let (mark, state) = if *met { ('+', "ok") } else { ('-', "not yet") };
            // Writing to a String cannot fail.
            let _ = writeln!(text, "[{mark}]{name} {state}");
        }
        (conditions.values().all(|met| *met), text)
    }
}

// === impl Condition ===

impl Condition {
    /// Says how the condition is.
    pub fn set(&self, met: bool) {
        let Readiness { conditions, changed } = &self.readiness;
        let before = conditions.lock().unwrap_or_else(PoisonError::into_inner).insert(self.name, met);
        if before.is_some_and(|before| before != met) {
            changed(self.name, met);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_every_condition_is_met() {
        let readiness = Readiness::new(|_, _| {});
        assert_eq!(readiness.report(), (true, String::new()));
        let (gate, pods) = (readiness.condition("gate"), readiness.condition("pods"));
        gate.set(true);
        assert_eq!(readiness.report(), (false, "[+]gate ok\n[-]pods not yet\n".to_owned()));
        pods.set(true);
        assert_eq!(readiness.report(), (true, "[+]gate ok\n[+]pods ok\n".to_owned()));
        gate.set(false);
        assert!(!readiness.report().0);
    }

    #[test]
    fn changes_are_told_but_not_what_stays() {
        static TOLD: Mutex<Vec<(&str, bool)>> = Mutex::new(Vec::new());
        let gate = Readiness::new(|name, met| TOLD.lock().unwrap().push((name, met))).condition("gate");
        for met in [false, true, true, false] {
            gate.set(met);
        }
        assert_eq!(*TOLD.lock().unwrap(), [("gate", true), ("gate", false)]);
    }
}
