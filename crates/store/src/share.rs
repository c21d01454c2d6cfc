//! What is kept of shares: the floors of generations, and how shares are written down.
//!
//! | bytes | field |
//! | --- | --- |
//! | 1 | how many bits of its files' ids are the same: 0 to 8 |
//! | 1 | index |
//!
//! Several of them, with what is kept of each, are a number of 2 bytes in front, and then rise.

use std::collections::BTreeMap;

use sluice_engine::ids::{FileId, Generation};
use sluice_engine::share::Share;

use crate::MAX_STATE_LEN;
use crate::sealed::{FormatError, Reader, push_block};

/// How many shares there can be, all divisions taken together: 1 + 2 + 4 + … + 256.
pub(crate) const MAX_SHARES: usize = 511;

/// Bytes of a share.
pub(crate) const SHARE_LEN: usize = 2;

/// What aggregators remember that belongs to no file, by share. Those that remember nothing are not in here.
pub(crate) type States = BTreeMap<Share, Vec<u8>>;

/// The lowest generations that files can have, by share. A file's floor is the highest of all shares that it is in, so that
/// no generation falls when the slots are divided otherwise. Those of which nothing was said are not in here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Floors(BTreeMap<Share, Generation>);

impl Floors {
    /// Those of a store in which the slots were never divided.
    pub(crate) fn of_whole(floor: Generation) -> Self {
        let mut floors = Self::default();
        floors.raise(Share::WHOLE, floor);
        floors
    }

    /// The floor of all files, if nothing was said of any other share.
    pub(crate) fn only_whole(&self) -> Option<Generation> {
        let whole = self.0.get(&Share::WHOLE);
        (self.0.len() == usize::from(whole.is_some())).then(|| whole.copied().unwrap_or_default())
    }

    /// The lowest generation that a file can have.
    pub(crate) fn of(&self, file: FileId) -> Generation {
        let floors = self.0.iter().filter(|(share, _)| share.has(file)).map(|(_, floor)| *floor);
        floors.max().unwrap_or_default()
    }

    /// Raises the floor of a share. Whether it was lower.
    pub(crate) fn raise(&mut self, share: Share, floor: Generation) -> bool {
        let was = self.0.get(&share).copied().unwrap_or_default();
        let rises = floor > was;
        if rises {
            self.0.insert(share, floor);
        }
        rises
    }

    /// Appends them: 8 bytes for each.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        push_all(out, self.0.iter(), |out, floor| out.extend_from_slice(&floor.number().to_be_bytes()));
    }

    /// Reads them.
    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let floor = |reader: &mut Reader<'_>| match reader.u64()? {
            0 => Err(FormatError::Impossible("floor")),
            floor => Ok(Generation::new(floor)),
        };
        Ok(Self(read_all(reader, floor)?))
    }
}

/// Replaces the state of a share.
pub(crate) fn put_state(states: &mut States, share: Share, state: Vec<u8>) {
    match state.is_empty() {
        true => states.remove(&share),
        false => states.insert(share, state),
    };
}

/// Reads the state of one share, which is no longer than any can be.
pub(crate) fn read_state(reader: &mut Reader<'_>) -> Result<Vec<u8>, FormatError> {
    let state = reader.block()?;
    if state.len() > MAX_STATE_LEN {
        return Err(FormatError::Impossible("length of a state"));
    }
    Ok(state.to_vec())
}

/// Appends the states of all shares.
pub(crate) fn push_states(out: &mut Vec<u8>, states: &States) {
    push_all(out, states.iter(), |out, state| push_block(out, state));
}

/// Reads the states of all shares.
pub(crate) fn read_states(reader: &mut Reader<'_>) -> Result<States, FormatError> {
    let state = |reader: &mut Reader<'_>| match read_state(reader)? {
        state if state.is_empty() => Err(FormatError::Impossible("state")),
        state => Ok(state),
    };
    read_all(reader, state)
}

/// Appends a share.
pub(crate) fn push(out: &mut Vec<u8>, share: Share) {
    out.extend_from_slice(&[share.bits(), share.index() as u8]);
}

/// Reads a share.
pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Share, FormatError> {
    let [bits, index] = reader.array::<SHARE_LEN>()?;
    let count = 1u32.checked_shl(bits.into()).unwrap_or_default();
    Share::new(index.into(), count).map_err(|_| FormatError::Impossible("share"))
}

/// Reads a share that is not everything: what is of that has forms of its own, which older processes read.
pub(crate) fn read_part(reader: &mut Reader<'_>) -> Result<Share, FormatError> {
    match read(reader)? {
        Share::WHOLE => Err(FormatError::Impossible("share")),
        share => Ok(share),
    }
}

/// Appends shares, with something of each.
pub(crate) fn push_all<'a, T>(
    out: &mut Vec<u8>,
    all: impl ExactSizeIterator<Item = (&'a Share, T)>,
    with: impl Fn(&mut Vec<u8>, T),
) {
    out.extend_from_slice(&(all.len() as u16).to_be_bytes());
    for (share, of_it) in all {
        push(out, *share);
        with(out, of_it);
    }
}

/// Reads shares, with something of each.
pub(crate) fn read_all<'a, T>(
    reader: &mut Reader<'a>,
    with: impl Fn(&mut Reader<'a>) -> Result<T, FormatError>,
) -> Result<BTreeMap<Share, T>, FormatError> {
    let count = usize::from(u16::from_be_bytes(reader.array()?));
    if count > MAX_SHARES {
        return Err(FormatError::Impossible("number of shares"));
    }
    let mut all = BTreeMap::new();
    for _ in 0..count {
        let share = read(reader)?;
        if all.last_key_value().is_some_and(|(last, _)| *last >= share) {
            return Err(FormatError::Impossible("order of shares"));
        }
        all.insert(share, with(reader)?);
    }
    Ok(all)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use sluice_engine::share::Shares;

    pub(crate) fn share() -> impl Strategy<Value = Share> {
        (0..=8u32, any::<u32>()).prop_map(|(bits, index)| Share::new(index % (1 << bits), 1 << bits).unwrap())
    }

    pub(crate) fn floors() -> impl Strategy<Value = Floors> {
        prop::collection::btree_map(share(), (1..=u64::MAX).prop_map(Generation::new), 0..20).prop_map(Floors)
    }

    pub(crate) fn states() -> impl Strategy<Value = States> {
        prop::collection::btree_map(share(), prop::collection::vec(any::<u8>(), 1..99), 0..20)
    }

    fn every_share() -> impl Iterator<Item = Share> {
        (0..=8u32).flat_map(|bits| Shares::new(1 << bits).unwrap().all())
    }

    #[test]
    fn golden_bytes() {
        let mut floors = Floors::of_whole(Generation::new(2));
        assert_eq!(floors.only_whole(), Some(Generation::new(2)));
        floors.raise(Share::new(3, 16).unwrap(), Generation::new(5));
        assert_eq!(floors.only_whole(), None);
        let mut bytes = Vec::new();
        floors.encode(&mut bytes);
        assert_eq!(bytes, b"\0\x02\0\0\0\0\0\0\0\0\0\x02\x04\x03\0\0\0\0\0\0\0\x05");
        let states = States::from([(Share::new(255, 256).unwrap(), b"st".to_vec())]);
        let mut bytes = Vec::new();
        push_states(&mut bytes, &states);
        assert_eq!(bytes, b"\0\x01\x08\xff\0\0\0\x02st");
    }

    #[test]
    fn all_shares_that_can_be_are_taken_and_no_more() {
        assert_eq!(every_share().count(), MAX_SHARES);
        let mut floors = Floors::default();
        for share in every_share() {
            assert!(floors.raise(share, Generation::new(1)));
        }
        let mut bytes = Vec::new();
        floors.encode(&mut bytes);
        assert_eq!(Floors::decode(&mut Reader(&bytes)), Ok(floors));
        bytes[..2].copy_from_slice(&(MAX_SHARES as u16 + 1).to_be_bytes());
        bytes.extend_from_slice(&[8, 255, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(Floors::decode(&mut Reader(&bytes)), Err(FormatError::Impossible("number of shares")));
    }

    #[test]
    fn what_says_nothing_or_is_no_share_is_refused() {
        for (bytes, wrong) in [
            (&b"\0\x01\x09\0\0\0\0\0\0\0\0\x01"[..], "share"),
            (b"\0\x01\xff\0\0\0\0\0\0\0\0\x01", "share"),
            (b"\0\x01\x01\x02\0\0\0\0\0\0\0\x01", "share"),
            (b"\0\x01\x01\x01\0\0\0\0\0\0\0\0", "floor"),
            (b"\0\x02\x01\x01\0\0\0\0\0\0\0\x01\x01\x01\0\0\0\0\0\0\0\x02", "order of shares"),
            (b"\0\x02\x01\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\x02", "order of shares"),
        ] {
            assert_eq!(Floors::decode(&mut Reader(bytes)), Err(FormatError::Impossible(wrong)));
        }
        assert_eq!(read_states(&mut Reader(b"\0\x01\x01\0\0\0\0\0")), Err(FormatError::Impossible("state")));
        let mut long = b"\0\x01\x01\0".to_vec();
        push_block(&mut long, &vec![1; MAX_STATE_LEN + 1]);
        assert_eq!(read_states(&mut Reader(&long)), Err(FormatError::Impossible("length of a state")));
        assert_eq!(read_part(&mut Reader(&[0, 0])), Err(FormatError::Impossible("share")));
    }

    #[test]
    fn a_share_that_remembers_nothing_is_not_kept() {
        let mut states = States::new();
        put_state(&mut states, Share::WHOLE, b"one".to_vec());
        assert_eq!(states.len(), 1);
        put_state(&mut states, Share::WHOLE, Vec::new());
        assert_eq!(states, States::new());
    }

    proptest! {
        #[test]
        fn a_file_has_the_highest_floor_of_all_its_shares_and_none_falls(
            raised in prop::collection::vec((share(), any::<u64>()), 0..20), file: [u8; 16],
        ) {
            let file = FileId::from_bytes(file);
            let mut floors = Floors::default();
            let mut expected = 0;
            for (share, floor) in raised {
                if share.has(file) {
                    expected = expected.max(floor);
                }
                floors.raise(share, Generation::new(floor));
                prop_assert_eq!(floors.of(file), Generation::new(expected));
                let first = share.first();
                prop_assert!(floors.of(first) >= Generation::new(floor));
            }
        }

        #[test]
        fn round_trips(floors in floors(), states in states()) {
            let mut bytes = Vec::new();
            floors.encode(&mut bytes);
            push_states(&mut bytes, &states);
            let mut reader = Reader(&bytes);
            prop_assert_eq!(Floors::decode(&mut reader), Ok(floors));
            prop_assert_eq!(read_states(&mut reader), Ok(states));
            prop_assert_eq!(reader.end(), Ok(()));
        }

        #[test]
        fn anything_that_is_accepted_is_written_the_same(bytes in prop::collection::vec(0..9u8, 0..40)) {
            let mut reader = Reader(&bytes);
            if let Ok(floors) = Floors::decode(&mut reader) {
                let mut again = Vec::new();
                floors.encode(&mut again);
                prop_assert_eq!(&again[..], &bytes[..bytes.len() - reader.0.len()]);
            }
        }
    }
}
