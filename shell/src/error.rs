//! Errors as text.

use std::error::Error;

/// An error with its sources on one line, for logs and messages: Display of our errors never repeats the source.
pub fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    // Bounded by the depth of the error.
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the page cannot be read")]
    struct Page(#[source] Call);

    #[derive(Debug, thiserror::Error)]
    #[error("get GPUAccount")]
    struct Call(#[source] std::io::Error);

    #[test]
    fn every_source_is_told_once_outermost_first() {
        let error = Page(Call(std::io::Error::other("no route")));
        assert_eq!(error_chain(&error), "the page cannot be read: get GPUAccount: no route");
        assert_eq!(error_chain(&error.0.0), "no route");
    }
}
