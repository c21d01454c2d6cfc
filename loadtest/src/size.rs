//! Sizes as people write them: `64MiB`, `1GiB`, `34PiB`, or bytes.

use std::str::FromStr;

/// Units, by their binary logarithm.
const UNITS: [(&str, u32); 6] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40), ("PiB", 50), ("", 0)];

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(u64);

impl Size {
    pub(crate) const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes = UNITS.iter().find_map(|(unit, power)| {
            let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
            number.checked_mul(1 << power)
        });
        bytes.map(Self).ok_or_else(|| format!("expected a size such as 64MiB, 1GiB or 1048576, got {text:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_overflow_is_refused() {
        for (text, bytes) in [("0", 0), ("17", 17), ("1KiB", 1024), ("34PiB", 34 << 50), ("2GiB", 2 << 30)] {
            assert_eq!(text.parse(), Ok(Size(bytes)));
        }
        for text in ["", "GiB", "1 GiB", "1GB", "-1", "99999999PiB"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}
