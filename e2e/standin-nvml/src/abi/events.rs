//! Events: what happened to a card since somebody registered for it.
#![allow(non_snake_case, reason = "the names are NVML's")]

use std::{thread, time::Duration};

use nvml_wrapper_sys::bindings::*;

use super::{
    argument::{Device, EventSet, Out},
    code, exported,
    process_lists::NO_ID,
};
use crate::{
    Event, EventKind,
    library::{self, Listener, Object, Snapshot},
};

/// How often a waiting call looks at the file.
const WAIT_POLL: Duration = Duration::from_millis(20);
/// The bits of the event types that can be delivered.
const SUPPORTED: u64 =
    (nvmlEventTypeXidCriticalError | nvmlEventTypeSingleBitEccError | nvmlEventTypeDoubleBitEccError) as u64;

exported! {
    fn nvmlEventSetCreate(set: Out<nvmlEventSet_t>) {
        library::snapshot()?;
        set.put(library::create_event_set()?)
    }

    fn nvmlEventSetFree(set: EventSet) {
        library::free_event_set(set.0)
    }

    fn nvmlDeviceGetSupportedEventTypes(device: Device, types: Out<u64>) {
        device.whole_card()?;
        types.put(SUPPORTED)
    }

    /// Events that happened before are not delivered.
    fn nvmlDeviceRegisterEvents(device: Device, types: u64, set: EventSet) {
        let card = device.whole_card()?;
        if types & !SUPPORTED != 0 {
            return Err(code::NOT_SUPPORTED);
        }
        library::with_event_set(set.0, |listeners| {
            match listeners.iter_mut().find(|listener| listener.card == card.uuid) {
                Some(listener) => listener.types |= types,
                None => listeners.push(Listener { card: card.uuid.clone(), types, seen: card.last_sequence() }),
            }
        })
    }

    /// Once a card of the set is lost and its events are delivered, the wait ends as GPU_IS_LOST and not as TIMEOUT.
    fn nvmlEventSetWait_v2(set: EventSet, data: Out<nvmlEventData_t>, timeout_ms: u32) {
        let mut left = Duration::from_millis(timeout_ms.into());
        // Each turn but the last takes from `left`, so the wait is bounded by what the caller asked for.
        loop {
            let snapshot = library::snapshot()?;
            let (next, lost) = library::with_event_set(set.0, |listeners| {
                let next = listeners.iter_mut().find_map(|listener| next_event(listener, &snapshot));
                let is_lost = |listener: &Listener| snapshot.card(&listener.card).is_none_or(|card| card.lost);
                (next, listeners.iter().any(is_lost))
            })?;
            if let Some((card, event)) = next {
                return data.put(event_data(card, &event));
            }
            if left.is_zero() {
                return Err(if lost { code::GPU_IS_LOST } else { code::TIMEOUT });
            }
            let pause = left.min(WAIT_POLL);
            thread::sleep(pause);
            left -= pause;
        }
    }
}

/// The oldest event that the listener has not had and wants, and its card.
fn next_event(listener: &mut Listener, snapshot: &Snapshot) -> Option<(String, Event)> {
    let card = snapshot.card(&listener.card)?;
    let wanted = |event: &&Event| event.sequence > listener.seen && listener.types & bit(event.kind) != 0;
    let event = card.events.iter().filter(wanted).min_by_key(|event| event.sequence)?.clone();
    listener.seen = event.sequence;
    Some((card.uuid.clone(), event))
}

fn event_data(card: String, event: &Event) -> nvmlEventData_t {
    nvmlEventData_t {
        device: library::handle_of(Object::Card { uuid: card }),
        eventType: bit(event.kind),
        eventData: event.data,
        gpuInstanceId: event.gpu_instance_id.unwrap_or(NO_ID),
        computeInstanceId: event.compute_instance_id.unwrap_or(NO_ID),
    }
}

fn bit(kind: EventKind) -> u64 {
    u64::from(match kind {
        EventKind::Xid => nvmlEventTypeXidCriticalError,
        EventKind::SingleBitEcc => nvmlEventTypeSingleBitEccError,
        EventKind::DoubleBitEcc => nvmlEventTypeDoubleBitEccError,
    })
}
