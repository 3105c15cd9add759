//! The safe forms of the arguments that C callers pass. Every use of a caller's pointer is in this file.

use std::{
    ffi::{CStr, c_char},
    ptr::NonNull,
    slice,
};

use nvml_wrapper_sys::bindings::*;

use super::code;
use crate::{
    Card, ComputeInstance, GpuInstance,
    library::{self, Answer, Object, Snapshot},
};

/// A C argument and its safe form.
pub trait Argument: Sized {
    /// What comes over the C interface.
    type Raw;
    /// Takes it in; `call` is the name of the called function.
    ///
    /// # Safety
    /// `raw` is what NVML's documentation asks for, or null, and stays so until the call returns.
    unsafe fn receive(raw: Self::Raw, call: &'static str) -> Answer<Self>;
}

macro_rules! plain {
    ($($number:ty),*) => {$(
        impl Argument for $number {
            type Raw = Self;
            unsafe fn receive(raw: Self, _call: &'static str) -> Answer<Self> {
                Ok(raw)
            }
        }
    )*};
}
plain!(u32, u64, i32);

/// A place for one answer.
pub struct Out<T>(NonNull<T>);

impl<T> Argument for Out<T> {
    type Raw = *mut T;
    unsafe fn receive(raw: *mut T, _call: &'static str) -> Answer<Self> {
        NonNull::new(raw).map(Self).ok_or(code::INVALID_ARGUMENT)
    }
}

impl<T> Out<T> {
    pub fn put(&self, value: T) -> Answer {
        // SAFETY: by `receive`'s contract the pointer is good for writing until the call returns. The structures of
        // NVML are plain data, so nothing has to be dropped.
        unsafe { self.0.write(value) };
        Ok(())
    }
}

impl<T: Copy> Out<T> {
    /// What the caller put there before the call: a count, a version.
    pub fn given(&self) -> T {
        // SAFETY: as for `put`; only used where NVML's documentation asks for an initialised value.
        unsafe { self.0.read() }
    }
}

/// A place for an answer that has a version in its first field. Only that field is looked at before a version is
/// agreed on: another version has another size.
pub struct VersionedOut<T>(NonNull<T>);

impl<T> Argument for VersionedOut<T> {
    type Raw = *mut T;
    unsafe fn receive(raw: *mut T, _call: &'static str) -> Answer<Self> {
        NonNull::new(raw).map(Self).ok_or(code::INVALID_ARGUMENT)
    }
}

impl<T> VersionedOut<T> {
    /// Whether the caller's structure is version `version`, which this library knows as `V`.
    pub fn is<V>(&self, version: u32) -> bool {
        // SAFETY: every versioned structure starts with its version, an initialised u32.
        let given = unsafe { self.0.cast::<u32>().read() };
        given == version << 24 | size_of::<V>() as u32
    }

    /// Fills the structure in as a `V`.
    ///
    /// # Safety
    /// `is::<V>` was true: the caller's structure is of that version, and so of that size.
    pub unsafe fn put_as<V>(&self, value: V) -> Answer {
        // SAFETY: `receive`'s contract for the pointer, this function's for the size.
        unsafe { self.0.cast::<V>().write(value) };
        Ok(())
    }
}

/// A place for many answers, or none: null is allowed.
pub struct OutArray<T>(Option<NonNull<T>>);

impl<T> Argument for OutArray<T> {
    type Raw = *mut T;
    unsafe fn receive(raw: *mut T, _call: &'static str) -> Answer<Self> {
        Ok(Self(NonNull::new(raw)))
    }
}

impl<T: Copy> OutArray<T> {
    pub fn is_null(&self) -> bool {
        self.0.is_none()
    }

    /// Writes all of `values` to the front.
    ///
    /// # Safety
    /// The caller has room for as many as `values` has.
    pub unsafe fn fill(&self, values: &[T]) -> Answer {
        let array = self.0.ok_or(code::INVALID_ARGUMENT)?;
        // SAFETY: `receive`'s contract for the pointer, this function's for the size; the caller's memory and ours do
        // not overlap.
        unsafe { array.as_ptr().copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        Ok(())
    }

    /// NVML's way with lists: `count` says how many the caller has room for and is told how many there are; too
    /// little room is INSUFFICIENT_SIZE.
    pub fn list(&self, count: &Out<u32>, values: &[T]) -> Answer {
        let room = count.given() as usize;
        count.put(values.len() as u32)?;
        match values.len() {
            0 => Ok(()),
            length if length > room => Err(code::INSUFFICIENT_SIZE),
            // SAFETY: the caller said that it has room for `room`, which is enough.
            _ => unsafe { self.fill(values) },
        }
    }

    /// The caller's values, to be read and written.
    ///
    /// # Safety
    /// There are `length` initialised values.
    pub unsafe fn values(&mut self, length: usize) -> Answer<&mut [T]> {
        let array = self.0.ok_or(code::INVALID_ARGUMENT)?;
        // SAFETY: `receive`'s contract for the pointer, this function's for length and content; the borrow of `self`
        // keeps a second slice from being made.
        Ok(unsafe { slice::from_raw_parts_mut(array.as_ptr(), length) })
    }
}

/// A place for a text; the next argument of the call is its length.
pub struct OutText(NonNull<c_char>);

impl Argument for OutText {
    type Raw = *mut c_char;
    unsafe fn receive(raw: *mut c_char, _call: &'static str) -> Answer<Self> {
        NonNull::new(raw).map(Self).ok_or(code::INVALID_ARGUMENT)
    }
}

impl OutText {
    /// Writes `text` and a zero byte if `room`, the call's length argument, suffices.
    pub fn put(&self, room: u32, text: &str) -> Answer {
        let text = text.as_bytes();
        if text.len() >= room as usize {
            return Err(code::INSUFFICIENT_SIZE);
        }
        // SAFETY: by `receive`'s contract the buffer has `room` bytes, which is more than `text` has, so the zero byte
        // fits too.
        unsafe {
            let buffer = self.0.cast::<u8>().as_ptr();
            buffer.copy_from_nonoverlapping(text.as_ptr(), text.len());
            buffer.add(text.len()).write(0);
        }
        Ok(())
    }
}

/// A text from the caller.
pub struct InText(pub String);

impl Argument for InText {
    type Raw = *const c_char;
    unsafe fn receive(raw: *const c_char, _call: &'static str) -> Answer<Self> {
        if raw.is_null() {
            return Err(code::INVALID_ARGUMENT);
        }
        // SAFETY: by this function's contract it is a text with a zero byte at its end.
        let text = unsafe { CStr::from_ptr(raw) };
        text.to_str().map(|text| Self(text.into())).map_err(|_| code::INVALID_ARGUMENT)
    }
}

/// A structure from the caller.
pub struct In<T>(pub T);

impl<T: Copy> Argument for In<T> {
    type Raw = *const T;
    unsafe fn receive(raw: *const T, _call: &'static str) -> Answer<Self> {
        let pointer = NonNull::new(raw.cast_mut()).ok_or(code::INVALID_ARGUMENT)?;
        // SAFETY: by this function's contract it points to an initialised value.
        Ok(Self(unsafe { pointer.read() }))
    }
}

/// A card, or a MIG device on it, that can be asked: neither hung nor lost when the call came.
pub struct Device {
    pub snapshot: Snapshot,
    uuid: String,
    /// GPU and compute instance, for a MIG device.
    pub slice: Option<(u32, u32)>,
}

impl Argument for Device {
    type Raw = nvmlDevice_t;
    unsafe fn receive(raw: nvmlDevice_t, call: &'static str) -> Answer<Self> {
        let (uuid, slice) = match library::object_of(raw)? {
            Object::Card { uuid } => (uuid, None),
            Object::MigDevice { card, gpu_instance, compute_instance } => {
                (card, Some((gpu_instance, compute_instance)))
            }
            Object::GpuInstance { .. } | Object::ComputeInstance { .. } => return Err(code::INVALID_ARGUMENT),
        };
        let device = Self { snapshot: library::reach(&uuid, call)?, uuid, slice };
        // The handle of a MIG device that was destroyed is no handle any more.
        device.instances()?;
        Ok(device)
    }
}

impl Device {
    pub fn card(&self) -> Answer<&Card> {
        self.snapshot.card(&self.uuid).ok_or(code::GPU_IS_LOST)
    }

    /// The card, for calls that make no sense on a MIG device.
    pub fn whole_card(&self) -> Answer<&Card> {
        if self.slice.is_some() { Err(code::NOT_SUPPORTED) } else { self.card() }
    }

    /// The instances behind a MIG device; None for a card.
    pub fn instances(&self) -> Answer<Option<(&GpuInstance, &ComputeInstance)>> {
        let Some((gpu_instance, compute_instance)) = self.slice else { return Ok(None) };
        let found = self.card()?.mig.gpu_instance(gpu_instance);
        let found = found.and_then(|gpu| Some((gpu, gpu.compute_instance(compute_instance)?)));
        found.map(Some).ok_or(code::INVALID_ARGUMENT)
    }
}

/// A GPU instance that exists, on a card that can be asked.
pub struct GpuInstanceHandle {
    pub snapshot: Snapshot,
    pub card: String,
    pub id: u32,
}

impl Argument for GpuInstanceHandle {
    type Raw = nvmlGpuInstance_t;
    unsafe fn receive(raw: nvmlGpuInstance_t, call: &'static str) -> Answer<Self> {
        let Object::GpuInstance { card, id } = library::object_of(raw)? else { return Err(code::INVALID_ARGUMENT) };
        let handle = Self { snapshot: library::reach(&card, call)?, card, id };
        handle.instance()?;
        Ok(handle)
    }
}

impl GpuInstanceHandle {
    pub fn card(&self) -> Answer<&Card> {
        self.snapshot.card(&self.card).ok_or(code::GPU_IS_LOST)
    }

    pub fn instance(&self) -> Answer<&GpuInstance> {
        self.card()?.mig.gpu_instance(self.id).ok_or(code::INVALID_ARGUMENT)
    }
}

/// A compute instance that exists, on a card that can be asked.
pub struct ComputeInstanceHandle {
    pub snapshot: Snapshot,
    pub card: String,
    pub gpu_instance: u32,
    pub id: u32,
}

impl Argument for ComputeInstanceHandle {
    type Raw = nvmlComputeInstance_t;
    unsafe fn receive(raw: nvmlComputeInstance_t, call: &'static str) -> Answer<Self> {
        let Object::ComputeInstance { card, gpu_instance, id } = library::object_of(raw)? else {
            return Err(code::INVALID_ARGUMENT);
        };
        let handle = Self { snapshot: library::reach(&card, call)?, card, gpu_instance, id };
        handle.instance()?;
        Ok(handle)
    }
}

impl ComputeInstanceHandle {
    pub fn instance(&self) -> Answer<&ComputeInstance> {
        let card = self.snapshot.card(&self.card).ok_or(code::GPU_IS_LOST)?;
        let gpu_instance = card.mig.gpu_instance(self.gpu_instance);
        gpu_instance.and_then(|gpu| gpu.compute_instance(self.id)).ok_or(code::INVALID_ARGUMENT)
    }
}

/// An event set; whether it exists shows when it is used.
pub struct EventSet(pub nvmlEventSet_t);

impl Argument for EventSet {
    type Raw = nvmlEventSet_t;
    unsafe fn receive(raw: nvmlEventSet_t, _call: &'static str) -> Answer<Self> {
        Ok(Self(raw))
    }
}
