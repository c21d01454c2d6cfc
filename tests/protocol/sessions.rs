//! Session contexts and tokens.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde_json::{Value, json};
use sluice_engine::context::{Scope, Scopes, SessionContext, SignedContext};
use sluice_engine::ids::{DcId, RevocationEpoch, SessionId, Timestamp};
use sluice_engine::keys::{Purpose, SigningKey};
use sluice_engine::limits::{CLOCK_TOLERANCE_MS, MAX_CONTEXT_LIFE_MS, MAX_DCS};
use sluice_node::token::{MAX_TOKEN_LEN, TokenVerifier};
use uuid::Uuid;

use crate::keys::{A, B, C, CLUSTER, NOW, key, key_of, ring};
use crate::records::TENANT;

const SESSION: &str = "0193e4a0-7b1c-7def-8123-000000000042";

fn context() -> SessionContext {
    SessionContext {
        session: SessionId::new(Uuid::parse_str(SESSION).unwrap()),
        tenant: TENANT,
        scopes: [Scope::Write, Scope::Read].into_iter().collect(),
        rate: 1 << 20,
        quota: 1 << 40,
        quota_files: 0,
        revocation: RevocationEpoch::new(3),
        issuer: A,
        issued_at: Timestamp::new(NOW),
        ends_at: Timestamp::new(NOW + MAX_CONTEXT_LIFE_MS),
        allowed: [A, B].into(),
    }
}

pub(crate) fn contexts() -> Value {
    let signer = key(Purpose::Context, A);
    let everywhere = SessionContext {
        allowed: [].into(),
        scopes: Scopes::all(),
        rate: 0,
        quota: 0,
        revocation: RevocationEpoch::default(),
        ..context()
    };
    let crowded = SessionContext { allowed: (1..=MAX_DCS as u16).map(DcId::new).collect(), ..context() };
    let counted = SessionContext { quota_files: 1 << 33, ..context() };
    let valid = [context(), everywhere, crowded, counted].map(|context| {
        let signed = context.sign(&signer);
        let now = Timestamp::new(NOW);
        assert_eq!(signed.verify(&ring(Purpose::Context), B, now), Ok(context.clone()));
        let scopes: Vec<&str> =
            Scope::ALL.into_iter().filter(|scope| context.scopes.has(*scope)).map(Scope::name).collect();
        json!({
            "key": signer.id().number(),
            "issuer": context.issuer.number(),
            "session": context.session.to_string(),
            "tenant": context.tenant.number(),
            "scopes": scopes,
            "rate": context.rate,
            "quota": context.quota,
            "quota_files": context.quota_files,
            "revocation": context.revocation.number(),
            "issued_at": context.issued_at.number(),
            "ends_at": context.ends_at.number(),
            "allowed": context.allowed.iter().map(|dc| dc.number()).collect::<Vec<_>>(),
            "bytes": hex::encode(signed.as_bytes()),
        })
    });
    json!({ "me": B.number(), "now": NOW, "valid": valid, "invalid": invalid_contexts() })
}

fn invalid_contexts() -> Vec<Value> {
    let signer = key(Purpose::Context, A);
    let good = context().sign(&signer).as_bytes().to_vec();
    let body_len = good.len() - 64;
    let resigned = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut body = good[..body_len].to_vec();
        change(&mut body);
        let signature = signer.sign(&body);
        body.extend_from_slice(&signature);
        body
    };
    let by = |key: &SigningKey| context().sign(key).as_bytes().to_vec();
    let long = SessionContext { ends_at: Timestamp::new(NOW + MAX_CONTEXT_LIFE_MS + 1), ..context() };
    let c = SessionContext { issuer: C, ..context() };
    let end = NOW + MAX_CONTEXT_LIFE_MS;
    let no_files = |b: &mut Vec<u8>| {
        b[3] = 2;
        b.splice(54..54, [0; 8]);
    };
    let mut flipped = good.clone();
    flipped[26] ^= 1;
    let cases: Vec<(&str, Vec<u8>, u16, u64)> = vec![
        ("another magic", resigned(&|b| b[0] = b'X'), 2, NOW),
        ("version 3", resigned(&|b| b[3] = 3), 2, NOW),
        ("version 2 without its quota in files", resigned(&|b| b[3] = 2), 2, NOW),
        ("version 2 with a quota of no files", resigned(&no_files), 2, NOW),
        ("cut short", good[..100].to_vec(), 2, NOW),
        ("nothing", Vec::new(), 2, NOW),
        ("fewer datacenters than it says", resigned(&|b| b.truncate(body_len - 2)), 2, NOW),
        ("a datacenter twice", resigned(&|b| b[body_len - 1] = 1), 2, NOW),
        ("datacenters out of order", resigned(&|b| b[body_len - 3..].copy_from_slice(&[2, 0, 1])), 2, NOW),
        ("it would live too long", long.sign(&signer).as_bytes().to_vec(), 2, NOW),
        ("a tenant changed after signing", flipped, 2, NOW),
        ("signed for another cluster", by(&key_of(Purpose::Context, A, "another")), 2, NOW),
        ("the key of dc 2", resigned(&|b| b[7] = 0x22), 2, NOW),
        ("a key that nobody knows", c.sign(&key(Purpose::Context, C)).as_bytes().to_vec(), 2, NOW),
        ("over, and tolerance too", good.clone(), 2, end + CLOCK_TOLERANCE_MS + 1),
        ("ahead by more than is tolerated", good.clone(), 2, NOW - CLOCK_TOLERANCE_MS - 1),
        ("not allowed in dc 3", good.clone(), 3, NOW),
    ];
    cases
        .into_iter()
        .map(|(what, bytes, me, now)| {
            let signed = SignedContext::from_bytes(bytes.clone());
            let verified = signed.and_then(|signed| {
                signed.verify(&ring(Purpose::Context), DcId::new(me), Timestamp::new(now))
            });
            let error = verified.expect_err(what);
            json!({ "what": what, "bytes": hex::encode(bytes), "me": me, "now": now, "error": error.code() })
        })
        .collect()
}

pub(crate) const TOKEN_SEED: [u8; 32] = [0x30; 32];

fn token_pair() -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&TOKEN_SEED).unwrap()
}

pub(crate) fn token_public() -> [u8; 32] {
    token_pair().public_key().as_ref().try_into().unwrap()
}

fn claims() -> Value {
    let secs = NOW / 1000;
    json!({
        "iss": CLUSTER, "sub": "acme", "tenant": TENANT.number(), "scopes": ["write", "read", "delete"],
        "quota": 0, "rate": 0, "dcs": [1, 2], "epoch": 0, "iat": secs, "nbf": secs, "exp": secs + 3600,
        "jti": SESSION,
    })
}

/// A JWT of these parts, signed whatever they say.
fn token(header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let said = format!("{}.{}", part(header), part(claims));
    let signature = token_pair().sign(said.as_bytes());
    format!("{said}.{}", URL_SAFE_NO_PAD.encode(signature))
}

fn with(name: &str, value: Value) -> Value {
    let mut changed = claims();
    changed[name] = value;
    changed
}

fn without(name: &str) -> Value {
    let mut changed = claims();
    changed.as_object_mut().unwrap().remove(name);
    changed
}

pub(crate) fn tokens() -> Value {
    let verifier = TokenVerifier::new(CLUSTER, &[token_public()]);
    let eddsa = json!({ "alg": "EdDSA", "typ": "JWT" });
    let secs = NOW / 1000;
    let valid = [
        claims(),
        with("scopes", json!(["read", "unheard-of"])),
        without("dcs"),
        with("quota_files", json!(1000)),
    ]
    .map(|claims| {
        let text = token(&eddsa, &claims);
        let verified = verifier.verify(&text, Timestamp::new(NOW)).unwrap();
        let scopes: Vec<&str> =
            Scope::ALL.into_iter().filter(|scope| verified.scopes.has(*scope)).map(Scope::name).collect();
        json!({ "claims": claims, "token": text, "session": verified.session.to_string(), "scopes": scopes, "quota_files": verified.quota_files })
    });
    let good = token(&eddsa, &claims());
    let parts: Vec<&str> = good.split('.').collect();
    let crowded: Vec<u16> = (0..=MAX_DCS as u16).collect();
    let invalid: Vec<(&str, String, u64)> = vec![
        ("no token", String::new(), NOW),
        ("two parts", format!("{}.{}", parts[0], parts[1]), NOW),
        ("no signature", format!("{}.{}.", parts[0], parts[1]), NOW),
        ("unsigned by its own word", token(&json!({ "alg": "none", "typ": "JWT" }), &claims()), NOW),
        ("another algorithm", token(&json!({ "alg": "HS256", "typ": "JWT" }), &claims()), NOW),
        (
            "a signature over other claims",
            {
                let other = token(&eddsa, &with("tenant", json!(8)));
                format!("{}.{}.{}", parts[0], other.split('.').nth(1).unwrap(), parts[2])
            },
            NOW,
        ),
        ("of another cluster", token(&eddsa, &with("iss", json!("another"))), NOW),
        ("no tenant", token(&eddsa, &without("tenant")), NOW),
        ("no name", token(&eddsa, &without("jti")), NOW),
        ("no end", token(&eddsa, &without("exp")), NOW),
        ("a negative tenant", token(&eddsa, &with("tenant", json!(-1))), NOW),
        ("a negative number of files", token(&eddsa, &with("quota_files", json!(-1))), NOW),
        ("more datacenters than there can be", token(&eddsa, &with("dcs", json!(crowded))), NOW),
        ("over 4,096 bytes", token(&eddsa, &with("sub", json!("x".repeat(MAX_TOKEN_LEN)))), NOW),
        ("over, and tolerance too", good.clone(), (secs + 3661) * 1000),
        ("ahead by more than is tolerated", good.clone(), (secs - 61) * 1000),
    ];
    let invalid: Vec<Value> = invalid
        .into_iter()
        .map(|(what, text, now)| {
            let error = verifier.verify(&text, Timestamp::new(now)).expect_err(what);
            json!({ "what": what, "token": text, "now": now, "error": error.code() })
        })
        .collect();
    json!({ "now": NOW, "cluster": CLUSTER, "valid": valid, "invalid": invalid })
}
