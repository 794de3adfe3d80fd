//! Sizes in bytes that cannot be mistaken for MiB.

use std::fmt;
use std::str::FromStr;

/// A number of bytes. In configuration files and messages: `512 MiB`, `20 GiB` (powers of 1024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// `count` × 1024² bytes.
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }
    /// `count` × 1024³ bytes.
    pub const fn gib(count: u64) -> Self {
        Self(count << 30)
    }
    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
    /// Whole MiB, rounded down: the unit of E2B's `memoryMB` and `diskSizeMB`.
    pub const fn whole_mib(self) -> u64 {
        self.0 >> 20
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            let one = 1u64 << shift;
            if self.0 >= one {
                let (whole, tenths) = (self.0 / one, u128::from(self.0 % one) * 10 / u128::from(one));
                return match tenths {
                    0 => write!(f, "{whole} {unit}"),
                    _ => write!(f, "{whole}.{tenths} {unit}"),
                };
            }
        }
        write!(f, "{} B", self.0)
    }
}

/// The text was not a number with an optional unit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a size; write bytes or a whole number with KiB, MiB, GiB or TiB, such as '20 GiB'")]
pub struct ParseSizeError(String);

impl FromStr for ByteSize {
    type Err = ParseSizeError;
    fn from_str(text: &str) -> Result<Self, ParseSizeError> {
        let wrong = || ParseSizeError(text.chars().take(64).collect());
        let trimmed = text.trim();
        let digits = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
        let count: u64 = trimmed[..digits].parse().map_err(|_| wrong())?;
        let shift = match trimmed[digits..].trim() {
            "" | "B" => 0,
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            "TiB" => 40,
            _ => return Err(wrong()),
        };
        count.checked_mul(1 << shift).map(Self).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_printed_in_the_largest_unit_that_fits() {
        assert_eq!(ByteSize(0).to_string(), "0 B");
        assert_eq!(ByteSize(1536).to_string(), "1.5 KiB");
        assert_eq!(ByteSize::gib(20).to_string(), "20 GiB");
        assert_eq!(ByteSize(u64::MAX).to_string(), "16777215.9 TiB");
    }

    #[test]
    fn a_size_with_a_unit_is_read_and_nonsense_is_named() {
        assert_eq!("20 GiB".parse(), Ok(ByteSize::gib(20)));
        assert_eq!("4096".parse(), Ok(ByteSize(4096)));
        assert!("20 GB".parse::<ByteSize>().unwrap_err().to_string().contains("'20 GB' is not a size"));
        assert!("99999999999999999 TiB".parse::<ByteSize>().is_err());
    }
}
