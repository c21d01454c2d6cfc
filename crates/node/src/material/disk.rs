//! The material in a directory, format version 1. Secrets are readable by their owner only (mode 0600).
//!
//! | file | holds |
//! | --- | --- |
//! | `cluster.json` | version, names, numbers, public keys; `shares` if slots are divided; `revision` and `rotation` of keys |
//! | `ca.pem` | certificate of the CA: what clients trust |
//! | `ca-key.pem` | secret: key of the CA (PKCS#8) |
//! | `edge.pem` · `edge-key.pem` | chain of the edges · secret: its key |
//! | `token-key.pem` | secret: the token key (PKCS#8, Ed25519) |
//! | `tickets.key` | secret: 64 hexadecimal digits |
//! | `dc-<number>/peer.pem` · `peer-key.pem` | chain towards peers · secret: its key |
//! | `dc-<number>/<role>.pem` · `<role>-key.pem` | chain of a role inside · secret: its key |
//! | `dc-<number>/command.key` · `context.key` | secret: Ed25519 seed, 64 hexadecimal digits |
//!
//! While keys are rotated there are two of a kind in its file. The index names both, the one that is used first, and says in
//! `rotation` whether the other is the next or the previous one. What it does not name is not looked at, and the other may
//! be missing: files that are replaced one by one, in any order, make sense all the time.
//!
//! Where there can be no directories, as in a Secret of Kubernetes, `dc-1.peer.pem` is `dc-1/peer.pem`, and so on.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use ring::signature::{Ed25519KeyPair, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use sluice_engine::ids::{DcId, KeyId};
use sluice_engine::share::Shares;
use tokio::sync::watch;

use super::keys::{Ca, DcKeys, KeyKind, KeySet, Keys, Pair, PrivateKey, SigningMaterial, Stage, TokenKey};
use super::{ClusterMaterial, DcMaterial, Identity, MaterialError, check_dcs, check_name, issue};
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
    /// How many steps of rotations were made.
    #[serde(default, skip_serializing_if = "is_zero")]
    revision: u64,
    /// What the second key of each kind is.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    rotation: BTreeMap<String, String>,
    token_public: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token_other: Option<String>,
    /// The secrets of tickets, and the CAs, by a digest; before there was a rotation: whichever is there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tickets: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ca: Vec<String>,
    dcs: Vec<IndexDc>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    command_other: Option<IndexKey>,
    context: IndexKey,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    context_other: Option<IndexKey>,
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
    let keys = material.keys.load();
    let KeySet { revision, stages, dcs, tokens, tickets, ca } = &keys.set;
    let stage = |(kind, stage): (&KeyKind, &Stage)| (kind.name().to_owned(), stage.name().to_owned());
    let index = Index {
        version: VERSION,
        cluster: material.name.clone(),
        shares: material.shares.count(),
        revision: *revision,
        rotation: stages.iter().map(stage).collect(),
        token_public: hex::encode(tokens.current.public),
        token_other: tokens.other.as_ref().map(|key| hex::encode(key.public)),
        tickets: names(*revision, tickets.iter().flat_map(Pair::all).map(|secret| name_of(secret))),
        ca: names(*revision, ca.all().map(|ca| name_of(&ca.certificate))),
        dcs: material
            .dcs
            .iter()
            .zip(dcs.values())
            .map(|((dc, part), keys)| index_dc(*dc, part, keys))
            .collect(),
    };
    make_directory(directory)?;
    for ((dc, part), keys) in material.dcs.iter().zip(dcs.values()) {
        let directory = directory.join(dc_directory(*dc));
        let secrets = [("command.key", seeds(&keys.commands)), ("context.key", seeds(&keys.contexts))];
        if part.peer.is_some() || !part.roles.is_empty() || secrets.iter().any(|(_, seeds)| !seeds.is_empty())
        {
            make_directory(&directory)?;
        }
        if let Some(identity) = &part.peer {
            write_identity(&directory, "peer", identity)?;
        }
        for (role, identity) in &part.roles {
            write_identity(&directory, role.name(), identity)?;
        }
        for (name, seeds) in secrets.iter().filter(|(_, seeds)| !seeds.is_empty()) {
            write(&directory.join(name), 0o600, seeds)?;
        }
    }
    write(&directory.join("ca.pem"), 0o644, &material.ca_pem())?;
    for (name, keys) in [
        ("ca-key.pem", ca.all().filter_map(|ca| ca.key.as_ref()).map(private_pem).collect::<String>()),
        ("token-key.pem", tokens.all().filter_map(|key| key.secret.as_ref()).map(private_pem).collect()),
        ("tickets.key", tickets.iter().flat_map(Pair::all).map(hex_line).collect()),
    ] {
        if !keys.is_empty() {
            write(&directory.join(name), 0o600, &keys)?;
        }
    }
    if let Some(identity) = &material.edge {
        write_identity(directory, "edge", identity)?;
    }
    let text = serde_json::to_string_pretty(&index)
        .map_err(|error| MaterialError::Issue { what: INDEX, reason: error.to_string() })?;
    // Last, so that a directory with an index is whole.
    write(&directory.join(INDEX), 0o644, &(text + "\n"))
}

/// What the index calls something by, which does not give it away.
fn name_of(bytes: &[u8]) -> String {
    hex::encode(blake3::derive_key("sluice 2026-11 name of a key v1", bytes))
}

/// Names are given from the first rotation on.
fn names(revision: u64, names: impl Iterator<Item = String>) -> Vec<String> {
    if revision == 0 { Vec::new() } else { names.collect() }
}

fn private_pem(PrivateKey(key): &PrivateKey) -> String {
    pem(PRIVATE_KEY, key)
}

fn seeds(keys: &Pair<SigningMaterial>) -> String {
    keys.all().filter_map(|key| key.seed.as_ref()).map(hex_line).collect()
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
    let mut stages = BTreeMap::new();
    for (kind, stage) in &index.rotation {
        let both = KeyKind::from_name(kind).zip(Stage::from_name(stage));
        let (kind, stage) =
            both.ok_or_else(|| garbled("kinds of keys, and next or previous, as \"rotation\""))?;
        stages.insert(kind, stage);
    }

    let (mut dcs, mut keys) = (BTreeMap::new(), BTreeMap::new());
    for dc in &index.dcs {
        let number = DcId::new(dc.number);
        let place = directory.join(dc_directory(number));
        let key = |key: &IndexKey, other: Option<&IndexKey>, file| {
            let seeds = read_secrets(&place.join(file))?;
            let with_seed = |key: &IndexKey| {
                let public = unhex(&key.public);
                let public = public.ok_or_else(|| garbled("public keys of 64 hexadecimal digits"))?;
                let seed = seeds.iter().copied().find(|seed| is_seed_of(seed, &public));
                Ok::<_, MaterialError>(SigningMaterial { id: KeyId::new(key.id), public, seed })
            };
            let pair = Pair { current: with_seed(key)?, other: other.map(with_seed).transpose()? };
            let is_foreign = !seeds.is_empty() && pair.all().all(|key| key.seed.is_none());
            let expected = "the seed of the key in the index";
            if is_foreign {
                Err(MaterialError::Garbled { path: place.join(file), expected })
            } else {
                Ok(pair)
            }
        };
        let own = DcKeys {
            commands: key(&dc.command, dc.command_other.as_ref(), "command.key")?,
            contexts: key(&dc.context, dc.context_other.as_ref(), "context.key")?,
        };
        keys.insert(number, own);
        let material = DcMaterial {
            name: dc.name.clone(),
            peer: if certificates { read_identity(&place, "peer")? } else { None },
            roles: if certificates { read_roles(&place)? } else { BTreeMap::new() },
        };
        dcs.insert(number, material);
    }
    let set = KeySet {
        revision: index.revision,
        dcs: keys,
        tokens: read_tokens(directory, &index)?,
        tickets: read_tickets(directory, &index.tickets)?,
        ca: read_cas(directory, &index.ca)?,
        stages,
    };
    Ok(ClusterMaterial {
        shares,
        dcs,
        edge: if certificates { read_identity(directory, "edge")? } else { None },
        keys: Arc::new(ArcSwap::from_pointee(Keys::new(&index.cluster, set)?)),
        changes: Arc::new(watch::Sender::new(index.revision)),
        name: index.cluster,
    })
}

fn read_tokens(directory: &Path, index: &Index) -> Result<Pair<TokenKey>, MaterialError> {
    let path = directory.join("token-key.pem");
    let secrets = read_keys(&path)?;
    let key = |public: &String| {
        let public = unhex(public).ok_or_else(|| MaterialError::Garbled {
            path: directory.join(INDEX),
            expected: "a public token key",
        })?;
        let is_its = |PrivateKey(key): &&PrivateKey| {
            TokenMint::new(&index.cluster, key).is_ok_and(|mint| mint.public() == public)
        };
        let secret = secrets.iter().find(is_its).cloned();
        Ok::<_, MaterialError>(TokenKey { public, secret })
    };
    let other = index.token_other.as_ref().map(key).transpose()?;
    let pair = Pair { current: key(&index.token_public)?, other };
    if secrets.is_empty() || pair.all().any(|key| key.secret.is_some()) {
        Ok(pair)
    } else {
        Err(MaterialError::Garbled { path, expected: "the key of the index, in PKCS#8" })
    }
}

fn read_tickets(directory: &Path, names: &[String]) -> Result<Option<Pair<[u8; 32]>>, MaterialError> {
    let path = directory.join("tickets.key");
    let secrets = read_secrets(&path)?;
    if secrets.is_empty() {
        return Ok(None);
    }
    let pair = named(secrets, names, |secret| name_of(secret));
    pair.map(Some).ok_or(MaterialError::Garbled { path, expected: "the secret that the index names" })
}

fn read_cas(directory: &Path, names: &[String]) -> Result<Pair<Ca>, MaterialError> {
    let path = directory.join("ca.pem");
    let certificates = read_chain(&path)?.ok_or_else(|| MaterialError::Missing { path: path.clone() })?;
    let keys = read_keys(&directory.join("ca-key.pem"))?;
    let with_key = |certificate: CertificateDer<'static>| {
        let key = keys.iter().find(|PrivateKey(key)| issue::is_key_of(key, &certificate)).cloned();
        Ca { certificate, key }
    };
    let cas = certificates.into_iter().map(with_key).collect();
    let pair = named(cas, names, |ca: &Ca| name_of(&ca.certificate));
    pair.ok_or(MaterialError::Garbled { path, expected: "the certificate of the CA that the index names" })
}

/// The one with the first name, and the one with the second if it is there; without names the first of all.
fn named<T>(mut all: Vec<T>, names: &[String], name: impl Fn(&T) -> String) -> Option<Pair<T>> {
    if names.is_empty() {
        return (!all.is_empty()).then(|| Pair::new(all.swap_remove(0)));
    }
    let mut find = |wanted: &String| {
        let at = all.iter().position(|one| name(one) == *wanted)?;
        Some(all.swap_remove(at))
    };
    Some(Pair { current: find(&names[0])?, other: names.get(1).and_then(&mut find) })
}

fn index_dc(dc: DcId, part: &DcMaterial, keys: &DcKeys) -> IndexDc {
    let key = |key: &SigningMaterial| IndexKey { id: key.id.number(), public: hex::encode(key.public) };
    IndexDc {
        number: dc.number(),
        name: part.name.clone(),
        command: key(&keys.commands.current),
        command_other: keys.commands.other.as_ref().map(key),
        context: key(&keys.contexts.current),
        context_other: keys.contexts.other.as_ref().map(key),
    }
}

fn dc_directory(dc: DcId) -> String {
    format!("dc-{}", dc.number())
}

/// The file of a chain in a directory of material: of a datacenter, or of all.
pub(super) fn chain_file(dc: Option<DcId>, name: &str) -> PathBuf {
    dc.map(dc_directory).map_or_else(PathBuf::new, PathBuf::from).join(format!("{name}.pem"))
}

/// Where such a file is, also where there are no directories.
pub(super) fn found(path: PathBuf) -> PathBuf {
    without_directory(&path).unwrap_or(path)
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

fn read_keys(path: &Path) -> Result<Vec<PrivateKey>, MaterialError> {
    let blocks = read_pem(path, PRIVATE_KEY, "PKCS#8 keys in PEM")?;
    Ok(blocks.unwrap_or_default().into_iter().map(PrivateKey).collect())
}

fn read_identity(directory: &Path, name: &str) -> Result<Option<Identity>, MaterialError> {
    let chain_path = directory.join(format!("{name}.pem"));
    let key_path = directory.join(format!("{name}-key.pem"));
    match (read_chain(&chain_path)?, read_keys(&key_path)?.into_iter().next()) {
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

/// Secrets of 32 bytes, one a line; none if there is no such file.
fn read_secrets(path: &Path) -> Result<Vec<[u8; 32]>, MaterialError> {
    let Some(text) = read(path)? else { return Ok(Vec::new()) };
    let secrets: Option<Vec<[u8; 32]>> = text.lines().map(unhex).collect();
    let garbled = MaterialError::Garbled { path: path.to_owned(), expected: "64 hexadecimal digits" };
    secrets.filter(|secrets| !secrets.is_empty()).ok_or(garbled)
}

/// Whether a seed is the secret half of `public`.
fn is_seed_of(seed: &[u8; 32], public: &[u8; 32]) -> bool {
    Ed25519KeyPair::from_seed_and_public_key(seed, public)
        .is_ok_and(|pair| pair.public_key().as_ref() == public)
}

#[cfg(test)]
mod tests {
    use super::super::CertificateError;
    use super::*;
    use crate::clock::{Clock as _, SystemClock};
    use sluice_engine::ids::Timestamp;
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
    fn a_rotation_is_kept_at_every_step_and_may_be_cut_short() {
        let place = tempfile::tempdir().unwrap();
        let mut all = material();
        all.save(place.path()).unwrap();
        assert!(!fs::read_to_string(place.path().join(INDEX)).unwrap().contains("rotation"));
        let files = |material: &ClusterMaterial| {
            let place = tempfile::tempdir().unwrap();
            material.save(place.path()).unwrap();
            let mut found = Vec::new();
            for directory in ["", "dc-1", "dc-2"] {
                for entry in fs::read_dir(place.path().join(directory)).unwrap() {
                    let path = entry.unwrap().path();
                    if path.is_file() {
                        let name = path.strip_prefix(place.path()).unwrap().to_owned();
                        found.push((name, fs::read(&path).unwrap()));
                    }
                }
            }
            found.sort();
            found
        };
        let clock = SystemClock.now();
        for step in 1..=6 {
            let running = load(place.path(), true).unwrap();
            let next = all.rotated(&KeyKind::ALL).unwrap();
            assert_eq!(next.revision(), step);
            let signature = next.command_key(B).unwrap().sign(b"body");
            let id = next.command_key(B).unwrap().id();
            assert_eq!(all.command_ring().verify(id, B, b"body", &signature), Ok(()), "one step behind");
            // File by file, in an order that nobody chose: what is there can be used, and what is not yet is waited for.
            let (mut taken, mut last) = (0, running.revision());
            for (name, bytes) in files(&next) {
                fs::write(place.path().join(&name), bytes).unwrap();
                let Ok(there) = load(place.path(), true) else { continue };
                taken += usize::from(running.renew(&there, clock).is_ok());
                assert!(running.revision() >= last && running.command_key(A).is_ok());
                last = running.revision();
            }
            assert!(taken > 0, "step {step}");
            assert_eq!(running.revision(), step);
            let loaded = load(place.path(), true).unwrap();
            assert_eq!((loaded.revision(), loaded.ca_pem()), (step, next.ca_pem()));
            let set = |material: &ClusterMaterial| material.keys.load().set.clone();
            assert!(set(&loaded) == set(&next) && set(&running) == set(&next));
            assert!(loaded.rotated(&KeyKind::ALL).is_ok() && loaded.reissued().is_ok());
            assert!(matches!(next.renew(&all, clock), Err(MaterialError::Older { .. })));
            all = next;
        }
        assert!(all.stage(KeyKind::Ca).is_none() && all.cas().len() == 1);

        // Cut short at any file, the same step can be made again.
        for stage in 0..3 {
            let next = all.rotated(&KeyKind::ALL).unwrap();
            for cut in 0..files(&next).len() {
                let place = tempfile::tempdir().unwrap();
                all.save(place.path()).unwrap();
                for (name, bytes) in
                    files(&next).into_iter().filter(|(name, _)| *name != Path::new(INDEX)).take(cut)
                {
                    fs::write(place.path().join(name), bytes).unwrap();
                }
                let again = load(place.path(), false).and_then(|there| there.rotated(&KeyKind::ALL));
                assert!(again.is_ok(), "stage {stage}, {cut} files: {:?}", again.err());
            }
            all = next;
        }
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
    fn certificates_that_are_of_no_use_are_named_with_their_file() {
        const YEAR_MS: u64 = 365 * 86_400_000;
        const HOUR_MS: u64 = 3_600_000;
        let (made, now) = (material(), SystemClock.now());
        let at = Path::new("/nowhere");
        assert_eq!(made.check_certificates(at, now), Ok(()));
        let long_ago = Timestamp::new(now.number() - 11 * YEAR_MS);
        let expired = |part: ClusterMaterial, at: &Path| match part.check_certificates(at, now) {
            Err(CertificateError::Expired { whose, path, since }) => {
                assert!(since < now && since.number() > now.number() - 2 * YEAR_MS, "{since}");
                (whose, path)
            }
            other => panic!("{other:?}"),
        };
        let old = made.reissued_at(long_ago).unwrap();
        let edge = ("edge.test.sluice".to_owned(), at.join("edge.pem"));
        assert_eq!(expired(old.only(A).unwrap(), at), edge);
        let worker = old.only_role(B, Role::Worker).unwrap();
        let whose = "worker.dc-2.test.sluice".to_owned();
        let place = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join("dc-2")).unwrap();
        assert_eq!(
            expired(worker.clone(), place.path()),
            (whose.clone(), place.path().join("dc-2/worker.pem"))
        );
        assert_eq!(
            expired(worker, at),
            (whose, at.join("dc-2.worker.pem")),
            "where there are no directories"
        );

        // They are good from an hour before they are made; clocks may differ by a minute.
        let ahead = |ms| made.reissued_at(now.plus(HOUR_MS + ms)).unwrap().check_certificates(at, now);
        assert_eq!(ahead(30_000), Ok(()));
        let early = ahead(90_000);
        assert!(matches!(&early, Err(CertificateError::NotYet { from, .. }) if *from > now), "{early:?}");

        // Of another CA.
        let mixed = ClusterMaterial { keys: material().keys, ..made };
        let refused = mixed.check_certificates(at, now);
        assert!(matches!(&refused, Err(CertificateError::Refused { .. })), "{refused:?}");
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
            assert_eq!(mine.ticket_secrets().is_ok(), role == Role::Edge);
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
