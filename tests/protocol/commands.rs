//! Commands: one of each kind and more, and everything that is refused, in the order in which it is looked for.

use serde_json::{Value, json};
use sluice_engine::command::{COMMAND_LEN, Command, CommandError, DropReason, Statement};
use sluice_engine::drain::{Drain, Phase};
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{
    DcId, FileId, Generation, HomeEpoch, Incarnation, Nonce, RevocationEpoch, Sequence, TenantId, Timestamp,
};
use sluice_engine::keys::{Purpose, SigningKey};
use sluice_engine::limits::{MAX_CHUNKS, MAX_FILE_LEN, MAX_LEVEL};
use sluice_engine::placement::Load;
use sluice_engine::span::{Place, Span};

use crate::keys::{A, B, C, NOW, key, key_of, ring};
use crate::records;

fn command(statement: Statement, file: FileId) -> Command {
    Command {
        from: A,
        to: B,
        sequence: Sequence::of(Incarnation::new(3), 4),
        slot: file.slot(),
        sent_at: Timestamp::new(NOW),
        file,
        statement,
    }
}

fn session() -> FileId {
    FileId::from_bytes(*uuid::Uuid::from_u128(0x0193_e4a0_7b1c_7def_8123_0000_0000_0042).as_bytes())
}

fn prefix(bits: u8) -> FileId {
    FileId::from_bytes((0xABCD_EF01_2345_u128 << 80 >> (128 - bits) << (128 - bits)).to_be_bytes())
}

/// Every kind, and the edges of its fields.
fn examples() -> Vec<(&'static str, Statement, FileId)> {
    let record = records::full();
    let (file, size) = (record.file_id(), record.geometry().unwrap());
    let (epoch, home, tenant) = (HomeEpoch::new(2), A, record.tenant());
    let (digest, root) = (record.digest(), Root::of_bytes(b"a root"));
    let largest = Geometry::new(MAX_FILE_LEN).unwrap();
    let value = ChainingValue::from_bytes(*blake3::hash(b"a value").as_bytes());
    let generation = Generation::new((3 << 32) + 1);
    let place = |start, level| Place::new(start, level).unwrap();
    let meta = |size, epoch, home| Statement::Meta { epoch, home, size, tenant, digest };
    let have = |start, level| Statement::Have { generation, span: Span::new(place(start, level), value) };
    let assembled = |nonce| Statement::Assembled { epoch, home, size, nonce: Nonce::new(nonce), root };
    let set = *blake3::hash(b"a set").as_bytes();
    let drain = Drain { phase: Phase::Sessions, target: C, evacuate: true };
    vec![
        ("who knows this file?", Statement::MetaRequest, file),
        ("this file exists", meta(Some(size), epoch, home), file),
        ("its size is not settled", meta(None, HomeEpoch::new(0), B), file),
        ("the largest, taken over for the last time", meta(Some(largest), HomeEpoch::new(255), C), file),
        ("an empty file", meta(Some(Geometry::new(0).unwrap()), HomeEpoch::new(0), A), file),
        ("I do not know it", Statement::Unknown, file),
        ("one chunk", have(12, 0), file),
        ("a clipped span at the right edge", have(8, 3), file),
        ("the highest level", have(0, MAX_LEVEL), file),
        ("the last chunk of all", have(MAX_CHUNKS - 1, 0), file),
        ("nothing as of a generation", Statement::HaveNothing { generation }, file),
        ("say again what you hold", Statement::WantSpans { place: place(8, 3) }, file),
        ("compare everything", Statement::WantFiles { bits: 0, digest: set }, FileId::NIL),
        ("compare a range", Statement::WantFiles { bits: 4, digest: set }, prefix(4)),
        ("compare the narrowest range", Statement::WantFiles { bits: 48, digest: set }, prefix(48)),
        ("complete", Statement::Root { epoch, home, size, root }, file),
        ("assembled", assembled(0), file),
        ("assembled, asked", assembled(u64::MAX), file),
        ("show that you hold it", Statement::Confirm { nonce: Nonce::new(u64::MAX) }, file),
        ("aborted", Statement::Drop { reason: DropReason::Aborted, tenant }, file),
        ("deleted", Statement::Drop { reason: DropReason::Deleted, tenant }, file),
        ("expired", Statement::Drop { reason: DropReason::Expired, tenant }, file),
        ("a session is revoked", Statement::Revoke { epoch: RevocationEpoch::new(5), tenant }, session()),
        (
            "a tenant is revoked",
            Statement::Revoke { epoch: RevocationEpoch::new(6), tenant: TenantId::new(u64::MAX) },
            FileId::NIL,
        ),
        ("load", Statement::Load(Load { room: u64::MAX, pressure: u16::MAX }), FileId::NIL),
        ("no drain", Statement::Drain { drain: None, left: 0 }, FileId::NIL),
        ("drain", Statement::Drain { drain: Some(drain), left: 3 }, FileId::NIL),
        ("a session moves", Statement::SessionMove { phase: 2, counters: [5, 6] }, session()),
        (
            "taken",
            Statement::Ack { sequence: Sequence::of(Incarnation::new(9), 1), digest: set },
            FileId::NIL,
        ),
        ("holders disagree", Statement::Conflict { home, place: place(8, 2), found: None }, file),
        (
            "another root than expected",
            Statement::Conflict { home, place: place(0, 0), found: Some(root) },
            file,
        ),
    ]
}

/// The fields of a body, as the table in `protocol.md` names them.
fn fields(bytes: &[u8]) -> Value {
    let number = |from: usize, to: usize| bytes[from..to].iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
    json!({
        "kind": bytes[4], "aux": bytes[5], "from": number(6, 8), "to": number(8, 10), "home": number(10, 12),
        "key": number(12, 16), "file": hex::encode(&bytes[16..32]), "a": number(32, 40), "b": number(40, 48),
        "digest": hex::encode(&bytes[48..80]), "sequence": number(80, 88), "slot": number(88, 90),
        "sent_at": number(90, 96),
    })
}

pub(crate) fn vectors() -> Value {
    let signer = key(Purpose::Command, A);
    let valid: Vec<Value> = examples()
        .into_iter()
        .map(|(what, statement, file)| {
            let bytes = command(statement, file).sign(&signer);
            let verified = Command::verify(&bytes, &ring(Purpose::Command), B).unwrap();
            json!({
                "what": what, "kind": statement.kind().name(), "fields": fields(&bytes),
                "bytes": hex::encode(bytes), "digest": hex::encode(verified.digest()),
            })
        })
        .collect();
    let to_all = Command { to: DcId::EVERY, ..command(Statement::MetaRequest, records::full().file_id()) };
    let bytes = to_all.sign(&signer);
    Command::verify(&bytes, &ring(Purpose::Command), B).unwrap();
    let to_all = json!({
        "what": "to every datacenter", "kind": "META_REQUEST", "fields": fields(&bytes),
        "bytes": hex::encode(bytes), "digest": blake3::hash(&bytes).to_hex().as_str(),
    });
    let kinds: Vec<Value> = sluice_engine::command::Kind::ALL
        .iter()
        .map(|kind| {
            json!({ "number": *kind as u8, "name": kind.name(), "about_a_file": kind.is_about_a_file() })
        })
        .collect();
    let valid: Vec<Value> = valid.into_iter().chain([to_all]).collect();
    json!({ "me": B.number(), "kinds": kinds, "valid": valid, "invalid": invalid() })
}

/// A body that says what it should not, properly signed.
fn signed(body: &[u8], key: &SigningKey) -> Vec<u8> {
    [body, &key.sign(body)].concat()
}

fn invalid() -> Vec<Value> {
    let signer = key(Purpose::Command, A);
    let file = records::full().file_id();
    let example = |what: &str| {
        let (_, statement, file) = examples().into_iter().find(|(name, ..)| *name == what).unwrap();
        command(statement, file).to_body(signer.id())
    };
    let mut cases: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |what: &str, of: &str, change: &dyn Fn(&mut [u8])| {
        let mut body = example(of);
        change(&mut body);
        cases.push((what.to_owned(), signed(&body, &signer)));
    };
    add("another magic", "one chunk", &|b| b[0] = b'X');
    add("version 0", "one chunk", &|b| b[3] = 0);
    add("version 2", "one chunk", &|b| b[3] = 2);
    add("kind 0", "one chunk", &|b| b[4] = 0);
    add("kind 17", "one chunk", &|b| b[4] = 17);
    // Every field of every kind that must be zero. Offsets of the last byte of aux, home, A, B and digest.
    for (of, offsets) in [
        ("who knows this file?", &[5usize, 11, 39, 47, 79][..]),
        ("I do not know it", &[5, 11, 39, 47, 79]),
        ("one chunk", &[11]),
        ("nothing as of a generation", &[11, 39, 79]),
        ("say again what you hold", &[11, 47, 79]),
        ("compare everything", &[11, 39, 47]),
        ("complete", &[47]),
        ("show that you hold it", &[5, 11, 39, 79]),
        ("deleted", &[11, 39, 79]),
        ("a session is revoked", &[5, 11, 79]),
        ("load", &[5, 11, 79]),
        ("no drain", &[11, 79]),
        ("drain", &[11, 79]),
        ("a session moves", &[11, 79]),
        ("taken", &[5, 11, 47]),
        ("holders disagree", &[47]),
    ] {
        for &offset in offsets {
            add(&format!("a byte at {offset} in {of:?}"), of, &|b| b[offset] ^= 1);
        }
    }
    add("a bit after the prefix", "compare a range", &|b| b[31] = 1);
    add("a bit at the end of a prefix of no bits", "compare everything", &|b| b[16] = 0x80);
    add("a prefix of 49 bits", "compare the narrowest range", &|b| b[5] = 49);
    add("a prefix of 255 bits", "compare everything", &|b| b[5] = 255);
    add("every datacenter as home", "complete", &|b| b[10..12].fill(0xFF));
    add("every datacenter as home of META", "this file exists", &|b| b[10..12].fill(0xFF));
    add("every datacenter in conflict", "holders disagree", &|b| b[10..12].fill(0xFF));
    add("nonce 0", "show that you hold it", &|b| b[40..48].fill(0));
    add("reason 0", "deleted", &|b| b[5] = 0);
    add("reason 4", "deleted", &|b| b[5] = 4);
    add("level 36", "one chunk", &|b| b[5] = 36);
    add("level 254", "one chunk", &|b| b[5] = 254);
    add("a start that is no multiple", "a clipped span at the right edge", &|b| b[39] = 9);
    add("a start past the largest file", "one chunk", &|b| {
        b[32..40].copy_from_slice(&MAX_CHUNKS.to_be_bytes())
    });
    add("the largest number as start", "one chunk", &|b| b[32..40].fill(0xFF));
    add("a start past the largest file, asked", "say again what you hold", &|b| b[32] = 0xFF);
    add("a misaligned conflict", "holders disagree", &|b| b[39] = 1);
    for of in ["this file exists", "complete", "assembled"] {
        let size = (MAX_FILE_LEN + 1).to_be_bytes();
        add(&format!("a size over the limit in {of:?}"), of, &|b| b[32..40].copy_from_slice(&size));
    }
    add("no size in ROOT", "complete", &|b| b[32..40].fill(0xFF));
    add("files left without a drain", "no drain", &|b| b[39] = 1);
    add("a target without a drain", "no drain", &|b| b[47] = 2);
    add("phase 4", "drain", &|b| b[5] = 4);
    add("what no drain means", "drain", &|b| b[45] = 2);
    add("every datacenter as target", "drain", &|b| b[46..48].fill(0xFF));
    add("a pressure over 16 bits", "load", &|b| b[45] = 1);
    add("slot 4,096", "load", &|b| b[88..90].copy_from_slice(&4096u16.to_be_bytes()));
    add("slot 65,535", "one chunk", &|b| b[88..90].fill(0xFF));
    add("another slot than the file's", "one chunk", &|b| b[89] ^= 1);
    add("for dc 3", "one chunk", &|b| b[9] = 3);
    add("from dc 2 itself", "one chunk", &|b| b[7] = 2);
    add("from every datacenter", "one chunk", &|b| b[6..8].fill(0xFF));
    add("a key that nobody knows", "one chunk", &|b| b[12..16].fill(0x7F));
    add("the key of dc 2", "one chunk", &|b| b[15] = 0x12);

    let good = signed(&example("one chunk"), &signer);
    cases.push(("a byte short".into(), good[..COMMAND_LEN - 1].to_vec()));
    cases.push(("a byte long".into(), [&good[..], &[0]].concat()));
    cases.push(("nothing".into(), Vec::new()));
    for (what, at) in [("a signature with one bit flipped", 159), ("a value with one bit flipped", 60)] {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        cases.push((what.into(), bytes));
    }
    let one = command(examples()[6].1, file);
    cases.push((
        "signed for another cluster".into(),
        one.sign(&key_of(Purpose::Command, A, "another")).to_vec(),
    ));
    cases.push(("signed as a context".into(), {
        let body = one.to_body(signer.id());
        let context = context_key_with_command_seed();
        signed(&body, &context)
    }));
    let foreign = Command { from: C, ..one };
    cases.push((
        "from a datacenter whose key is not known".into(),
        foreign.sign(&key(Purpose::Command, C)).to_vec(),
    ));

    cases
        .into_iter()
        .map(|(what, bytes)| {
            let error = Command::verify(&bytes, &ring(Purpose::Command), B).unwrap_err();
            let field = match error {
                CommandError::Reserved { field, .. } | CommandError::Field { field, .. } => Some(field),
                _ => None,
            };
            json!({ "what": what, "bytes": hex::encode(bytes), "error": error.code(), "field": field })
        })
        .collect()
}

/// The seed of the command key, used for the other purpose.
fn context_key_with_command_seed() -> SigningKey {
    let command = key(Purpose::Command, A);
    let tag = sluice_engine::keys::ClusterTag::of_name(crate::keys::CLUSTER);
    let seed = [command.id().number() as u8; 32];
    let key = SigningKey::from_seed(Purpose::Context, tag, A, command.id(), &seed).unwrap();
    assert_eq!(key.public(), command.public());
    key
}

#[test]
fn the_examples_show_every_kind() {
    let shown: Vec<_> = examples().iter().map(|(_, statement, _)| statement.kind()).collect();
    for kind in sluice_engine::command::Kind::ALL {
        assert!(shown.contains(kind), "{kind}");
    }
}
