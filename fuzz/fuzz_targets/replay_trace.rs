//! See `spaceport_fuzz::replay_trace`.
// As a test (`cargo test --all-targets`) it has none, instead of libFuzzer's main, which never ends.
#![cfg_attr(not(test), no_main)]

#[cfg(not(test))]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    spaceport_fuzz::replay_trace::check(data);
});

#[cfg(not(test))]
libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    spaceport_fuzz::numbers::mutate(data, size, max_size, seed, libfuzzer_sys::fuzzer_mutate)
});
