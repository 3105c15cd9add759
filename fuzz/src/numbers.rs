//! Changes one number of a text. Most of what can be wrong in a page or a checkpoint is a number, and a change of bytes hardly
//! ever makes a whole number another whole number that matters.

use std::ops::Range;

/// Where something ends or begins to fit, or is the time of a story.
const NUMBERS: [&str; 16] = [
    "0",
    "1",
    "2",
    "7",
    "32",
    "1000000",
    "2147483648",
    "4294967295",
    "4611686018427387903",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551614",
    "18446744073709551615",
    "1800000000000",
    "253402300799999",
    "-1",
];

/// Replaces a number by one of [`NUMBERS`] or by another one of the text, three times of four; else `other`
/// changes something. As libFuzzer wants it: `data[..size]` is the text, the new size comes back, and the same seed does the same.
pub fn mutate(
    data: &mut [u8],
    size: usize,
    max_size: usize,
    seed: u32,
    other: impl FnOnce(&mut [u8], usize, usize) -> usize,
) -> usize {
    let mut random = u64::from(seed);
    let numbers = numbers(&data[..size]);
    if draw(&mut random, 4) == 0 || numbers.is_empty() {
        return other(data, size, max_size);
    }
    let old = numbers[draw(&mut random, numbers.len())].clone();
    let new = match draw(&mut random, NUMBERS.len() * 2) {
        index if index < NUMBERS.len() => NUMBERS[index].as_bytes().to_vec(),
        _ => data[numbers[draw(&mut random, numbers.len())].clone()].to_vec(),
    };
    let text = [&data[..old.start], &new, &data[old.end..size]].concat();
    if text.len() > max_size {
        return other(data, size, max_size);
    }
    data[..text.len()].copy_from_slice(&text);
    text.len()
}

/// Where the text has digits in a row.
fn numbers(text: &[u8]) -> Vec<Range<usize>> {
    let mut found: Vec<Range<usize>> = Vec::new();
    for (at, _) in text.iter().enumerate().filter(|(_, byte)| byte.is_ascii_digit()) {
        match found.last_mut() {
            Some(last) if last.end == at => last.end = at + 1,
            _ => found.push(at..at + 1),
        }
    }
    found
}

/// A number below `bound`, which is not 0 (SplitMix64, Steele et al. 2014).
fn draw(state: &mut u64, bound: usize) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let drawn = (mixed ^ (mixed >> 31)) % u64::try_from(bound).unwrap_or(u64::MAX);
    usize::try_from(drawn).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_becomes_another_number_and_the_rest_stays() {
        let text = br#"{"seq":12,"epoch":7}"#;
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..2000 {
            let mut data = [0; 64];
            data[..text.len()].copy_from_slice(text);
            let size = mutate(&mut data, text.len(), 64, seed, |_, size, _| size);
            let value: serde_json::Value = serde_json::from_slice(&data[..size]).unwrap();
            seen.insert(value.to_string());
        }
        for expected in [r#"{"epoch":7,"seq":7}"#, r#"{"epoch":18446744073709551615,"seq":12}"#] {
            assert!(seen.contains(expected), "{expected} in {seen:?}");
        }
    }

    #[test]
    fn what_has_no_number_or_no_room_is_left_to_others() {
        for seed in 0..100 {
            assert_eq!(mutate(&mut [b'x'; 8], 8, 8, seed, |_, _, _| 3), 3);
            let size = mutate(&mut [b'1'; 4], 4, 4, seed, |_, _, _| 2);
            assert!(size <= 4);
        }
    }
}
