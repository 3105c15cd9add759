//! The numbers of a report that may have a goal.

use std::fmt;

/// A line for each number: its name, `width` wide, the number, and its goal if it has one, which is the most that it may be.
pub(super) fn lines(
    formatter: &mut fmt::Formatter<'_>,
    width: usize,
    numbers: &[(&str, f64, Option<f64>)],
) -> fmt::Result {
    for (name, value, goal) in numbers {
        write!(formatter, "{name:<width$}{value:>9.2}")?;
        match goal {
            Some(goal) if value <= goal => writeln!(formatter, "   goal {goal}: met")?,
            Some(goal) => writeln!(formatter, "   goal {goal}: missed")?,
            None => writeln!(formatter)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Numbers([(&'static str, f64, Option<f64>); 4]);

    impl fmt::Display for Numbers {
        fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            lines(formatter, 6, &self.0)
        }
    }

    #[test]
    fn a_goal_is_met_up_to_its_own_number_and_none_is_not_told() {
        let numbers = Numbers([
            ("below", 1.0, Some(1.5)),
            ("at", 1.5, Some(1.5)),
            ("above", 1.6, Some(1.5)),
            ("free", 7.0, None),
        ]);
        let told = [
            "below      1.00   goal 1.5: met",
            "at         1.50   goal 1.5: met",
            "above      1.60   goal 1.5: missed",
            "free       7.00",
        ];
        assert_eq!(numbers.to_string().lines().collect::<Vec<_>>(), told);
    }
}
