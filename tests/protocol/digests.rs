//! Set digests: what two datacenters compare.

use serde_json::{Value, json};
use sluice_engine::aggregator::{Aggregator, Config, Effect, NodeEvent, NodeMemory};
use sluice_engine::command::{Command, DropReason, Statement};
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::{ChainingValue, RecordDigest, Root};
use sluice_engine::ids::{
    DcId, FileId, Generation, HomeEpoch, Incarnation, Nonce, Sequence, TenantId, Timestamp,
};
use sluice_engine::keys::Purpose;
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::span::{Place, Span};

use crate::keys::{A, B, NOW, key, ring};

const TENANT: TenantId = TenantId::new(7);

fn hash(text: &str) -> [u8; 32] {
    *blake3::hash(text.as_bytes()).as_bytes()
}

fn file(number: u8) -> FileId {
    let client = format!("0193e4a0-7b1c-7def-8123-0000000000{number:02x}");
    FileId::derive(TENANT, client.parse().unwrap())
}

fn meta(epoch: u8, home: DcId, size: Option<u64>, record: &str) -> Statement {
    Statement::Meta {
        epoch: HomeEpoch::new(epoch),
        home,
        size: size.map(|size| Geometry::new(size).unwrap()),
        tenant: TENANT,
        digest: RecordDigest::from_bytes(hash(record)),
    }
}

fn have(generation: u64, start: u64, level: u8) -> Statement {
    let value = ChainingValue::from_bytes(hash(&format!("{start}+{level}")));
    Statement::Have {
        generation: Generation::new(generation),
        span: Span::new(Place::new(start, level).unwrap(), value),
    }
}

fn root(size: u64, text: &str) -> Statement {
    let size = Geometry::new(size).unwrap();
    Statement::Root { epoch: HomeEpoch::new(0), home: A, size, root: Root::from_bytes(hash(text)) }
}

/// What dc 2 says of some files to dc 1, which knows nothing else.
fn said() -> Vec<(&'static str, FileId, Vec<Statement>)> {
    let mib = CHUNK_LEN;
    let size = 13 * mib + 77;
    vec![
        ("only its metadata", file(1), vec![meta(0, B, Some(size), "one")]),
        ("its size is not settled", file(2), vec![meta(0, A, None, "two")]),
        (
            "spans for the home, which is dc 1",
            file(3),
            vec![meta(0, A, Some(size), "three"), have(7, 0, 3), have(7, 12, 1), have(7, 9, 0)],
        ),
        (
            "an older generation counts no longer",
            file(4),
            vec![meta(0, A, Some(size), "four"), have(7, 0, 3), have(8, 4, 2)],
        ),
        (
            "nothing is held, and that has no weight",
            file(5),
            vec![meta(0, A, Some(size), "five"), Statement::HaveNothing { generation: Generation::new(9) }],
        ),
        ("spans for a home that is dc 2 itself", file(6), vec![meta(1, B, Some(size), "six"), have(7, 0, 3)]),
        (
            "large spans are cut at segments",
            file(7),
            vec![meta(0, A, Some((1 << 20) * mib + 1), "seven"), have(7, 0, 17), have(7, 1 << 17, 16)],
        ),
        ("complete", file(8), vec![meta(3, A, Some(size), "eight"), root(size, "eight")]),
        (
            "assembled",
            file(9),
            vec![
                meta(2, B, Some(size), "nine"),
                Statement::Assembled {
                    epoch: HomeEpoch::new(2),
                    home: B,
                    size: Geometry::new(size).unwrap(),
                    nonce: Nonce::new(0),
                    root: Root::from_bytes(hash("nine")),
                },
            ],
        ),
        (
            "holders disagree",
            file(10),
            vec![
                meta(0, B, Some(size), "ten"),
                Statement::Conflict { home: B, place: Place::new(8, 2).unwrap(), found: None },
            ],
        ),
        (
            "another root than expected",
            file(11),
            vec![
                meta(0, B, Some(size), "eleven"),
                Statement::Conflict {
                    home: B,
                    place: Place::new(0, 0).unwrap(),
                    found: Some(Root::from_bytes(hash("found"))),
                },
            ],
        ),
        (
            "two records, two roots",
            file(12),
            vec![
                meta(0, A, Some(size), "twelve"),
                meta(0, B, Some(size), "another twelve"),
                root(size, "twelve"),
                root(size, "another twelve"),
            ],
        ),
        (
            "dropped",
            file(13),
            vec![
                meta(0, A, Some(size), "thirteen"),
                Statement::Drop { reason: DropReason::Deleted, tenant: TENANT },
            ],
        ),
    ]
}

/// A fresh aggregator of dc 1 that hears what dc 2 says of these files, and the digest with which it then begins to
/// compare.
fn heard(files: &[(FileId, Vec<Statement>)]) -> (Aggregator, [u8; 32]) {
    let now = Timestamp::new(NOW);
    let config = Config { peers: [B].into(), ..Config::new(A, [B]) };
    let (mut aggregator, _) = Aggregator::start(config, NodeMemory::default(), now);
    aggregator.handle(NodeEvent::AllLoaded, now);
    let said = files.iter().flat_map(|(file, said)| said.iter().map(|statement| (*file, *statement)));
    for (count, (file, statement)) in (1..).zip(said) {
        let command = Command {
            from: B,
            to: A,
            sequence: Sequence::of(Incarnation::new(1), count),
            slot: file.slot(),
            sent_at: now,
            file,
            statement,
        };
        let bytes = command.sign(&key(Purpose::Command, B));
        let verified = Command::verify(&bytes, &ring(Purpose::Command), A).unwrap();
        aggregator.handle(NodeEvent::Received(verified), now);
    }
    let up = NodeEvent::LinkUp { peer: B, incarnation: Incarnation::new(1), seen_of_me: Incarnation::new(0) };
    let effects = aggregator.handle(up, now);
    let compared = effects.iter().find_map(|effect| match effect {
        Effect::Send(Command { statement: Statement::WantFiles { bits: 0, digest }, .. }) => Some(*digest),
        _ => None,
    });
    (aggregator, compared.expect("comparing begins when a link is up"))
}

pub(crate) fn vectors() -> Value {
    let signer = key(Purpose::Command, B);
    let mut all: Vec<(FileId, Vec<Statement>)> = Vec::new();
    let files: Vec<Value> = said()
        .into_iter()
        .map(|(what, file, statements)| {
            all.push((file, statements.clone()));
            let (aggregator, alone) = heard(&[(file, statements.clone())]);
            let digest = aggregator.digest_with(file, B).unwrap();
            let mut set = blake3::Hasher::new();
            set.update(file.as_bytes()).update(&digest);
            assert_eq!(*set.finalize().as_bytes(), alone, "the sum of one is that one");
            let commands: Vec<String> = (1..)
                .zip(&statements)
                .map(|(count, statement)| {
                    let command = Command {
                        from: B,
                        to: A,
                        sequence: Sequence::of(Incarnation::new(1), count),
                        slot: file.slot(),
                        sent_at: Timestamp::new(NOW),
                        file,
                        statement: *statement,
                    };
                    hex::encode(command.sign(&signer))
                })
                .collect();
            json!({ "what": what, "file": file.to_string(), "commands": commands, "digest": hex::encode(digest),
                    "set_of_it_alone": hex::encode(alone) })
        })
        .collect();
    let (_, together) = heard(&all);
    json!({
        "me": A.number(), "peer": B.number(),
        "none": hex::encode(heard(&[]).1),
        "files": files,
        "set_of_all": hex::encode(together),
    })
}
