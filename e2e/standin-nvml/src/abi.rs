//! The exported C functions, and how a call gets from raw pointers to safe Rust and back.
//!
//! [`exported!`] declares a function once, with the types of [`argument`] for its parameters. What it generates takes
//! the raw C types, turns each argument into its safe form (a null pointer ends the call with INVALID_ARGUMENT),
//! runs the body and turns its answer into a return code. A panic ends as UNKNOWN and never crosses into C.
//!
//! Functions that are not here do not exist in the library: a caller that looks one up finds no symbol, as with an
//! older driver.

mod argument;
pub(crate) mod code;
mod device;
mod events;
mod health;
mod mig;
mod process_lists;
mod system;

use std::panic::{AssertUnwindSafe, catch_unwind};

use nvml_wrapper_sys::bindings::nvmlReturn_t;

use crate::library::Answer;

/// Declares exported functions; see the module's text.
macro_rules! exported {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $kind:ty),* $(,)?) $body:block)*) => {$(
        $(#[$doc])*
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            $($argument: <$kind as $crate::abi::argument::Argument>::Raw),*
        ) -> nvml_wrapper_sys::bindings::nvmlReturn_t {
            $crate::abi::answered(|| {
                // SAFETY: the caller keeps to NVML's documentation, by which every pointer it passes is null or points
                // to memory of the documented type and size, its own until the call returns.
                $(let $argument = unsafe {
                    <$kind as $crate::abi::argument::Argument>::receive($argument, stringify!($name))
                }?;)*
                $body
            })
        }

        // A function that took other arguments than callers pass would not compile here.
        #[cfg(test)]
        const _: fn(&mut nvml_wrapper_sys::bindings::NvmlLib) = |callers| callers.$name = Ok($name);
    )*};
}
use exported;

/// Runs the body of a call and turns its answer into NVML's return code.
fn answered(body: impl FnOnce() -> Answer) -> nvmlReturn_t {
    // What a panic leaves behind is behind a lock that is taken poisoned or not; see `library`.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => code::SUCCESS,
        Ok(Err(code)) => code,
        Err(_) => code::UNKNOWN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_unknown_error() {
        assert_eq!(answered(|| panic!("on purpose")), code::UNKNOWN);
    }
}
