//! Lengths of time in files.

use std::time::Duration;

use serde::Deserialize;

/// A length of time such as `10min`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Length(pub(crate) Duration);

impl TryFrom<String> for Length {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let length = humantime::parse_duration(&text);
        length.map(Self).map_err(|error| format!("expected a length of time such as 90s or 15min: {error}"))
    }
}

/// When files of a datacenter that is gone are taken over, if ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Takeover(pub(crate) Option<Duration>);

impl TryFrom<String> for Takeover {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text == "never" {
            Ok(Self(None))
        } else {
            Length::try_from(text).map(|Length(length)| Self(Some(length)))
        }
    }
}
