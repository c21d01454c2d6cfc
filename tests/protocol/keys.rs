//! Keys that everybody knows: for these vectors, and nothing else.

use serde_json::{Value, json};
use sluice_engine::ids::{DcId, KeyId};
use sluice_engine::keys::{ClusterTag, KeyRing, Purpose, SigningKey};

/// Name of the cluster of all vectors.
pub(crate) const CLUSTER: &str = "vectors";

pub(crate) const A: DcId = DcId::new(1);
pub(crate) const B: DcId = DcId::new(2);
pub(crate) const C: DcId = DcId::new(3);

/// The moment of all vectors, in Unix milliseconds.
pub(crate) const NOW: u64 = 1_795_000_000_123;

/// A datacenter's key: every byte of its seed is the same.
pub(crate) fn key(purpose: Purpose, dc: DcId) -> SigningKey {
    key_of(purpose, dc, CLUSTER)
}

/// The same key, used in another cluster.
pub(crate) fn key_of(purpose: Purpose, dc: DcId, cluster: &str) -> SigningKey {
    let number = number(purpose, dc);
    let tag = ClusterTag::of_name(cluster);
    SigningKey::from_seed(purpose, tag, dc, KeyId::new(number), &[number as u8; 32]).unwrap()
}

fn number(purpose: Purpose, dc: DcId) -> u32 {
    let base = match purpose {
        Purpose::Command => 0x10,
        Purpose::Context => 0x20,
    };
    base + u32::from(dc.number())
}

/// The keys of dc 1 and dc 2; that of dc 3 is not known.
pub(crate) fn ring(purpose: Purpose) -> KeyRing {
    let keys = [A, B].map(|dc| key(purpose, dc));
    KeyRing::new(purpose, ClusterTag::of_name(CLUSTER), keys.iter().map(|key| (key.id(), key.public())))
}

pub(crate) fn vectors() -> Value {
    let all = |purpose| -> Vec<Value> {
        [A, B, C]
            .map(|dc| {
                let key = key(purpose, dc);
                json!({
                    "id": key.id().number(),
                    "dc": dc.number(),
                    "seed": hex::encode([number(purpose, dc) as u8; 32]),
                    "public": hex::encode(key.public().bytes),
                    "known": dc != C,
                })
            })
            .into()
    };
    json!({
        "cluster": CLUSTER,
        "cluster_tag": hex::encode(ClusterTag::of_name(CLUSTER).as_bytes()),
        "command": all(Purpose::Command),
        "context": all(Purpose::Context),
        "token": { "seed": hex::encode(crate::sessions::TOKEN_SEED),
                   "public": hex::encode(crate::sessions::token_public()) },
    })
}
