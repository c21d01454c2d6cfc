//! `docs/vectors.json` says what the code says: made anew with `UPDATE=1`, and compared otherwise.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::{Value, json};
use sluice_engine::limits::{
    CHUNK_LEN, CLOCK_TOLERANCE_MS, MAX_CHUNKS, MAX_CONTENT_TYPE_LEN, MAX_CONTEXT_LIFE_MS, MAX_DCS,
    MAX_EXPIRY_SECS, MAX_FILE_LEN, MAX_LEVEL, MAX_NAME_LEN, MAX_RECORD_LEN, MAX_RUN, MAX_USER_ENTRIES,
    MAX_USER_KEY_LEN, MAX_USER_VALUE_LEN, SEGMENT_LEVEL, SLOTS, STRIPE_LEVEL, UNIT_LEVEL,
};

use crate::{commands, digests, keys, records, sessions, shapes};

/// What the protocol fixes and this file shows.
fn vectors() -> Value {
    json!({
        "about": "Test vectors of the Sluice protocol, see protocol.md. Bytes are hexadecimal; integers are exact, \
                  and some need 64 bits. The keys are for tests and nothing else. Made by the tests: UPDATE=1.",
        "version": 1,
        "limits": {
            "chunk_len": CHUNK_LEN,
            "max_file_len": MAX_FILE_LEN,
            "max_chunks": MAX_CHUNKS,
            "max_level": MAX_LEVEL,
            "max_run": MAX_RUN,
            "stripe_level": STRIPE_LEVEL,
            "unit_level": UNIT_LEVEL,
            "segment_level": SEGMENT_LEVEL,
            "slots": SLOTS,
            "max_dcs": MAX_DCS,
            "max_record_len": MAX_RECORD_LEN,
            "max_name_len": MAX_NAME_LEN,
            "max_content_type_len": MAX_CONTENT_TYPE_LEN,
            "max_user_entries": MAX_USER_ENTRIES,
            "max_user_key_len": MAX_USER_KEY_LEN,
            "max_user_value_len": MAX_USER_VALUE_LEN,
            "max_expiry_secs": MAX_EXPIRY_SECS,
            "max_context_life_ms": MAX_CONTEXT_LIFE_MS,
            "clock_tolerance_ms": CLOCK_TOLERANCE_MS,
        },
        "keys": keys::vectors(),
        "file_ids": records::file_ids(),
        "contents": shapes::contents(),
        "chunks": shapes::chunks(),
        "files": shapes::files(),
        "trees": shapes::trees(),
        "tiles": shapes::tiles(),
        "places": shapes::places(),
        "runs": shapes::runs(),
        "records": records::vectors(),
        "commands": commands::vectors(),
        "contexts": sessions::contexts(),
        "tokens": sessions::tokens(),
        "set_digests": digests::vectors(),
    })
}

#[test]
fn the_committed_vectors_are_what_the_code_says() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/vectors.json");
    let said = serde_json::to_string_pretty(&vectors()).unwrap() + "\n";
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &said).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap();
    for (line, (ours, theirs)) in (1..).zip(said.lines().zip(committed.lines())) {
        assert_eq!(
            ours, theirs,
            "docs/vectors.json:{line} differs; if that is meant, UPDATE=1 makes it anew"
        );
    }
    assert_eq!(said.len(), committed.len(), "docs/vectors.json is cut short or too long");
}

/// Every error that has a name in the protocol has a vector; the lists are those of `docs/protocol.md`.
#[test]
fn every_named_error_is_shown() {
    let all = vectors();
    let shown = |section: &str| -> BTreeSet<String> {
        let cases = all[section]["invalid"].as_array().unwrap();
        cases.iter().map(|case| case["error"].as_str().unwrap().to_owned()).collect()
    };
    let named = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    let of_commands = [
        "length",
        "magic",
        "version",
        "kind",
        "reserved",
        "field",
        "span-level",
        "span-alignment",
        "span-range",
        "file-size",
        "slot",
        "slot-of-file",
        "destination",
        "sender",
        "key-unknown",
        "key-owner",
        "signature",
    ];
    assert_eq!(shown("commands"), named(&of_commands));
    let of_records = ["file-size", "text-length", "entries", "text", "expiry", "record-length", "malformed"];
    assert_eq!(shown("records"), named(&of_records));
    let of_contexts =
        ["malformed", "key-unknown", "key-owner", "signature", "expired", "not-yet", "not-here"];
    assert_eq!(shown("contexts"), named(&of_contexts));
    assert_eq!(shown("tokens"), named(&["invalid", "expired", "not-yet"]));
    assert_eq!(shown("places"), named(&["span-level", "span-alignment", "span-range", "span-past-end"]));
    let of_runs = ["chunk-past-end", "run-count", "run-alignment", "run-length", "run-empty"];
    assert_eq!(shown("runs"), named(&of_runs));
    let text = std::fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/protocol.md"));
    let text = text.unwrap();
    for name in [&of_commands[..], &of_records, &of_contexts, &of_runs].concat() {
        assert!(text.contains(&format!("`{name}`")), "docs/protocol.md does not say what {name} is");
    }
}
