//! The material of a cluster and a token, as an earlier version wrote them: read by today's code. `fixtures/cluster-N` has
//! format version N; old ones stay. For a new version raise [`NEWEST`] and run `UPDATE=1 cargo nextest run -p sluice-node
//! fixtures`, which writes what is not there yet. Nothing of it is a secret: only public halves are kept.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use sluice_engine::context::Scope;
use sluice_engine::ids::{DcId, RevocationEpoch, TenantId, Timestamp};
use sluice_node::material::ClusterMaterial;
use sluice_node::token::{TokenError, TokenGrant};

/// The newest version of which there is a fixture.
const NEWEST: u32 = 1;

/// When the tokens were made.
const THEN: Timestamp = Timestamp::new(1_800_000_000_000);

const HOUR: Duration = Duration::from_secs(3600);

fn fixture(version: u32) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/cluster-{version}"))
}

fn dcs() -> [(DcId, &'static str); 2] {
    [(DcId::new(1), "dc-a"), (DcId::new(2), "dc-b")]
}

fn make(place: &Path) {
    let material = ClusterMaterial::generate("fixture", &dcs()).unwrap();
    let grant = TokenGrant {
        scopes: vec![Scope::Read, Scope::Write],
        quota: 5,
        rate: 6,
        dcs: vec![DcId::new(2)],
        epoch: RevocationEpoch::new(7),
        ..TokenGrant::everything(TenantId::new(9), "someone", HOUR)
    };
    let token = material.token_mint().unwrap().mint(&grant, THEN).unwrap();
    let whole = tempfile::tempdir().unwrap();
    material.save(whole.path()).unwrap();
    std::fs::create_dir_all(place).unwrap();
    for name in ["cluster.json", "ca.pem"] {
        std::fs::copy(whole.path().join(name), place.join(name)).unwrap();
    }
    std::fs::write(place.join("token"), token + "\n").unwrap();
}

#[test]
fn clusters_and_tokens_of_every_version_are_read() {
    if std::env::var_os("UPDATE").is_some() && !fixture(NEWEST).exists() {
        make(&fixture(NEWEST));
    }
    for version in 1..=NEWEST {
        let place = fixture(version);
        let material = ClusterMaterial::load(&place).unwrap();
        assert_eq!(material.name(), "fixture");
        assert_eq!(material.dcs().collect::<Vec<_>>(), dcs());
        assert_eq!(material.ca_pem(), std::fs::read_to_string(place.join("ca.pem")).unwrap());
        assert!(material.command_key(DcId::new(1)).is_err(), "only public halves are kept");

        let token = std::fs::read_to_string(place.join("token")).unwrap();
        let verifier = material.token_verifier();
        let verified = verifier.verify(token.trim(), THEN).unwrap();
        assert_eq!((verified.tenant, verified.tenant_name.as_str()), (TenantId::new(9), "someone"));
        assert_eq!((verified.quota, verified.rate, &verified.dcs[..]), (5, 6, &[DcId::new(2)][..]));
        assert_eq!(verified.scopes, [Scope::Read, Scope::Write].into_iter().collect());
        assert_eq!(verified.epoch, RevocationEpoch::new(7));
        assert_eq!(verified.ends_at, Timestamp::new(THEN.number() + 3_600_000));
        let late = verifier.verify(token.trim(), Timestamp::new(THEN.number() + 8_000_000));
        assert!(matches!(late, Err(TokenError::Expired { .. })));
    }
}
