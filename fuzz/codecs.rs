//! Everything that is bytes on a wire or a disk and has one canonical form.

use sluice_engine::aggregator::{FileMemory, NodeMemory};
use sluice_engine::command::{BODY_LEN, COMMAND_LEN, Command};
use sluice_engine::context::SignedContext;
use sluice_engine::drain::{Drain, Phase};
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::{RecordDigest, Root};
use sluice_engine::ids::{
    DcId, FileId, Generation, HomeEpoch, Incarnation, KeyId, RevocationEpoch, TenantId, Timestamp,
};
use sluice_engine::keys::{ClusterTag, KeyRing, Purpose, SigningKey};
use sluice_engine::ledger::{Claim, Disagreement, Fact, Ledger, Page};
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::revocations::Revocation;
use sluice_engine::rules::Rules;
use sluice_engine::span::{Place, Span};
use sluice_node::token::TokenVerifier;

use crate::mangle::{self, Mangled};
use crate::times;

const ME: DcId = DcId::new(2);

fn signing(purpose: Purpose, name: &str) -> Vec<SigningKey> {
    let tag = ClusterTag::of_name(&mangle::cluster());
    let keys = mangle::keys(name).into_iter();
    keys.map(|(id, dc, seed)| {
        SigningKey::from_seed(purpose, tag, DcId::new(dc), KeyId::new(id), &seed).unwrap()
    })
    .collect()
}

fn ring(purpose: Purpose, keys: &[SigningKey]) -> KeyRing {
    let tag = ClusterTag::of_name(&mangle::cluster());
    KeyRing::new(purpose, tag, keys.iter().map(|key| (key.id(), key.public())))
}

#[test]
fn commands() {
    let examples = mangle::vectors("commands", "bytes");
    let keys = signing(Purpose::Command, "command");
    let ring = ring(Purpose::Command, &keys);
    bolero::check!().with_type::<(Mangled, bool)>().with_iterations(times(30_000)).for_each(
        |(mangled, resign)| {
            let mut bytes = mangled.bytes(&examples);
            let decoded = Command::decode(&bytes);
            if let Ok((command, key)) = &decoded {
                assert_eq!(&command.to_body(*key)[..], &bytes[..BODY_LEN]);
                assert!(!command.statement.to_string().is_empty());
                let fact = Fact::of(command.from, &command.statement);
                let mut ledger = Ledger::new(Rules::all());
                let meta = Fact::Meta {
                    claim: Claim { epoch: HomeEpoch::new(0), home: ME },
                    size: Geometry::new(13 << 20).ok(),
                    tenant: TenantId::new(7),
                    digest: RecordDigest::from_bytes([1; 32]),
                };
                ledger.take(meta).unwrap();
                if let Ok(Some(fact)) = fact {
                    let once = ledger.take(fact);
                    let after = ledger.clone();
                    assert_eq!(ledger.take(fact).is_ok(), once.is_ok());
                    assert_eq!(ledger, after, "twice is as once");
                    let _ = (ledger.verdict(), ledger.digest_between(ME, command.from), ledger.statements());
                }
            }
            // A signature counts for what was signed and nothing else.
            let verified = Command::verify(&bytes, &ring, ME);
            if verified.is_ok() {
                assert!(examples.contains(&bytes), "a forgery: {}", hex::encode(&bytes));
            } else if *resign && bytes.len() == COMMAND_LEN {
                let id = u32::from_be_bytes(bytes[12..16].try_into().unwrap());
                if let Some(key) = keys.iter().find(|key| key.id().number() == id) {
                    let signature = key.sign(&bytes[..BODY_LEN]);
                    bytes[BODY_LEN..].copy_from_slice(&signature);
                    match Command::verify(&bytes, &ring, ME) {
                        Ok(verified) => {
                            assert_eq!(verified.command().from, key.dc());
                            assert!([ME, DcId::EVERY].contains(&verified.command().to));
                            assert!(decoded.is_ok());
                        }
                        Err(error) => assert!(!error.code().is_empty()),
                    }
                }
            }
        },
    );
}

#[test]
fn records() {
    let examples = mangle::vectors("records", "bytes");
    bolero::check!().with_type::<Mangled>().with_iterations(times(30_000)).for_each(|mangled| {
        let bytes = mangled.bytes(&examples);
        match MetadataRecord::from_bytes(&bytes) {
            Ok(record) => {
                assert_eq!(record.to_bytes(), bytes);
                assert_eq!(record.digest().as_bytes(), blake3::hash(&bytes).as_bytes());
            }
            Err(error) => assert!(!error.code().is_empty()),
        }
    });
}

#[test]
fn contexts() {
    let examples = mangle::vectors("contexts", "bytes");
    let good = mangle::valid("contexts", "bytes");
    let keys = signing(Purpose::Context, "context");
    let ring = ring(Purpose::Context, &keys);
    let now = Timestamp::new(mangle::now());
    bolero::check!().with_type::<Mangled>().with_iterations(times(10_000)).for_each(|mangled| {
        let bytes = mangled.bytes(&examples);
        let verify = |bytes: Vec<u8>| SignedContext::from_bytes(bytes)?.verify(&ring, ME, now);
        match verify(bytes.clone()) {
            Ok(_) => assert!(good.contains(&bytes), "a forgery: {}", hex::encode(&bytes)),
            Err(error) => assert!(!error.code().is_empty()),
        }
        // Signed by one of us, it still has one form.
        let Some((body, _)) = bytes.split_last_chunk::<64>() else { return };
        let Some(id) = body.get(4..8).map(|id| u32::from_be_bytes(id.try_into().unwrap())) else { return };
        let Some(key) = keys.iter().find(|key| key.id().number() == id) else { return };
        let signed = [body, &key.sign(body)].concat();
        if let Ok(context) = verify(signed.clone()) {
            assert_eq!(context.sign(key).as_bytes(), signed);
        }
    });
}

#[test]
fn tokens() {
    let examples = mangle::vectors("tokens", "token");
    let good = mangle::valid("tokens", "token");
    let verifier = TokenVerifier::new(&mangle::cluster(), &[mangle::token_public()]);
    let now = Timestamp::new(mangle::now());
    bolero::check!().with_type::<Mangled>().with_iterations(times(10_000)).for_each(|mangled| {
        let bytes = mangled.bytes(&examples);
        let Ok(text) = String::from_utf8(bytes) else { return };
        match verifier.verify(&text, now) {
            Ok(_) => assert!(good.contains(&text.clone().into_bytes()), "a forgery: {text}"),
            Err(error) => assert!(!error.code().is_empty()),
        }
    });
}

/// A ledger in which everything is known.
fn known() -> Vec<Ledger> {
    let file = Geometry::new(13 << 20).unwrap();
    let claim = Claim { epoch: HomeEpoch::new(2), home: ME };
    let meta = Fact::Meta {
        claim,
        size: Some(file),
        tenant: TenantId::new(7),
        digest: RecordDigest::from_bytes([1; 32]),
    };
    let root = Root::from_bytes([2; 32]);
    let conflict = Disagreement { place: Place::new(8, 2).unwrap(), found: None, home: ME };
    let drop = sluice_engine::command::DropReason::Deleted;
    [
        vec![],
        vec![Fact::Root { size: file, root }],
        vec![Fact::Assembled { claim, size: file, root }],
        vec![Fact::Conflict(conflict), Fact::Root { size: file, root: Root::empty() }],
        vec![Fact::Drop { reason: drop, tenant: TenantId::new(7) }],
    ]
    .into_iter()
    .map(|facts| {
        let mut ledger = Ledger::new(Rules::all());
        for fact in [meta].into_iter().chain(facts) {
            ledger.take(fact).unwrap();
        }
        ledger
    })
    .collect()
}

#[test]
fn what_is_remembered_of_files() {
    let examples: Vec<Vec<u8>> = known()
        .iter()
        .map(|ledger| FileMemory::of(ledger, Some(HomeEpoch::new(1)), None).to_bytes())
        .collect();
    for bytes in &examples {
        assert_eq!(&FileMemory::from_bytes(bytes).unwrap().to_bytes(), bytes);
    }
    bolero::check!().with_type::<Mangled>().with_iterations(times(30_000)).for_each(|mangled| {
        let bytes = mangled.bytes(&examples);
        if let Ok(memory) = FileMemory::from_bytes(&bytes) {
            // Nothing means that nothing is remembered.
            assert!(bytes.is_empty() || memory.to_bytes() == bytes);
            let mut ledger = Ledger::new(Rules::all());
            for fact in memory.facts() {
                assert!(ledger.take(fact).is_ok());
            }
            let _ = (ledger.state(), ledger.statements());
        }
    });
}

#[test]
fn what_is_remembered_of_peers() {
    let seen = (1..5).map(|n| (DcId::new(n), Incarnation::new(u32::from(n) * 3))).collect();
    let drain = Drain { phase: Phase::Data, target: DcId::new(2), evacuate: true };
    let memory = NodeMemory { incarnation: Incarnation::new(9), seen, ..NodeMemory::default() };
    let draining = NodeMemory { drain: Some(drain), ..memory.clone() };
    let mut revoking = memory.clone();
    for (subject, epoch) in [(0, 5), (7, 6), (8, 7)] {
        let subject = FileId::from_bytes([subject; 16]);
        revoking.revoked.take(Revocation::of(subject, TenantId::new(9), RevocationEpoch::new(epoch)));
    }
    let examples =
        [NodeMemory::default().to_bytes(), memory.to_bytes(), revoking.to_bytes(), draining.to_bytes()];
    bolero::check!().with_type::<Mangled>().with_iterations(times(30_000)).for_each(|mangled| {
        let bytes = mangled.bytes(&examples);
        if let Ok(memory) = NodeMemory::from_bytes(&bytes) {
            // Nothing means that nothing is remembered.
            assert!(bytes.is_empty() || memory.to_bytes() == bytes);
        }
    });
}

#[test]
fn pages() {
    let entry = |holder, generation, start, level| {
        let value = sluice_engine::hash::ChainingValue::from_bytes([3; 32]);
        let span = Span::new(Place::new(start, level).unwrap(), value);
        (DcId::new(holder), Generation::new(generation), span)
    };
    let entries = vec![entry(1, 5, 0, 3), entry(1, 5, 8, 0), entry(2, 1 << 32, 0, 4)];
    let examples = [vec![], entries].map(|entries| Page { segment: 0, entries }.to_bytes());
    let file = Geometry::new(70_000 << 20).unwrap();
    bolero::check!().with_type::<Mangled>().with_iterations(times(30_000)).for_each(|mangled| {
        let bytes = mangled.bytes(&examples);
        if let Ok(page) = Page::from_bytes(&bytes) {
            assert_eq!(page.to_bytes(), bytes);
            // Read back into a ledger that never wrote it, it changes nothing.
            let mut ledger = Ledger::new(Rules::all());
            ledger.take(Fact::Root { size: file, root: Root::empty() }).unwrap();
            let before = ledger.clone();
            ledger.page_in(&page);
            assert_eq!(ledger, before);
        }
    });
}
