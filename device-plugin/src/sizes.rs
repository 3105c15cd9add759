//! Remembers the size each function asked for, because the client's retry after a cut stream leaves it out (L15,
//! device API A4).

use std::collections::BTreeMap;

use spaceport_core::ids::Size;

use crate::converge::Caller;

/// Functions remembered per container. Apps decorate a handful; past this a retry falls back to the default size.
const TASKS_PER_CONTAINER_MAX: usize = 1024;

/// What the client multiplies every duration with on this card, unless it knows that the size is xlarge (L19).
const FACTOR_CARD: &str = "RTX PRO 6000";

/// Size and duration a request is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Size, inherited if it was left out.
    pub size: Size,
    /// Milliseconds, with the client's factor taken out again where it was wrong.
    pub declared_ms: u64,
}

/// Sizes by pod and task, of the container that the pod runs now: `id()`s of an earlier one mean nothing.
#[derive(Debug, Default)]
pub struct SizeMemory {
    pods: BTreeMap<String, Tasks>,
}

#[derive(Debug, Default)]
struct Tasks {
    container: String,
    sizes: BTreeMap<u64, Size>,
}

impl SizeMemory {
    /// Settles the size of a request and remembers it. A decorated function never changes its size, so one that named a
    /// size before and names none now is the retry of a cut stream.
    pub fn settle(&mut self, caller: &Caller, task: u64, named: Option<Size>, declared_ms: u64, model: &str) -> Asked {
        let tasks = self.pods.entry(caller.pod.pod_uid.clone()).or_default();
        if tasks.container != caller.container {
            *tasks = Tasks { container: caller.container.clone(), sizes: BTreeMap::new() };
        }
        if let Some(size) = named {
            if tasks.sizes.len() < TASKS_PER_CONTAINER_MAX || tasks.sizes.contains_key(&task) {
                tasks.sizes.insert(task, size);
            }
            return Asked { size, declared_ms };
        }
        match tasks.sizes.get(&task) {
            Some(Size::Xlarge) if model.contains(FACTOR_CARD) => {
                // The client multiplied by 1.5, not knowing the size any more.
                Asked { size: Size::Xlarge, declared_ms: declared_ms / 3 * 2 + declared_ms % 3 * 2 / 3 }
            }
            Some(size) => Asked { size: *size, declared_ms },
            None => Asked { size: Size::Large, declared_ms },
        }
    }

    /// Forgets a pod that ends.
    pub fn forget(&mut self, pod_uid: &str) {
        self.pods.remove(pod_uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::converge::SpacePod;

    const H200: &str = "NVIDIA H200";
    const RTX: &str = "NVIDIA RTX PRO 6000 Blackwell Server Edition";

    fn caller(pod: &str, container: &str) -> Caller {
        let pod = SpacePod { pod_uid: pod.to_owned(), ..SpacePod::default() };
        Caller { pod, container: container.to_owned() }
    }

    #[test]
    fn a_retry_without_size_inherits_the_size_of_its_function() {
        let (mut memory, app) = (SizeMemory::default(), caller("p", "c1"));
        memory.settle(&app, 7, Some(Size::Xlarge), 60_000, H200);
        assert_eq!(memory.settle(&app, 7, None, 60_000, H200), Asked { size: Size::Xlarge, declared_ms: 60_000 });
        // Another function, another pod and the container after a restart do not.
        assert_eq!(memory.settle(&app, 8, None, 60_000, H200).size, Size::Large);
        assert_eq!(memory.settle(&caller("q", "c1"), 7, None, 60_000, H200).size, Size::Large);
        assert_eq!(memory.settle(&caller("p", "c2"), 7, None, 60_000, H200).size, Size::Large);
    }

    #[test]
    fn the_factor_of_the_card_is_taken_out_of_an_inherited_xlarge_only() {
        let (mut memory, app) = (SizeMemory::default(), caller("p", "c"));
        memory.settle(&app, 1, Some(Size::Xlarge), 60_000, RTX);
        memory.settle(&app, 2, Some(Size::Large), 90_000, RTX);
        assert_eq!(memory.settle(&app, 1, None, 90_000, RTX).declared_ms, 60_000);
        assert_eq!(memory.settle(&app, 2, None, 90_000, RTX).declared_ms, 90_000);
    }

    #[test]
    fn a_pod_that_ends_is_forgotten() {
        let (mut memory, app) = (SizeMemory::default(), caller("p", "c"));
        memory.settle(&app, 1, Some(Size::Xlarge), 1, H200);
        memory.forget("p");
        assert_eq!(memory.settle(&app, 1, None, 1, H200).size, Size::Large);
    }
}
