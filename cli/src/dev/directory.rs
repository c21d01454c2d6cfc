//! The directory of `sluice dev`: what of a cluster survives the process.
//!
//! | name | holds |
//! | --- | --- |
//! | `lock` | locked while a process uses the directory |
//! | `keys/` | certificates and keys ([`ClusterMaterial`]) |
//! | `ports.json` | where each datacenter listens, by its name |
//! | `ca.pem` · `token` · `env` | for clients: the CA, a token (mode 0600), shell exports (mode 0600) |
//! | `dc-a/` … | the volume of each datacenter |

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use sluice::cluster::Listen;
use sluice::datacenter::StartError;
use sluice_engine::ids::DcId;
use sluice_node::material::ClusterMaterial;
use sluice_store::StoreError;

use crate::context::quoted;
use crate::failure::Failure;

/// Name of the cluster.
const CLUSTER: &str = "dev";

/// The addresses of one datacenter, as they are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeptPorts {
    edge: std::net::SocketAddr,
    peer: std::net::SocketAddr,
    admin: std::net::SocketAddr,
}

/// A directory that this process has locked.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    #[allow(dead_code, reason = "held for its lock")]
    lock: File,
}

impl Directory {
    /// Makes the directory if need be, and locks it until this is dropped.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let failed = |error| StartError::of_directory(path, error);
        let is_new = !path.exists();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
        let path = path.canonicalize().map_err(failed)?;
        // What is synced into it is no safer than its own name.
        if let Some(parent) = path.parent().filter(|_| is_new) {
            File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed)?;
        }
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join("lock"))
            .map_err(|error| StartError::of_directory(&path, error))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path, lock }),
            Err(TryLockError::WouldBlock) => {
                Err(StartError::Store(StoreError::in_use(&path, &path.join("lock"))).into())
            }
            Err(TryLockError::Error(error)) => Err(StartError::of_directory(&path, error).into()),
        }
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A file in it.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The keys of the cluster here, or new ones for `dcs` datacenters (2 if nothing was said).
    pub(super) fn material(&self, dcs: Option<u16>) -> anyhow::Result<ClusterMaterial> {
        let keys = self.file("keys");
        // The index is written last: without it no cluster was ever made here.
        if !keys.join("cluster.json").exists() {
            let dcs: Vec<(DcId, String)> = (1..=dcs.unwrap_or(2)).map(|n| (DcId::new(n), name(n))).collect();
            let dcs: Vec<(DcId, &str)> = dcs.iter().map(|(dc, name)| (*dc, name.as_str())).collect();
            let material = ClusterMaterial::generate(CLUSTER, &dcs).map_err(StartError::from)?;
            material.save(&keys).map_err(StartError::from)?;
            return Ok(material);
        }
        let material = ClusterMaterial::load(&keys).map_err(StartError::from)?;
        let there = material.dcs().count();
        match dcs {
            Some(asked) if usize::from(asked) != there => {
                let message =
                    format!("{} is a cluster of {there} datacenters, not of {asked}", self.path.display());
                Err(Failure::usage("dcs", message, "leave --dcs out, or give another directory").into())
            }
            Some(_) | None => Ok(material),
        }
    }

    /// Where datacenters listened last, by name; nothing if that is not known.
    pub(super) fn ports(&self) -> BTreeMap<String, Listen> {
        // Ports are a convenience: others do as well as those that were.
        let kept = fs::read(self.file("ports.json")).ok();
        let kept = kept.and_then(|bytes| serde_json::from_slice::<BTreeMap<String, KeptPorts>>(&bytes).ok());
        let listen = |KeptPorts { edge, peer, admin }| Listen { edge, peer, admin };
        kept.unwrap_or_default().into_iter().map(|(name, ports)| (name, listen(ports))).collect()
    }

    /// Keeps where datacenters listen.
    pub(super) fn keep_ports(&self, ports: &BTreeMap<String, Listen>) -> anyhow::Result<()> {
        let kept =
            |Listen { edge, peer, admin }: &Listen| KeptPorts { edge: *edge, peer: *peer, admin: *admin };
        let kept: BTreeMap<&str, KeptPorts> =
            ports.iter().map(|(name, listen)| (name.as_str(), kept(listen))).collect();
        self.write("ports.json", 0o644, &(serde_json::to_string_pretty(&kept)? + "\n"))
    }

    /// Writes what a client needs: CA, token, and the exports that name them.
    pub(super) fn equip_clients(&self, ca_pem: &str, token: &str, urls: &[String]) -> anyhow::Result<()> {
        self.write("ca.pem", 0o644, ca_pem)?;
        self.write("token", 0o600, &format!("{token}\n"))?;
        let file = |name| quoted(&self.file(name).to_string_lossy());
        let exports = format!(
            "export SLUICE_URL={}\nexport SLUICE_TOKEN_FILE={}\nexport SLUICE_CA={}\n",
            quoted(&urls.join(",")),
            file("token"),
            file("ca.pem"),
        );
        self.write("env", 0o600, &exports)
    }

    /// Writes the token of who operates the datacenters: `SLUICE_TOKEN_FILE` for `sluice admin drain`.
    pub(super) fn equip_operator(&self, token: &str) -> anyhow::Result<()> {
        self.write("operator", 0o600, &format!("{token}\n"))
    }

    /// Writes a file so that it is there whole or not at all.
    fn write(&self, name: &str, mode: u32, text: &str) -> anyhow::Result<()> {
        let attempt = || -> io::Result<()> {
            let mut file = tempfile::Builder::new()
                .permissions(fs::Permissions::from_mode(mode))
                .tempfile_in(&self.path)?;
            file.write_all(text.as_bytes())?;
            file.persist(self.file(name)).map_err(|error| error.error)?;
            Ok(())
        };
        attempt().with_context(|| format!("cannot write {}", self.file(name).display()))
    }
}

/// `dc-a` for 1, `dc-b` for 2.
fn name(number: u16) -> String {
    let letter = u8::try_from(number - 1).map_or('x', |n| char::from(b'a' + n));
    format!("dc-{letter}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_kept_in_this_form_and_garbage_is_forgotten() {
        let home = tempfile::tempdir().unwrap();
        let directory = Directory::open(home.path()).unwrap();
        assert!(directory.ports().is_empty());
        let address = |port| std::net::SocketAddr::from(([127, 0, 0, 1], port));
        let listen = Listen { edge: address(1), peer: address(2), admin: address(3) };
        let ports = BTreeMap::from([("dc-a".to_owned(), listen)]);
        directory.keep_ports(&ports).unwrap();
        assert_eq!(directory.ports(), ports);
        let golden = "{\n  \"dc-a\": {\n    \"edge\": \"127.0.0.1:1\",\n    \"peer\": \"127.0.0.1:2\",\n    \
                      \"admin\": \"127.0.0.1:3\"\n  }\n}\n";
        assert_eq!(fs::read_to_string(directory.file("ports.json")).unwrap(), golden);
        fs::write(directory.file("ports.json"), "garbage").unwrap();
        assert!(directory.ports().is_empty());
    }

    #[test]
    fn keys_stay_and_so_does_the_number_of_datacenters() {
        let home = tempfile::tempdir().unwrap();
        let directory = Directory::open(home.path()).unwrap();
        let made = directory.material(Some(3)).unwrap();
        assert_eq!(made.dcs().map(|(_, name)| name).collect::<Vec<_>>(), ["dc-a", "dc-b", "dc-c"]);
        assert_eq!(directory.material(None).unwrap().ca_pem(), made.ca_pem());
        assert!(directory.material(Some(2)).unwrap_err().to_string().contains("3 datacenters, not of 2"));
        let second = Directory::open(home.path()).unwrap_err();
        assert_eq!(second.downcast_ref::<StartError>().unwrap().code(), "data-in-use");
    }

    #[test]
    fn exports_are_for_a_shell_and_secrets_for_the_owner() {
        let home = tempfile::Builder::new().prefix("it's ").tempdir().unwrap();
        let directory = Directory::open(home.path()).unwrap();
        directory.equip_clients("CA", "secret", &["https://a".into(), "https://b".into()]).unwrap();
        let script = format!(
            ". {} && echo $SLUICE_URL && cat \"$SLUICE_TOKEN_FILE\" \"$SLUICE_CA\"",
            quoted(&directory.file("env").to_string_lossy())
        );
        let output = std::process::Command::new("sh").arg("-c").arg(script).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "https://a,https://b\nsecret\nCA");
        for name in ["token", "env"] {
            assert_eq!(fs::metadata(directory.file(name)).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }
}
