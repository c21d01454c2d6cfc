use proptest::prelude::*;

use super::*;
use crate::drain::{Drain, Phase};
use crate::geometry::Geometry;
use crate::hash::{ChainingValue, RecordDigest, Root};
use crate::ids::{Generation, HomeEpoch, Incarnation, Nonce, RevocationEpoch, TenantId};
use crate::keys::{ClusterTag, Purpose};
use crate::limits::{MAX_CHUNKS, MAX_FILE_LEN};
use crate::placement::Load;
use crate::span::{Place, Span};

const A: DcId = DcId::new(1);
const B: DcId = DcId::new(2);

fn file() -> FileId {
    FileId::derive(TenantId::new(1), "0193e4a0-7b1c-7def-8123-456789abcdef".parse().unwrap())
}

fn key(dc: DcId, id: u32, cluster: &str) -> SigningKey {
    let cluster = ClusterTag::of_name(cluster);
    SigningKey::from_seed(Purpose::Command, cluster, dc, KeyId::new(id), &[id as u8; 32]).unwrap()
}

fn ring(keys: &[&SigningKey]) -> KeyRing {
    let keys = keys.iter().map(|key| (key.id(), key.public()));
    KeyRing::new(Purpose::Command, ClusterTag::of_name("test"), keys)
}

fn command(statement: Statement) -> Command {
    let file = match statement.kind().is_about_a_file() {
        true => file(),
        false => FileId::NIL,
    };
    Command {
        from: A,
        to: B,
        sequence: Sequence::of(Incarnation::new(3), 4),
        slot: file.slot(),
        sent_at: Timestamp::new(1_763_640_000_123),
        file,
        statement,
    }
}

fn examples() -> Vec<Statement> {
    let size = Geometry::new((1 << 30) + 5).unwrap();
    let digest = [0xD1; 32];
    let place = Place::new(640, 6).unwrap();
    let (epoch, home, root) = (HomeEpoch::new(2), A, Root::from_bytes(digest));
    let tenant = TenantId::new(9);
    let generation = Generation::new(5);
    vec![
        Statement::MetaRequest,
        Statement::Meta { epoch, home, size: Some(size), tenant, digest: RecordDigest::from_bytes(digest) },
        Statement::Unknown,
        Statement::Have { generation, span: Span::new(place, ChainingValue::from_bytes(digest)) },
        Statement::HaveNothing { generation },
        Statement::WantSpans { place },
        Statement::WantFiles { bits: 0, digest },
        Statement::Root { epoch, home, size, root },
        Statement::Assembled { epoch, home, size, nonce: Nonce::new(77), root },
        Statement::Confirm { nonce: Nonce::new(77) },
        Statement::Drop { reason: DropReason::Deleted, tenant },
        Statement::Revoke { epoch: RevocationEpoch::new(3), tenant },
        Statement::Load(Load { room: 1, pressure: 2 }),
        Statement::Drain { drain: Some(Drain { phase: Phase::Data, target: B, evacuate: true }), left: 3 },
        Statement::SessionMove { phase: 2, counters: [5, 6] },
        Statement::Ack { sequence: Sequence::new(8), digest },
        Statement::Conflict { home, place, found: None },
    ]
}

/// BLAKE3 over the 160 bytes of one example of each kind: the wire format, frozen.
#[test]
fn golden_vectors() {
    let key = key(A, 1, "test");
    let mut seen: Vec<Kind> = examples().iter().map(Statement::kind).collect();
    seen.dedup();
    assert_eq!(seen, Kind::ALL, "an example of every kind, in order");
    let have = command(examples()[3]).sign(&key);
    assert_eq!(
        hex::encode(have),
        "534c43010406000100020000000000018e415f9fb3bf8dfe98f91e736bec61c800000000000002800000000000000005d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1000000030000000408e4019aa122be7bb52f0870220df58a5af57160386c004b65798b97e5479d18cbcb91a17a3d7cd012e05ed40e9916474ba18d0d1457e0d1f411ff76f458ec425f6ec6d1a430b308"
    );
    let mut all = blake3::Hasher::new();
    for statement in examples() {
        all.update(&command(statement).sign(&key));
    }
    assert_eq!(
        all.finalize().to_hex().as_str(),
        "1011ae9743f8a24f17d53c5a879ff9036d97e9668001892889ee366a3ec3fcfe"
    );
}

#[test]
fn every_kind_round_trips_and_verifies() {
    let key = key(A, 1, "test");
    for statement in examples() {
        let command = command(statement);
        let bytes = command.sign(&key);
        assert_eq!(Command::decode(&bytes), Ok((command, KeyId::new(1))));
        let verified = Command::verify(&bytes, &ring(&[&key]), B).unwrap();
        assert_eq!(verified.command(), &command);
        assert_eq!(verified.digest(), blake3::hash(&bytes).as_bytes());
    }
}

#[test]
fn unused_fields_must_be_zero() {
    let key = key(A, 1, "test");
    // Offset and name of every field that some kind leaves unused.
    let fields = [(5, "aux"), (11, "home"), (39, "A"), (47, "B"), (79, "digest")];
    for statement in examples() {
        let bytes = command(statement).sign(&key);
        for (offset, field) in fields {
            let mut changed = bytes;
            changed[offset] ^= 1;
            match Command::decode(&changed) {
                Err(CommandError::Reserved { kind, field: named }) => {
                    assert_eq!((kind, named), (statement.kind(), field));
                    assert_eq!(bytes[offset], 0);
                }
                // A used field: either it now says something else, or that is out of range.
                Ok((other, _)) => assert_ne!(other.statement, statement),
                Err(error) => assert!(
                    matches!(error, CommandError::Field { .. } | CommandError::Place(_)),
                    "{statement}: {error}"
                ),
            }
        }
    }
}

#[test]
fn each_refusal_has_its_name() {
    let signer = key(A, 1, "test");
    let good = command(examples()[3]).sign(&signer);
    let ring = ring(&[&signer, &key(B, 2, "test")]);
    let refuse = |change: &dyn Fn(&mut [u8; COMMAND_LEN])| {
        let mut bytes = good;
        change(&mut bytes);
        Command::verify(&bytes, &ring, B).unwrap_err()
    };
    assert_eq!(Command::verify(&good[..159], &ring, B), Err(CommandError::Length { got: 159 }));
    assert_eq!(refuse(&|b| b[0] = b'X'), CommandError::Magic);
    assert_eq!(refuse(&|b| b[3] = 2), CommandError::Version { got: 2 });
    assert_eq!(refuse(&|b| b[4] = 0), CommandError::Kind { got: 0 });
    assert_eq!(refuse(&|b| b[4] = 17), CommandError::Kind { got: 17 });
    assert_eq!(refuse(&|b| b[11] = 1), CommandError::Reserved { kind: Kind::Have, field: "home" });
    assert_eq!(refuse(&|b| b[39] ^= 1), CommandError::Place(PlaceError::Misaligned { start: 641, level: 6 }));
    assert_eq!(refuse(&|b| b[5] = 36), CommandError::Place(PlaceError::Level { level: 36 }));
    assert!(matches!(refuse(&|b| b[32] = 0xFF), CommandError::Place(PlaceError::OutOfRange { .. })));
    assert!(matches!(refuse(&|b| b[89] ^= 1), CommandError::SlotOfFile { .. }));
    assert_eq!(refuse(&|b| b[88] = 0xFF), CommandError::Slot { got: 0xFF00 | u16::from(good[89]) });
    assert_eq!(refuse(&|b| b[9] = 3), CommandError::Destination { got: DcId::new(3), me: B });
    assert_eq!(refuse(&|b| b[7] = 2), CommandError::Sender { got: B });
    assert_eq!(refuse(&|b| b[15] = 9), CommandError::Key(KeyError::Unknown(KeyId::new(9))));
    assert_eq!(
        refuse(&|b| b[15] = 2),
        CommandError::Key(KeyError::WrongDc { key: KeyId::new(2), owner: B, claimed: A })
    );
    assert_eq!(refuse(&|b| b[159] ^= 1), CommandError::Key(KeyError::Signature));
    assert_eq!(refuse(&|b| b[60] ^= 1), CommandError::Key(KeyError::Signature));
    let foreign = command(examples()[3]).sign(&key(A, 1, "another cluster"));
    assert_eq!(Command::verify(&foreign, &ring, B), Err(CommandError::Key(KeyError::Signature)));
}

#[test]
fn sizes_and_prefixes_are_bounded() {
    let key = key(A, 1, "test");
    let root = examples()[7];
    let mut bytes = command(root).sign(&key);
    bytes[32..40].copy_from_slice(&(MAX_FILE_LEN + 1).to_be_bytes());
    assert!(matches!(Command::decode(&bytes), Err(CommandError::Size(_))));
    let mut want = command(Statement::WantFiles { bits: 8, digest: [1; 32] });
    want.file = FileId::from_bytes([0xAB, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert!(matches!(Command::decode(&want.sign(&key)), Err(CommandError::Reserved { .. })));
    want.statement = Statement::WantFiles { bits: 49, digest: [1; 32] };
    assert!(matches!(Command::decode(&want.sign(&key)), Err(CommandError::Field { field: "aux", .. })));
}

proptest! {
    #[test]
    fn any_bytes_are_refused_or_mean_exactly_themselves(mut bytes in any::<[u8; 32]>().prop_flat_map(|seed| {
        proptest::collection::vec(any::<u8>(), COMMAND_LEN).prop_map(move |mut v| { v[..32].copy_from_slice(&seed); v })
    }), kind in 1u8..=16, zeros in any::<bool>()) {
        bytes[..4].copy_from_slice(b"SLC\x01");
        bytes[4] = kind;
        if zeros {
            bytes[32..80].fill(0);
            let slot = (u16::from(bytes[16]) << 4) | (u16::from(bytes[17]) >> 4);
            bytes[88..90].copy_from_slice(&slot.to_be_bytes());
        }
        if let Ok((command, key)) = Command::decode(&bytes) {
            prop_assert_eq!(&command.to_body(key)[..], &bytes[..BODY_LEN]);
        }
    }

    #[test]
    fn spans_round_trip(start in 0..MAX_CHUNKS, level in 0u8..=35, generation in any::<u64>(), cv in any::<[u8; 32]>()) {
        let start = start >> level << level;
        let span = Span::new(Place::new(start, level).unwrap(), ChainingValue::from_bytes(cv));
        let statement = Statement::Have { generation: Generation::new(generation), span };
        let bytes = command(statement).sign(&key(A, 1, "test"));
        prop_assert_eq!(Command::decode(&bytes).unwrap().0.statement, statement);
    }
}

/// What people read of each kind (`sluice command decode`, logs).
#[test]
fn every_kind_has_its_words() {
    let digest = "d1".repeat(32);
    let words: Vec<String> = examples().iter().map(Statement::to_string).collect();
    assert_eq!(
        words,
        [
            "META_REQUEST".to_owned(),
            format!("META home dc#1 epoch 2, 1073741829 bytes, tenant#9, record {digest}"),
            "UNKNOWN".into(),
            format!("HAVE chunks 640..=703 (level 6), generation 5, value {digest}"),
            "HAVE nothing as of generation 5".into(),
            "WANT_SPANS under 640+2^6".into(),
            "WANT_FILES prefix of 0 bits, set d1d1d1d1d1d1d1d1".into(),
            format!("ROOT {digest}, 1073741829 bytes, home dc#1 epoch 2"),
            format!("ASSEMBLED {digest}, 1073741829 bytes, home dc#1 epoch 2, nonce 77"),
            "CONFIRM nonce 77".into(),
            "DROP deleted, tenant#9".into(),
            "REVOKE before epoch 3, tenant#9".into(),
            "LOAD at 2 ‰, room for 1 bytes a second".into(),
            "DRAIN of data to dc#2, everything moves, 3 files left".into(),
            "SESSION_MOVE phase 2: 5 6".into(),
            "ACK of sequence 8, command d1d1d1d1d1d1d1d1".into(),
            "CONFLICT of holders at 640+2^6, seen by dc#1".into(),
        ]
    );
    let meta = Statement::Meta {
        epoch: HomeEpoch::new(0),
        home: B,
        size: None,
        tenant: TenantId::new(9),
        digest: RecordDigest::from_bytes([0xD1; 32]),
    };
    assert_eq!(meta.to_string(), format!("META home dc#2 epoch 0, size unknown, tenant#9, record {digest}"));
    let last = Place::new(MAX_CHUNKS - 2, 1).unwrap();
    let span = Span::new(last, ChainingValue::from_bytes([0xD1; 32]));
    let have = Statement::Have { generation: Generation::new(1), span };
    assert!(have.to_string().starts_with("HAVE chunks 36507222014..=36507222015 (level 1)"), "{have}");
    let past = Place::new((MAX_CHUNKS >> 34) << 34, 34).unwrap();
    let have = Statement::Have { generation: Generation::new(1), span: Span::new(past, span.value) };
    assert!(have.to_string().contains("..=36507222015 (level 34)"), "clipped to the largest file: {have}");
    let size = Geometry::new(5).unwrap();
    let root = Root::from_bytes([0xD1; 32]);
    let announced =
        Statement::Assembled { epoch: HomeEpoch::new(0), home: A, size, nonce: Nonce::new(0), root };
    assert_eq!(announced.to_string(), format!("ASSEMBLED {digest}, 5 bytes, home dc#1 epoch 0"));
    let found = Statement::Conflict { home: A, place: Place::new(0, 0).unwrap(), found: Some(root) };
    assert_eq!(found.to_string(), format!("CONFLICT: unexpected root {digest}, seen by dc#1"));
    let none = Statement::Drain { drain: None, left: 0 };
    let free = Statement::Load(Load { room: u64::MAX, pressure: 0 });
    assert_eq!(none.to_string(), "DRAIN none");
    assert_eq!(free.to_string(), "LOAD at 0 ‰, room without a limit");
    let reasons = [1, 2, 3].map(|byte| DropReason::from_byte(byte).unwrap().to_string());
    assert_eq!(reasons, ["aborted", "deleted", "expired"]);
    assert_eq!((DropReason::from_byte(0), DropReason::from_byte(4)), (None, None));
}

#[test]
fn every_refusal_has_its_code() {
    let place = |start, level| CommandError::from(Place::new(start, level).unwrap_err());
    let kind = Kind::Have;
    let dc = A;
    let codes = [
        (CommandError::Length { got: 0 }, "length"),
        (CommandError::Magic, "magic"),
        (CommandError::Version { got: 2 }, "version"),
        (CommandError::Kind { got: 0 }, "kind"),
        (CommandError::Reserved { kind, field: "A" }, "reserved"),
        (CommandError::Field { kind, field: "A" }, "field"),
        (place(0, 36), "span-level"),
        (place(1, 1), "span-alignment"),
        (place(MAX_CHUNKS, 0), "span-range"),
        (Place::new(8, 0).unwrap().check(Geometry::new(1).unwrap()).unwrap_err().into(), "span-past-end"),
        (Geometry::new(u64::MAX).unwrap_err().into(), "file-size"),
        (CommandError::Slot { got: 4096 }, "slot"),
        (CommandError::SlotOfFile { expected: 1, got: 2 }, "slot-of-file"),
        (KeyError::Unknown(KeyId::new(1)).into(), "key-unknown"),
        (KeyError::WrongDc { key: KeyId::new(1), owner: dc, claimed: dc }.into(), "key-owner"),
        (KeyError::Signature.into(), "signature"),
        (CommandError::Sender { got: dc }, "sender"),
        (CommandError::Destination { got: dc, me: dc }, "destination"),
    ];
    for (error, code) in codes {
        assert_eq!(error.code(), code, "{error}");
    }
}

#[test]
fn the_bounds_of_every_kind_hold() {
    let key = key(A, 1, "test");
    let refused = |statement: Statement, at: usize, byte: u8| {
        let mut bytes = command(statement).sign(&key);
        bytes[at] = byte;
        Command::decode(&bytes).map(|(command, _)| command.statement)
    };
    // A prefix may have 48 bits, whose last is then the lowest of its six bytes.
    let want = |bits, file| Command { file, ..command(Statement::WantFiles { bits, digest: [1; 32] }) };
    let mut bytes = [0; 16];
    bytes[..6].fill(0xFF);
    let widest = want(48, FileId::from_bytes(bytes));
    let widest = Command { slot: Slot::new(0).unwrap(), ..widest };
    assert_eq!(Command::decode(&widest.sign(&key)).unwrap().0, widest);
    bytes[6] = 0x80;
    let past = Command { file: FileId::from_bytes(bytes), ..widest };
    let after = CommandError::Reserved { kind: Kind::WantFiles, field: "FileId after the prefix" };
    assert_eq!(Command::decode(&past.sign(&key)), Err(after));
    for (i, statement) in examples().into_iter().enumerate() {
        let uses_home = matches!(i, 1 | 7 | 8 | 16);
        let everyone = CommandError::Field { kind: statement.kind(), field: "home" };
        let mut bytes = command(statement).sign(&key);
        bytes[10..12].fill(0xFF);
        if uses_home {
            assert_eq!(Command::decode(&bytes), Err(everyone), "{statement}");
        } else {
            assert!(matches!(Command::decode(&bytes), Err(CommandError::Reserved { .. })), "{statement}");
        }
    }
    let confirm = examples()[9];
    let mut bytes = command(confirm).sign(&key);
    bytes[40..48].fill(0);
    assert_eq!(Command::decode(&bytes), Err(CommandError::Field { kind: Kind::Confirm, field: "B" }));
    assert_eq!(refused(examples()[10], 5, 4), Err(CommandError::Field { kind: Kind::Drop, field: "aux" }));
    // No drain says nothing more; of one, phase and target are such.
    let none = Statement::Drain { drain: None, left: 0 };
    assert_eq!(Command::decode(&command(none).sign(&key)).unwrap().0.statement, none);
    for (statement, at, byte, field) in [
        (none, 39, 1, "aux"),
        (none, 47, 1, "aux"),
        (examples()[13], 5, 4, "aux"),
        (examples()[13], 45, 2, "B"),
        (examples()[12], 45, 1, "B"),
    ] {
        let error = CommandError::Field { kind: statement.kind(), field };
        assert_eq!(refused(statement, at, byte), Err(error), "{statement} at {at}");
    }
}
