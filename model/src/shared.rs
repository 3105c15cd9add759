//! Values that many states of the world have in common.

use std::fmt::{self, Debug, Write};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

/// A value with its fingerprint, taken once when it is made: states are compared and hashed millions of times, and few of
/// them differ in their pages and ledgers. 64 bits, as the checker's own fingerprint of a whole state has.
pub struct Shared<T> {
    value: Arc<T>,
    fingerprint: u64,
}

/// Feeds what is written to a hasher.
struct HashWriter(DefaultHasher);

impl Write for HashWriter {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

/// The fingerprint of a value: of its `Debug` text, which shows every field of the ledger's types. They have no `Hash`.
pub fn fingerprint(value: &impl Debug) -> u64 {
    let mut writer = HashWriter(DefaultHasher::new());
    // Only the writer could fail, and it never does.
    let _ = write!(writer, "{value:?}");
    writer.0.finish()
}

impl<T: Debug> Shared<T> {
    /// Takes the value's fingerprint.
    pub fn new(value: T) -> Self {
        Self { fingerprint: fingerprint(&value), value: Arc::new(value) }
    }
}

impl<T> Shared<T> {
    /// Its fingerprint.
    pub const fn fingerprint(&self) -> u64 {
        self.fingerprint
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self { value: Arc::clone(&self.value), fingerprint: self.fingerprint }
    }
}

impl<T> PartialEq for Shared<T> {
    fn eq(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint
    }
}

impl<T> Eq for Shared<T> {}

impl<T> Hash for Shared<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.fingerprint);
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> Debug for Shared<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "#{:016x}", self.fingerprint)
    }
}
