//! Names of files, and metadata records.

use serde_json::{Value, json};
use sluice_engine::hash::Root;
use sluice_engine::ids::{ClientFileId, FileId, TenantId};
use sluice_engine::limits::{MAX_EXPIRY_SECS, MAX_FILE_LEN, MAX_RECORD_LEN};
use sluice_engine::metadata::{MetadataFields, MetadataRecord};

pub(crate) const TENANT: TenantId = TenantId::new(7);

pub(crate) const CLIENT_ID: &str = "0193e4a0-7b1c-7def-8123-456789abcdef";

fn client(text: &str) -> ClientFileId {
    text.parse().unwrap()
}

pub(crate) fn file_ids() -> Value {
    let cases = [
        (0, "00000000-0000-0000-0000-000000000000"),
        (1, CLIENT_ID),
        (7, CLIENT_ID),
        (u64::MAX, "ffffffff-ffff-ffff-ffff-ffffffffffff"),
        (7, "9b2f6a1e-0c58-4f0d-9a55-6d1f2f0a4c11"),
    ];
    let cases = cases.map(|(tenant, text)| {
        let id = FileId::derive(TenantId::new(tenant), client(text));
        json!({ "tenant": tenant, "client_id": text, "file_id": id.to_string(), "slot": id.slot().number() })
    });
    json!(cases)
}

/// A record that uses every field.
pub(crate) fn full() -> MetadataRecord {
    let fields = MetadataFields {
        size: Some(13 * (1 << 20) + 77),
        expiry_secs: 604_800,
        expected_root: Some(Root::empty()),
        name: "bild – übersicht.png".into(),
        content_type: "image/png".into(),
        user: [("camera", "α7"), ("album", ""), ("b", "2")].map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
    };
    MetadataRecord::new(TENANT, client(CLIENT_ID), fields).unwrap()
}

pub(crate) fn vectors() -> Value {
    let plain = |size| {
        let fields = MetadataFields { size, ..MetadataFields::default() };
        MetadataRecord::new(TENANT, client(CLIENT_ID), fields).unwrap()
    };
    let valid = [full(), plain(Some(0)), plain(None), plain(Some(MAX_FILE_LEN))];
    let valid = valid.map(|record| {
        json!({
            "tenant": record.tenant().number(),
            "client_id": record.client_id().to_string(),
            "size": record.geometry().map(|file| file.size()),
            "expiry_secs": record.expiry_secs().unwrap_or(0),
            "expected_root": record.expected_root().map(|root| root.to_string()),
            "name": record.name(),
            "content_type": record.content_type(),
            "user": record.user(),
            "bytes": hex::encode(record.to_bytes()),
            "digest": record.digest().to_string(),
            "file_id": record.file_id().to_string(),
        })
    });
    json!({ "valid": valid, "invalid": invalid() })
}

/// The bytes before the name in every record.
const NAME_AT: usize = 4 + 8 + 16 + 8 + 8 + 33;

fn invalid() -> Vec<Value> {
    let good = full().to_bytes();
    let changed = |at: usize, bytes: &[u8]| {
        let mut all = good.clone();
        all[at..at + bytes.len()].copy_from_slice(bytes);
        all
    };
    // A record by hand: what no writer would write.
    let by_hand = |name: &[u8], content_type: &[u8], entries: &[(&[u8], &[u8])]| {
        let mut all = good[..NAME_AT].to_vec();
        let text = |all: &mut Vec<u8>, text: &[u8]| {
            all.extend_from_slice(&(text.len() as u16).to_be_bytes());
            all.extend_from_slice(text);
        };
        text(&mut all, name);
        text(&mut all, content_type);
        all.extend_from_slice(&(entries.len() as u16).to_be_bytes());
        for (key, value) in entries {
            text(&mut all, key);
            text(&mut all, value);
        }
        all
    };
    let many: Vec<(Vec<u8>, &[u8])> = (0..65).map(|i| (format!("k{i:02}").into_bytes(), &b""[..])).collect();
    let many: Vec<(&[u8], &[u8])> = many.iter().map(|(key, value)| (&key[..], *value)).collect();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("another magic", changed(0, b"X")),
        ("version 2", changed(3, &[2])),
        ("cut short", good[..good.len() - 1].to_vec()),
        ("nothing", Vec::new()),
        ("a byte too many", [&good[..], &[0]].concat()),
        ("a root that is neither there nor not", changed(44, &[2])),
        ("bytes in a root that is not there", changed(44, &[0])),
        ("size one over the limit", changed(28, &(MAX_FILE_LEN + 1).to_be_bytes())),
        ("expiry one over the limit", changed(36, &(MAX_EXPIRY_SECS + 1).to_be_bytes())),
        ("a name that is not UTF-8", by_hand(&[0xFF], b"", &[])),
        ("a control character in the name", by_hand(b"a\nb", b"", &[])),
        ("a control character of Latin-1 in the name", by_hand("a\u{85}b".as_bytes(), b"", &[])),
        ("a name of 1,025 bytes", by_hand(&[b'x'; 1025], b"", &[])),
        ("a content type of 256 bytes", by_hand(b"", &[b'x'; 256], &[])),
        ("a content type that is not ASCII", by_hand(b"", "ü".as_bytes(), &[])),
        ("an empty key", by_hand(b"", b"", &[(b"", b"v")])),
        ("a key of 129 bytes", by_hand(b"", b"", &[(&[b'k'; 129], b"v")])),
        ("a value of 2,049 bytes", by_hand(b"", b"", &[(b"k", &[b'v'; 2049])])),
        ("keys out of order", by_hand(b"", b"", &[(b"b", b""), (b"a", b"")])),
        ("a key twice", by_hand(b"", b"", &[(b"a", b""), (b"a", b"")])),
        ("65 entries", by_hand(b"", b"", &many)),
        ("over 16 KiB", vec![0; MAX_RECORD_LEN + 1]),
    ];
    cases
        .into_iter()
        .map(|(what, bytes)| {
            let error = MetadataRecord::from_bytes(&bytes).unwrap_err();
            // Thousands of equal bytes are told by their number.
            let len = bytes.len();
            let bytes =
                if len > MAX_RECORD_LEN { json!({ "zeros": len }) } else { json!(hex::encode(bytes)) };
            json!({ "what": what, "bytes": bytes, "error": error.code() })
        })
        .collect()
}
