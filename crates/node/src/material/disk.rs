//! The material in a directory, format version 1. Secrets are readable by their owner only (mode 0600).
//!
//! | file | holds |
//! | --- | --- |
//! | `cluster.json` | version, names, numbers, public keys; `shares` if slots are divided |
//! | `ca.pem` | certificate of the CA: what clients trust |
//! | `ca-key.pem` | secret: key of the CA (PKCS#8) |
//! | `edge.pem` · `edge-key.pem` | chain of the edges · secret: its key |
//! | `token-key.pem` | secret: the token key (PKCS#8, Ed25519) |
//! | `tickets.key` | secret: 64 hexadecimal digits |
//! | `dc-<number>/peer.pem` · `peer-key.pem` | chain towards peers · secret: its key |
//! | `dc-<number>/<role>.pem` · `<role>-key.pem` | chain of a role inside · secret: its key |
//! | `dc-<number>/command.key` · `context.key` | secret: Ed25519 seed, 64 hexadecimal digits |
//!
//! Where there can be no directories, as in a Secret of Kubernetes, `dc-1.peer.pem` is `dc-1/peer.pem`, and so on.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ring::signature::{Ed25519KeyPair, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use sluice_engine::ids::{DcId, KeyId};
use sluice_engine::share::Shares;

use super::{
    ClusterMaterial, DcMaterial, Identity, MaterialError, PrivateKey, SigningMaterial, check_dcs, check_name,
};
use crate::role::Role;
use crate::token::TokenMint;

const VERSION: u32 = 1;
const INDEX: &str = "cluster.json";
const CERTIFICATE: &str = "CERTIFICATE";
const PRIVATE_KEY: &str = "PRIVATE KEY";

/// No file here is nearly as long.
const MAX_FILE_LEN: u64 = 1 << 20;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    version: u32,
    cluster: String,
    /// Into how many shares slots are divided.
    #[serde(default = "undivided", skip_serializing_if = "is_undivided")]
    shares: u32,
    token_public: String,
    dcs: Vec<IndexDc>,
}

fn undivided() -> u32 {
    Shares::ONE.count()
}

fn is_undivided(shares: &u32) -> bool {
    *shares == undivided()
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct IndexDc {
    number: u16,
    name: String,
    command: IndexKey,
    context: IndexKey,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct IndexKey {
    id: u32,
    public: String,
}

/// A certificate in PEM.
pub(super) fn certificate_pem(certificate: &CertificateDer<'_>) -> String {
    pem(CERTIFICATE, certificate)
}

pub(super) fn save(material: &ClusterMaterial, directory: &Path) -> Result<(), MaterialError> {
    let index = Index {
        version: VERSION,
        cluster: material.name.clone(),
        shares: material.shares.count(),
        token_public: hex::encode(material.token_public),
        dcs: material.dcs.iter().map(|(dc, part)| index_dc(*dc, part)).collect(),
    };
    make_directory(directory)?;
    for (dc, part) in &material.dcs {
        let directory = directory.join(dc_directory(*dc));
        let secrets = [part.command.seed.is_some(), part.context.seed.is_some()];
        if part.peer.is_some() || !part.roles.is_empty() || secrets.contains(&true) {
            make_directory(&directory)?;
        }
        if let Some(identity) = &part.peer {
            write_identity(&directory, "peer", identity)?;
        }
        for (role, identity) in &part.roles {
            write_identity(&directory, role.name(), identity)?;
        }
        for (name, key) in [("command.key", &part.command), ("context.key", &part.context)] {
            if let Some(seed) = &key.seed {
                write(&directory.join(name), 0o600, &hex_line(seed))?;
            }
        }
    }
    write(&directory.join("ca.pem"), 0o644, &certificate_pem(&material.ca))?;
    if let Some(PrivateKey(key)) = &material.ca_key {
        write(&directory.join("ca-key.pem"), 0o600, &pem(PRIVATE_KEY, key))?;
    }
    if let Some(identity) = &material.edge {
        write_identity(directory, "edge", identity)?;
    }
    if let Some(PrivateKey(key)) = &material.token_key {
        write(&directory.join("token-key.pem"), 0o600, &pem(PRIVATE_KEY, key))?;
    }
    if let Some(secret) = &material.ticket_secret {
        write(&directory.join("tickets.key"), 0o600, &hex_line(secret))?;
    }
    let text = serde_json::to_string_pretty(&index)
        .map_err(|error| MaterialError::Issue { what: INDEX, reason: error.to_string() })?;
    // Last, so that a directory with an index is whole.
    write(&directory.join(INDEX), 0o644, &(text + "\n"))
}

pub(super) fn load(directory: &Path, certificates: bool) -> Result<ClusterMaterial, MaterialError> {
    let path = directory.join(INDEX);
    let garbled = |expected| MaterialError::Garbled { path: path.clone(), expected };
    let text = read(&path)?.ok_or(MaterialError::Missing { path: path.clone() })?;
    let index: Index =
        serde_json::from_str(&text).map_err(|_| garbled("the index of a cluster's material, in JSON"))?;
    if index.version != VERSION {
        return Err(garbled("format version 1"));
    }
    check_name("cluster name", &index.cluster)?;
    check_dcs(index.dcs.iter().map(|dc| (DcId::new(dc.number), dc.name.as_str())))?;
    let shares = Shares::new(index.shares).map_err(|_| garbled("1, 2, 4, … or 256 as \"shares\""))?;
    let token_public = unhex(&index.token_public).ok_or_else(|| garbled("a public token key"))?;

    let mut dcs = BTreeMap::new();
    for dc in &index.dcs {
        let number = DcId::new(dc.number);
        let place = directory.join(dc_directory(number));
        let key = |key: &IndexKey, file| {
            let public = unhex(&key.public).ok_or_else(|| garbled("public keys of 64 hexadecimal digits"))?;
            let seed = read_seed(&place.join(file), &public)?;
            Ok::<_, MaterialError>(SigningMaterial { id: KeyId::new(key.id), public, seed })
        };
        let material = DcMaterial {
            name: dc.name.clone(),
            command: key(&dc.command, "command.key")?,
            context: key(&dc.context, "context.key")?,
            peer: if certificates { read_identity(&place, "peer")? } else { None },
            roles: if certificates { read_roles(&place)? } else { BTreeMap::new() },
        };
        dcs.insert(number, material);
    }
    let ca_path = directory.join("ca.pem");
    let ca = read_chain(&ca_path)?
        .and_then(|chain| chain.into_iter().next())
        .ok_or(MaterialError::Missing { path: ca_path })?;
    let token_path = directory.join("token-key.pem");
    let token_key = read_key(&token_path)?;
    if let Some(PrivateKey(key)) = &token_key {
        let mint = TokenMint::new(&index.cluster, key).ok().filter(|mint| mint.public() == token_public);
        mint.ok_or(MaterialError::Garbled { path: token_path, expected: "the key of the index, in PKCS#8" })?;
    }
    Ok(ClusterMaterial {
        shares,
        dcs,
        ca,
        ca_key: read_key(&directory.join("ca-key.pem"))?,
        edge: if certificates { read_identity(directory, "edge")? } else { None },
        token_public,
        token_key,
        ticket_secret: read_secret(&directory.join("tickets.key"))?,
        name: index.cluster,
    })
}

fn index_dc(dc: DcId, part: &DcMaterial) -> IndexDc {
    let key = |key: &SigningMaterial| IndexKey { id: key.id.number(), public: hex::encode(key.public) };
    IndexDc {
        number: dc.number(),
        name: part.name.clone(),
        command: key(&part.command),
        context: key(&part.context),
    }
}

fn dc_directory(dc: DcId) -> String {
    format!("dc-{}", dc.number())
}

fn pem(tag: &str, der: &[u8]) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new(tag, der), config)
}

fn hex_line(bytes: &[u8; 32]) -> String {
    hex::encode(bytes) + "\n"
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes).ok().map(|()| bytes)
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> MaterialError {
    let path = path.to_owned();
    move |source| MaterialError::Io { path, source }
}

fn make_directory(path: &Path) -> Result<(), MaterialError> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed(path))?;
    // What is synced into a directory is no safer than the directory's own name.
    match path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => fs::File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed(parent)),
        None => Ok(()),
    }
}

fn write_identity(directory: &Path, name: &str, identity: &Identity) -> Result<(), MaterialError> {
    let chain: String = identity.chain().iter().map(certificate_pem).collect();
    write(&directory.join(format!("{name}.pem")), 0o644, &chain)?;
    write(&directory.join(format!("{name}-key.pem")), 0o600, &pem(PRIVATE_KEY, identity.key().secret_der()))
}

/// Writes a file so that it is there whole or not at all, with the directory entry durable.
fn write(path: &Path, mode: u32, text: &str) -> Result<(), MaterialError> {
    use std::os::unix::fs::PermissionsExt;
    let directory = path.parent().unwrap_or(Path::new("."));
    let attempt = || -> io::Result<()> {
        let mut file =
            tempfile::Builder::new().permissions(fs::Permissions::from_mode(mode)).tempfile_in(directory)?;
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        fs::File::open(directory)?.sync_all()
    };
    attempt().map_err(failed(path))
}

/// Where a file is that should be in the directory of a datacenter, if there are no directories.
fn without_directory(path: &Path) -> Option<PathBuf> {
    let directory = path.parent()?;
    let (place, name) = (directory.file_name()?.to_str()?, path.file_name()?.to_str()?);
    (place.starts_with("dc-") && !directory.exists())
        .then(|| directory.with_file_name(format!("{place}.{name}")))
}

fn read(path: &Path) -> Result<Option<String>, MaterialError> {
    let length = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return without_directory(path).map_or(Ok(None), |path| read(&path));
        }
        Err(error) => return Err(failed(path)(error)),
    };
    if length > MAX_FILE_LEN {
        return Err(MaterialError::Garbled { path: path.to_owned(), expected: "less than 1 MiB" });
    }
    fs::read_to_string(path).map(Some).map_err(failed(path))
}

fn read_pem(path: &Path, tag: &str, expected: &'static str) -> Result<Option<Vec<Vec<u8>>>, MaterialError> {
    let Some(text) = read(path)? else { return Ok(None) };
    let garbled = || MaterialError::Garbled { path: path.to_owned(), expected };
    let blocks = pem::parse_many(text).map_err(|_| garbled())?;
    if blocks.is_empty() || blocks.iter().any(|block| block.tag() != tag) {
        return Err(garbled());
    }
    Ok(Some(blocks.into_iter().map(pem::Pem::into_contents).collect()))
}

fn read_chain(path: &Path) -> Result<Option<Vec<CertificateDer<'static>>>, MaterialError> {
    let blocks = read_pem(path, CERTIFICATE, "certificates in PEM")?;
    Ok(blocks.map(|blocks| blocks.into_iter().map(CertificateDer::from).collect()))
}

fn read_key(path: &Path) -> Result<Option<PrivateKey>, MaterialError> {
    let blocks = read_pem(path, PRIVATE_KEY, "one PKCS#8 key in PEM")?;
    Ok(blocks.and_then(|blocks| blocks.into_iter().next()).map(PrivateKey))
}

fn read_identity(directory: &Path, name: &str) -> Result<Option<Identity>, MaterialError> {
    let chain_path = directory.join(format!("{name}.pem"));
    let key_path = directory.join(format!("{name}-key.pem"));
    match (read_chain(&chain_path)?, read_key(&key_path)?) {
        (Some(chain), Some(PrivateKey(key))) => {
            let identity = Identity::new(chain, PrivateKeyDer::Pkcs8(key.into()));
            let garbled = |_| MaterialError::Garbled {
                path: key_path,
                expected: "the key of the certificate beside it",
            };
            identity.map(Some).map_err(garbled)
        }
        (None, None) => Ok(None),
        (Some(_), None) => Err(MaterialError::Missing { path: key_path }),
        (None, Some(_)) => Err(MaterialError::Missing { path: chain_path }),
    }
}

fn read_roles(directory: &Path) -> Result<BTreeMap<Role, Identity>, MaterialError> {
    let read = |role: Role| Ok(read_identity(directory, role.name())?.map(|identity| (role, identity)));
    Role::ALL.into_iter().filter_map(|role| read(role).transpose()).collect()
}

fn read_secret(path: &Path) -> Result<Option<[u8; 32]>, MaterialError> {
    let Some(text) = read(path)? else { return Ok(None) };
    let garbled = MaterialError::Garbled { path: path.to_owned(), expected: "64 hexadecimal digits" };
    unhex(text.trim_end()).map(Some).ok_or(garbled)
}

/// Reads a seed and checks that it is the secret half of `public`.
fn read_seed(path: &Path, public: &[u8; 32]) -> Result<Option<[u8; 32]>, MaterialError> {
    let Some(seed) = read_secret(path)? else { return Ok(None) };
    match Ed25519KeyPair::from_seed_and_public_key(&seed, public) {
        Ok(pair) if pair.public_key().as_ref() == public => Ok(Some(seed)),
        Ok(_) | Err(_) => Err(MaterialError::Garbled {
            path: path.to_owned(),
            expected: "the seed of the key in the index",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_engine::keys::Purpose;
    use std::os::unix::fs::PermissionsExt;

    const A: DcId = DcId::new(1);
    const B: DcId = DcId::new(2);

    fn material() -> ClusterMaterial {
        ClusterMaterial::generate("test", &[(A, "dc-a"), (B, "dc-b")]).unwrap()
    }

    #[test]
    fn what_is_saved_is_loaded_and_secrets_are_the_owners() {
        let directory = tempfile::tempdir().unwrap();
        let made = material();
        made.save(directory.path()).unwrap();
        let loaded = ClusterMaterial::load(directory.path()).unwrap();
        assert_eq!(loaded.dcs().collect::<Vec<_>>(), [(A, "dc-a"), (B, "dc-b")]);
        assert_eq!(loaded.dc_named("dc-b"), Some(B));
        assert_eq!(loaded.ca_pem(), made.ca_pem());
        let signature = loaded.command_key(B).unwrap().sign(b"body");
        let id = loaded.command_key(B).unwrap().id();
        assert_eq!(made.command_ring().verify(id, B, b"body", &signature), Ok(()));
        assert!(made.context_ring().verify(id, B, b"body", &signature).is_err());
        for secret in ["ca-key.pem", "edge-key.pem", "token-key.pem", "tickets.key", "dc-1/command.key"] {
            let mode = fs::metadata(directory.path().join(secret)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{secret}");
        }
        // Saving again replaces.
        made.save(directory.path()).unwrap();
    }

    #[test]
    fn a_datacenter_can_do_without_the_secrets_of_others() {
        let directory = tempfile::tempdir().unwrap();
        material().only(A).unwrap().save(directory.path()).unwrap();
        let mine = ClusterMaterial::load(directory.path()).unwrap();
        assert!(mine.command_key(A).is_ok() && mine.peer_identity(A).is_ok() && mine.edge_identity().is_ok());
        assert!(matches!(mine.context_key(B), Err(MaterialError::Absent(_))));
        assert!(matches!(mine.peer_identity(B), Err(MaterialError::Absent(_))));
        assert!(matches!(mine.token_mint(), Err(MaterialError::Absent(_))));
        assert!(matches!(mine.command_key(DcId::new(9)), Err(MaterialError::UnknownDc(_))));
        assert_eq!(mine.dcs.len(), 2);
        assert!(!directory.path().join("ca-key.pem").exists());
        assert_eq!(mine.dcs[&B].signing(Purpose::Context).seed, None);
    }

    #[test]
    fn how_slots_are_divided_is_kept() {
        let place = tempfile::tempdir().unwrap();
        material().save(place.path()).unwrap();
        let index = place.path().join(INDEX);
        let text = fs::read_to_string(&index).unwrap();
        assert!(!text.contains("shares"), "as before there were any");
        assert_eq!(load(place.path(), true).unwrap().shares(), Shares::ONE);
        material().dividing(Shares::new(16).unwrap()).save(place.path()).unwrap();
        let divided = load(place.path(), true).unwrap();
        assert_eq!(divided.only_role(A, Role::Worker).unwrap().shares().count(), 16);
        let text = fs::read_to_string(&index).unwrap().replace("16", "12");
        fs::write(&index, text).unwrap();
        assert!(matches!(load(place.path(), true), Err(MaterialError::Garbled { .. })));
    }

    #[test]
    fn directories_can_be_left_out() {
        let place = tempfile::tempdir().unwrap();
        material().only(A).unwrap().save(place.path()).unwrap();
        let own = place.path().join(dc_directory(A));
        let mut moved = 0;
        for entry in fs::read_dir(&own).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            fs::rename(own.join(&name), place.path().join(format!("dc-1.{name}"))).unwrap();
            moved += 1;
        }
        fs::remove_dir(&own).unwrap();
        let loaded = load(place.path(), true).unwrap();
        assert!(moved > 4 && loaded.peer_identity(A).is_ok() && loaded.command_key(A).is_ok());
        assert!(loaded.role_identity(A, Role::Worker).is_ok() && loaded.peer_identity(B).is_err());
    }

    #[test]
    fn a_process_can_do_without_the_secrets_of_other_roles() {
        for role in Role::ALL {
            let directory = tempfile::tempdir().unwrap();
            material().only_role(A, role).unwrap().save(directory.path()).unwrap();
            let mine = ClusterMaterial::load(directory.path()).unwrap();
            for other in Role::ALL {
                assert_eq!(mine.role_identity(A, other).is_ok(), other == role, "{other} in {role}");
                assert!(mine.role_identity(B, other).is_err());
            }
            assert_eq!(mine.edge_identity().is_ok(), role == Role::Edge);
            assert_eq!(mine.ticket_secret().is_ok(), role == Role::Edge);
            assert_eq!(mine.context_key(A).is_ok(), role == Role::Session);
            assert_eq!(mine.command_key(A).is_ok(), role == Role::Aggregator);
            assert_eq!(mine.peer_identity(A).is_ok(), role == Role::Aggregator);
        }
    }

    #[test]
    fn garbled_and_missing_files_are_named() {
        let directory = tempfile::tempdir().unwrap();
        material().save(directory.path()).unwrap();
        for file in [
            INDEX,
            "ca.pem",
            "edge-key.pem",
            "token-key.pem",
            "tickets.key",
            "dc-2/context.key",
            "dc-1/peer.pem",
        ] {
            let path = directory.path().join(file);
            let whole = fs::read(&path).unwrap();
            fs::write(&path, "garbled").unwrap();
            let error = ClusterMaterial::load(directory.path()).unwrap_err();
            assert!(
                matches!(&error, MaterialError::Garbled { path: named, .. } if *named == path),
                "{error}"
            );
            fs::write(&path, whole).unwrap();
        }
        for file in [INDEX, "ca.pem", "edge-key.pem", "dc-1/peer.pem"] {
            let path = directory.path().join(file);
            let whole = fs::read(&path).unwrap();
            fs::remove_file(&path).unwrap();
            let error = ClusterMaterial::load(directory.path()).unwrap_err();
            assert!(matches!(&error, MaterialError::Missing { path: named } if *named == path), "{error}");
            fs::write(&path, whole).unwrap();
        }
        assert!(ClusterMaterial::load(directory.path()).is_ok());
    }

    #[test]
    fn names_that_cannot_be_in_dns_and_doubled_datacenters_are_refused() {
        for name in ["", "A", "a b", "-a", "a-", &"a".repeat(41)] {
            assert!(matches!(
                ClusterMaterial::generate(name, &[(A, "dc-a")]),
                Err(MaterialError::Name { .. })
            ));
        }
        for dcs in [&[][..], &[(A, "x"), (A, "y")], &[(A, "x"), (B, "x")], &[(DcId::EVERY, "x")]] {
            let error = ClusterMaterial::generate("test", dcs).unwrap_err();
            assert!(matches!(error, MaterialError::Datacenters(_)), "{error}");
        }
    }
}
