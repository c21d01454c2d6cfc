//! Good examples with something wrong.

use std::sync::LazyLock;

use bolero::TypeGenerator;
use serde_json::Value;

/// One thing that goes wrong; positions are taken modulo the length.
#[derive(Clone, Debug, TypeGenerator)]
pub(crate) enum Edit {
    Flip {
        at: u16,
        bit: u8,
    },
    Set {
        at: u16,
        byte: u8,
    },
    /// A number of 2, 4 or 8 bytes that is an edge.
    Number {
        at: u16,
        width: u8,
        which: u8,
    },
    Cut {
        at: u16,
    },
    Remove {
        at: u16,
        count: u8,
    },
    Insert {
        at: u16,
        bytes: Vec<u8>,
    },
    /// Goes on as another example does.
    Splice {
        other: u16,
        at: u16,
    },
}

/// An example and what goes wrong with it, or noise.
#[derive(Clone, Debug, TypeGenerator)]
pub(crate) enum Mangled {
    Example { which: u16, edits: Vec<Edit> },
    Begun { which: u16, keep: u8, then: Vec<u8> },
    Noise(Vec<u8>),
}

const EDGES: [u64; 10] =
    [0, 1, 0x7F, 0xFF, 0x100, 0x7FFF_FFFF, 0xFFFF_FFFF, 36_507_222_016, u64::MAX - 1, u64::MAX];

impl Edit {
    pub(crate) fn apply(&self, bytes: &mut Vec<u8>, examples: &[Vec<u8>]) {
        let len = bytes.len();
        let place = |at: u16| usize::from(at) % len.max(1);
        match self {
            Self::Insert { at, bytes: new } => {
                let at = place(*at).min(len);
                bytes.splice(at..at, new.iter().copied());
            }
            Self::Splice { other, at } => {
                let other = &examples[usize::from(*other) % examples.len()];
                let at = place(*at);
                bytes.truncate(at);
                bytes.extend_from_slice(other.get(at..).unwrap_or(&[]));
            }
            _ if len == 0 => {}
            Self::Flip { at, bit } => bytes[place(*at)] ^= 1 << (bit % 8),
            Self::Set { at, byte } => bytes[place(*at)] = *byte,
            Self::Number { at, width, which } => {
                let number = EDGES[usize::from(*which) % EDGES.len()].to_be_bytes();
                let number = &number[8 - (2 << (width % 3))..];
                let at = place(*at);
                let fits = number.len().min(len - at);
                bytes[at..at + fits].copy_from_slice(&number[..fits]);
            }
            Self::Cut { at } => bytes.truncate(place(*at)),
            Self::Remove { at, count } => {
                let at = place(*at);
                bytes.drain(at..(at + usize::from(*count)).min(len));
            }
        }
    }
}

impl Mangled {
    pub(crate) fn bytes(&self, examples: &[Vec<u8>]) -> Vec<u8> {
        let example = |which: u16| examples[usize::from(which) % examples.len()].clone();
        match self {
            Self::Example { which, edits } => {
                let mut bytes = example(*which);
                edits.iter().take(4).for_each(|edit| edit.apply(&mut bytes, examples));
                bytes
            }
            Self::Begun { which, keep, then } => {
                let mut bytes = example(*which);
                bytes.truncate(usize::from(*keep));
                bytes.extend_from_slice(then);
                bytes
            }
            Self::Noise(bytes) => bytes.clone(),
        }
    }
}

static VECTORS: LazyLock<Value> = LazyLock::new(|| {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/vectors.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
});

/// The vectors of a section, valid and not.
pub(crate) fn vectors(section: &str, member: &str) -> Vec<Vec<u8>> {
    let of = |kind: &str| VECTORS[section][kind].as_array().unwrap().iter();
    let texts = of("valid").chain(of("invalid")).filter_map(|case| case[member].as_str());
    let bytes = texts.map(|text| hex::decode(text).unwrap_or_else(|_| text.as_bytes().to_vec()));
    bytes.collect()
}

/// The valid ones alone.
pub(crate) fn valid(section: &str, member: &str) -> Vec<Vec<u8>> {
    let count = VECTORS[section]["valid"].as_array().unwrap().len();
    vectors(section, member).into_iter().take(count).collect()
}

/// The keys that the vectors count on: id, datacenter and seed.
pub(crate) fn keys(purpose: &str) -> Vec<(u32, u16, Vec<u8>)> {
    let keys = VECTORS["keys"][purpose].as_array().unwrap().iter();
    let number = |value: &Value| value.as_u64().unwrap();
    let known = keys.filter(|key| key["known"] == true);
    known
        .map(|key| {
            let seed = hex::decode(key["seed"].as_str().unwrap()).unwrap();
            (number(&key["id"]) as u32, number(&key["dc"]) as u16, seed)
        })
        .collect()
}

pub(crate) fn token_public() -> [u8; 32] {
    let text = VECTORS["keys"]["token"]["public"].as_str().unwrap();
    hex::decode(text).unwrap().try_into().unwrap()
}

pub(crate) fn cluster() -> String {
    VECTORS["keys"]["cluster"].as_str().unwrap().to_owned()
}

pub(crate) fn now() -> u64 {
    VECTORS["contexts"]["now"].as_u64().unwrap()
}
