//! Text that must not reach a log.

use std::fmt;

/// A token. `Debug` shows its length only and there is no `Display`: tokens travel in URLs (device API A9) and must
/// not be copied from there into a log by accident.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps it.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for whoever verifies or sends it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The text itself, for whoever sends it on.
    pub fn into_exposed(self) -> String {
        self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Secret({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_text() {
        let secret = Secret::new("eyJhbGciOi");
        assert_eq!(format!("{secret:?} {:?}", Some(&secret)), "Secret(10 bytes) Some(Secret(10 bytes))");
        assert_eq!(secret.expose(), "eyJhbGciOi");
    }
}
