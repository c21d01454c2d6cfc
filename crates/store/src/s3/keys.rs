//! Where things lie in a bucket, under the prefix of one datacenter.
//!
//! ```text
//! node/<link>                                     what belongs to no file
//! states/<share>/<link>                           what the aggregator of a share remembers, if that is not everything
//! scrub  scrub-<index>-<of>                       how far the scrub has come, of all files or of a share
//! files/<slot>/<file>/<link>                      what is known of a file
//! incoming/<slot>/<file>/<life>/<start>-<level>-<values>.<epoch>  a run as it came: 2^level chunks, and the value of each
//! assembled/<slot>/<file>/<life>/<root>-<segment> the bytes of a segment of a whole file: an ordinary object
//! values/<slot>/<file>/<life>/<root>-<segment>    the values of its chunks
//! names/<tenant>/<client's id>                    a file that came whole, for lists; empty
//! pages/<slot>/<file>/<segment>                   a page of the file's ledger
//! keepers/<epoch>-<nonce>                         who keeps the bucket; empty
//! check/porter-<id>                               that a porter has the same bucket; empty
//! check/<random>                                  what the check of rights leaves if it is cut short
//! ```
//!
//! A share is `<index>-<of>`. Slot, share, link, life, start, segment, epoch and tenant are hexadecimal of fixed width, so that a list comes in their order. Values
//! are 43 characters of base64url each. The longest key, eight values, has 424 bytes beside the prefix; S3 takes 1,024.
//!
//! A *life* is the time from a file's first chunk until its chunks are freed or it is forgotten, and has a random number.
//! What a request of an earlier life that lands late puts or deletes is nothing that counts.
//!
//! An *epoch* is the time for which one process keeps the bucket, and later ones have higher numbers. Who keeps it compares
//! a run with all that is there before it lets the run be put. So of two that contradict each other the one of the earlier epoch landed
//! after it was looked for, and nobody was told that it is durable: the later one counts. What older versions put has no
//! epoch in its key, and is of the earliest.

use std::fmt;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use sluice_engine::geometry::{ChunkIndex, Run};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{ClientFileId, FileId, TenantId};
use sluice_engine::share::Share;

/// Characters of a value.
const VALUE_LEN: usize = 43;

/// The longest prefix that leaves room for every key, in bytes.
pub(crate) const MAX_PREFIX_LEN: usize = 512;

/// A life of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Life(pub(crate) u32);

impl Life {
    /// Another one.
    pub(crate) fn begin() -> Self {
        Self(rand::random())
    }
}

/// The time for which one process keeps the bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Epoch(pub(crate) u32);

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// One of the parts of the bucket in which keys are by slot and file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// What is known of files.
    Files,
    /// Runs as they came.
    Incoming,
    /// Bytes of whole files.
    Assembled,
    /// Values of their chunks.
    Values,
    /// Pages of ledgers.
    Pages,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Files => "files",
            Self::Incoming => "incoming",
            Self::Assembled => "assembled",
            Self::Values => "values",
            Self::Pages => "pages",
        }
    }

    /// What the keys of this part begin with.
    pub(crate) fn prefix(self) -> String {
        format!("{}/", self.name())
    }

    /// What the keys of a file in this part begin with.
    pub(crate) fn of(self, file: FileId) -> String {
        format!("{}/{:03x}/{file}/", self.name(), file.slot().number())
    }

    /// What no key of this file, nor of one before it, comes after.
    pub(crate) fn past(self, file: FileId) -> String {
        format!("{}/{:03x}/{file}0", self.name(), file.slot().number())
    }

    /// The file that a key of this part is about, and the key's last component.
    pub(crate) fn parse(self, key: &str) -> Option<(FileId, &str)> {
        let rest = key.strip_prefix(self.name())?.strip_prefix('/')?;
        let (slot, rest) = rest.split_once('/')?;
        let (file, last) = rest.split_once('/')?;
        let file: FileId = file.parse().ok()?;
        (slot == format!("{:03x}", file.slot().number())).then_some((file, last))
    }
}

/// A link of the chain of what is known of a file.
pub(crate) fn link(file: FileId, link: u32) -> String {
    format!("{}{link:08x}", Part::Files.of(file))
}

/// A link of the chain of what belongs to no file.
pub(crate) fn node(link: u32) -> String {
    format!("node/{link:08x}")
}

/// A link of the chain of the state of a share.
pub(crate) fn state(share: Share, link: u32) -> String {
    format!("states/{:02x}-{:03x}/{link:08x}", share.index(), share.of().count())
}

/// The bytes of a segment of a whole file.
pub(crate) fn assembled(file: FileId, life: Life, root: Root, segment: u64) -> String {
    format!("{}{life}/{root}-{segment:05x}", Part::Assembled.of(file))
}

/// The values of a segment of a whole file.
pub(crate) fn values(file: FileId, life: Life, root: Root, segment: u64) -> String {
    format!("{}{life}/{root}-{segment:05x}", Part::Values.of(file))
}

/// The life and the rest of what follows a file in a key.
pub(crate) fn parse_life(rest: &str) -> Option<(Life, &str)> {
    let (life, rest) = rest.split_once('/')?;
    let number = u32::from_str_radix(life, 16).ok().filter(|_| life.len() == 8)?;
    Some((Life(number), rest))
}

/// What the runs of a life of a file begin with.
pub(crate) fn runs(file: FileId, life: Life) -> String {
    format!("{}{life}/", Part::Incoming.of(file))
}

/// A page of a file's ledger.
pub(crate) fn page(file: FileId, segment: u64) -> String {
    format!("{}{segment:05x}", Part::Pages.of(file))
}

/// What says who keeps the bucket begins with this.
pub(crate) const KEEPERS: &str = "keepers/";

/// That somebody keeps the bucket.
pub(crate) fn keeper((epoch, nonce): (Epoch, u64)) -> String {
    format!("{KEEPERS}{:08x}-{nonce:016x}", epoch.0)
}

/// Who.
pub(crate) fn parse_keeper(key: &str) -> Option<(Epoch, u64)> {
    let (epoch, nonce) = key.strip_prefix(KEEPERS)?.split_once('-')?;
    let number = |text: &str, len: usize| u64::from_str_radix(text, 16).ok().filter(|_| text.len() == len);
    Some((Epoch(u32::try_from(number(epoch, 8)?).ok()?), number(nonce, 16)?))
}

/// That a porter has the same bucket.
pub(crate) fn porter(id: u64) -> String {
    format!("check/porter-{id:016x}")
}

/// What the names of a tenant begin with.
pub(crate) fn names(tenant: TenantId) -> String {
    format!("names/{:016x}/", tenant.number())
}

/// The name of a file that came whole.
pub(crate) fn name(tenant: TenantId, client: ClientFileId) -> String {
    format!("{}{client}", names(tenant))
}

/// Whose name it is.
pub(crate) fn parse_name(key: &str) -> Option<(TenantId, ClientFileId)> {
    let (tenant, client) = key.strip_prefix("names/")?.split_once('/')?;
    let tenant = u64::from_str_radix(tenant, 16).ok().filter(|_| tenant.len() == 16)?;
    Some((TenantId::new(tenant), client.parse().ok()?))
}

/// A run as it came.
pub(crate) fn incoming(file: FileId, life: Life, run: Run, values: &[ChainingValue], epoch: Epoch) -> String {
    let level = run.count().trailing_zeros();
    let mut key = format!("{}{:09x}-{level}-", runs(file, life), run.start().number());
    for value in values {
        BASE64_URL_SAFE_NO_PAD.encode_string(value.as_bytes(), &mut key);
    }
    if epoch != Epoch::default() {
        key.push_str(&format!(".{:08x}", epoch.0));
    }
    key
}

/// The run, the values and the epoch that the last component of an incoming key names.
pub(crate) fn parse_incoming(name: &str) -> Option<(Run, Vec<ChainingValue>, Epoch)> {
    let (name, epoch) = match name.split_once('.') {
        Some((name, epoch)) => {
            (name, u32::from_str_radix(epoch, 16).ok().filter(|number| *number > 0 && epoch.len() == 8)?)
        }
        None => (name, 0),
    };
    let (start, rest) = name.split_at_checked(9)?;
    let start = ChunkIndex::new(u64::from_str_radix(start, 16).ok()?).ok()?;
    let (level, values) = rest.strip_prefix('-')?.split_at_checked(2)?;
    let level: u32 = level.strip_suffix('-')?.parse().ok()?;
    let run = Run::new(start, 1u64.checked_shl(level)?).ok()?;
    let mut found = Vec::with_capacity(run.count() as usize);
    for value in values.as_bytes().chunks(VALUE_LEN) {
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(value).ok()?;
        found.push(ChainingValue::from_bytes(bytes.try_into().ok()?));
    }
    (found.len() as u64 == run.count()).then_some((run, found, Epoch(epoch)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE: FileId = FileId::from_bytes([0xAB; 16]);

    #[test]
    fn golden_keys() {
        let run = Run::new(ChunkIndex::new(6).unwrap(), 2).unwrap();
        let values = [ChainingValue::from_bytes([0; 32]), ChainingValue::from_bytes([0xFF; 32])];
        let id = "abababab-abab-abab-abab-abababababab";
        assert_eq!(
            incoming(FILE, Life(5), run, &values, Epoch(0)),
            format!("incoming/aba/{id}/00000005/000000006-1-{}{}8", "A".repeat(43), "_".repeat(42))
        );
        assert_eq!(
            incoming(FILE, Life(5), run, &values, Epoch(26)),
            format!("incoming/aba/{id}/00000005/000000006-1-{}{}8.0000001a", "A".repeat(43), "_".repeat(42))
        );
        assert_eq!(link(FILE, 1), format!("files/aba/{id}/00000001"));
        assert_eq!(state(Share::new(10, 16).unwrap(), 1), "states/0a-010/00000001");
        assert_eq!(keeper((Epoch(26), 255)), "keepers/0000001a-00000000000000ff");
        assert_eq!(parse_keeper("keepers/0000001a-00000000000000ff"), Some((Epoch(26), 255)));
        assert_eq!(porter(255), "check/porter-00000000000000ff");
        assert_eq!(page(FILE, 17), format!("pages/aba/{id}/00011"));
        let root = Root::from_bytes([1; 32]);
        assert_eq!(
            assembled(FILE, Life(5), root, 2),
            format!("assembled/aba/{id}/00000005/{}-00002", "01".repeat(32))
        );
        let client: ClientFileId = "0193e4a0-7b1c-7def-8123-456789abcdef".parse().unwrap();
        let name = name(TenantId::new(7), client);
        assert_eq!(name, format!("names/0000000000000007/{client}"));
        assert_eq!(parse_name(&name), Some((TenantId::new(7), client)));
    }

    #[test]
    fn the_longest_key_fits() {
        let run = Run::new(ChunkIndex::new(sluice_engine::limits::MAX_CHUNKS - 8).unwrap(), 8).unwrap();
        let values = [ChainingValue::from_bytes([3; 32]); 8];
        let key = incoming(FILE, Life(u32::MAX), run, &values, Epoch(u32::MAX));
        assert!(MAX_PREFIX_LEN + key.len() <= 1024, "{}", key.len());
        assert!(Part::Incoming.past(FILE) > key && key > Part::Incoming.of(FILE));
    }

    proptest! {
        #[test]
        fn runs_round_trip(file: [u8; 16], start in 0..sluice_engine::limits::MAX_CHUNKS / 8, level in 0..4u32,
                           seed: [u8; 32], epoch: u32) {
            let file = FileId::from_bytes(file);
            let run = Run::new(ChunkIndex::new(start * 8).unwrap(), 1 << level).unwrap();
            let values: Vec<ChainingValue> = (0..run.count())
                .map(|i| ChainingValue::from_bytes(seed.map(|byte| byte.wrapping_add(i as u8))))
                .collect();
            let key = incoming(file, Life(7), run, &values, Epoch(epoch));
            let (found, rest) = Part::Incoming.parse(&key).unwrap();
            let (life, name) = parse_life(rest).unwrap();
            prop_assert_eq!((found, life), (file, Life(7)));
            prop_assert_eq!(parse_incoming(name), Some((run, values, Epoch(epoch))));
            prop_assert_eq!(parse_incoming(&name[..name.len() - 1]), None);
        }

        #[test]
        fn nothing_else_is_taken_for_a_key(text: String) {
            prop_assert_eq!(parse_incoming(&text), None);
            prop_assert_eq!(Part::Files.parse(&text), None);
            prop_assert_eq!(parse_name(&text), None);
            prop_assert_eq!(parse_keeper(&text), None);
        }
    }
}
