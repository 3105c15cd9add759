//! Durations as the source of a function declares them, before anybody calls it (requirement A14).
//!
//! The judge is [`check_legal`], as for every call; here is only what the client does with a number of the source before
//! it sends it.

use super::{Demand, Payer, check_legal, longest_legal_ms};
use crate::ids::Size;

impl Demand {
    /// The call of a function whose source declares so many seconds. The client multiplies all but `xlarge` (L19) and sends
    /// whole seconds; of two that are equally near it takes the even one, as Python rounds.
    pub const fn of_source(size: Size, seconds: u64, weight: u64, duration_factor_percent: u64) -> Self {
        let percent = match size {
            Size::Large => duration_factor_percent,
            Size::Xlarge => 100,
        };
        let product = seconds.saturating_mul(percent);
        let (whole, rest) = (product / 100, product % 100);
        let sent = if rest > 50 || (rest == 50 && whole % 2 == 1) { whole + 1 } else { whole };
        Self { size, weight, declared_ms: sent.saturating_mul(1000), shortened: None, duration_factor_percent }
    }
}

/// Refuses what would be an illegal duration for an account that has used nothing. The refusal is the largest number of
/// seconds that the source of a function of this size could declare instead; 0 if every number would be refused.
///
/// # Errors
/// The duration is illegal.
pub fn check_source(payer: Payer<'_>, demand: &Demand) -> Result<(), u64> {
    if check_legal(payer, demand).is_ok() {
        return Ok(());
    }
    let longest_s = longest_legal_ms(payer, demand) / 1000;
    let Demand { size, weight, duration_factor_percent, .. } = *demand;
    let seconds = match size {
        Size::Large => longest_s.saturating_mul(100) / duration_factor_percent.max(1),
        Size::Xlarge => longest_s,
    };
    // The client may round up what is just short enough.
    let fits =
        |seconds: &u64| check_legal(payer, &Demand::of_source(size, *seconds, weight, duration_factor_percent)).is_ok();
    Err([seconds, seconds.saturating_sub(1)].into_iter().find(fits).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::super::Allowance;
    use super::*;
    use crate::ids::LedgerTime;
    use crate::page::Page;

    fn check(longest_call_s: u64, demand: &Demand) -> Result<(), u64> {
        let allowance = Allowance {
            base_ms: 120_000,
            per_cookie_ms: None,
            longest_call_ms: longest_call_s * 1000,
            runs_per_window: None,
            generation: 1,
            grants: Vec::new(),
        };
        check_source(Payer { page: &Page::default(), allowance: &allowance, cookie: None, at: LedgerTime(0) }, demand)
    }

    #[test]
    fn the_client_multiplies_and_rounds_as_python_does() {
        let sent = |size, seconds, percent| Demand::of_source(size, seconds, 1, percent).declared_ms;
        assert_eq!([60, 45, 27].map(|seconds| sent(Size::Large, seconds, 150)), [90_000, 68_000, 40_000]);
        assert_eq!(sent(Size::Xlarge, 45, 150), 45_000);
        assert_eq!(sent(Size::Large, 45, 100), 45_000);
    }

    #[test]
    fn a_refusal_says_what_the_source_may_declare() {
        let large = |seconds, percent| Demand::of_source(Size::Large, seconds, 1, percent);
        assert_eq!(check(60, &large(60, 100)), Ok(()));
        assert_eq!(check(60, &large(300, 100)), Err(60));
        assert_eq!(check(60, &large(60, 150)), Ok(()), "both sides are multiplied (L19)");
        assert_eq!(check(60, &large(61, 150)), Err(60));
        assert_eq!(check(45, &large(45, 150)), Ok(()), "68 s are sent of 67.5 s, and 45 s are the limit");
        assert_eq!(check(45, &large(46, 150)), Err(45));
        assert_eq!(check(90, &Demand::of_source(Size::Xlarge, 90, 2, 100)), Err(60), "the whole quota is worth 60 s");
        assert_eq!(check(60, &large(0, 100)), Err(60), "no time at all is illegal too");
        assert_eq!(check(0, &large(1, 100)), Err(0));
    }
}
