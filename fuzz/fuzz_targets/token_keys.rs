//! See `spaceport_fuzz::token_keys`.
// As a test (`cargo test --all-targets`) it has none, instead of libFuzzer's main, which never ends.
#![cfg_attr(not(test), no_main)]

#[cfg(not(test))]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    spaceport_fuzz::token_keys::check(data);
});
