//! How far the scrub of a share has come, kept as a cache: written without a sync, believed only if its check matches.
//!
//! Body in a [sealed] envelope `SLR`: the bytes that the aggregator gave. One file for each share, whose name says which:
//! `scrub` for everything, else `scrub-3-16` for share 3 of 16.

use sluice_engine::share::Share;

use crate::sealed::{self, FormatError};

const MAGIC: [u8; 4] = *b"SLR\x01";

/// The bytes of the file.
pub(crate) fn encode(mark: &[u8]) -> Vec<u8> {
    sealed::seal(MAGIC, mark)
}

/// Reads the mark.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<u8>, FormatError> {
    sealed::unseal(MAGIC, bytes).map(<[u8]>::to_vec)
}

/// The name of the file.
pub(crate) fn name(share: Share) -> String {
    match share {
        Share::WHOLE => "scrub".to_owned(),
        share => format!("scrub-{}-{}", share.index(), share.of().count()),
    }
}

/// The share of which a file of this name is.
pub(crate) fn parse_name(text: &str) -> Option<Share> {
    let share = match text.strip_prefix("scrub")?.strip_prefix('-') {
        None => Share::WHOLE,
        Some(rest) => {
            let (index, count) = rest.split_once('-')?;
            Share::new(index.parse().ok()?, count.parse().ok()?).ok()?
        }
    };
    (name(share) == text).then_some(share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let bytes = encode(b"mark");
        assert_eq!(bytes[..12], *b"SLR\x01\0\0\0\x04mark");
        assert_eq!(decode(&bytes), Ok(b"mark".to_vec()));
        assert_eq!(decode(&bytes[1..]), Err(FormatError::Magic));
    }

    #[test]
    fn names_say_of_which_share() {
        let share = Share::new(3, 16).unwrap();
        assert_eq!((name(Share::WHOLE), name(share)), ("scrub".to_owned(), "scrub-3-16".to_owned()));
        for share in [Share::WHOLE, share, Share::new(255, 256).unwrap()] {
            assert_eq!(parse_name(&name(share)), Some(share));
        }
        for text in [
            "",
            "scru",
            "scrubs",
            "scrub-",
            "scrub-0-1",
            "scrub-3-15",
            "scrub-16-16",
            "scrub-+3-16",
            "scrub-03-16",
        ] {
            assert_eq!(parse_name(text), None, "{text}");
        }
    }
}
