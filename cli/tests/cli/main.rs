//! The binary: against a stand-in for a cluster, and with clusters of its own.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

#[allow(dead_code, reason = "the client library's tests use more of it")]
#[path = "../../../crates/client/tests/client/fake/mod.rs"]
mod fake;
#[path = "../../../tests/python/interpreter.rs"]
mod interpreter;

mod bucket;
mod certificates;
mod cluster;
mod connections;
mod divided;
mod drain;
mod hand_over;
mod kubernetes;
mod local;
mod lost_disk;
mod pipe;
mod processes;
mod redis;
mod reload;
mod roles;
mod rotation;
mod shares;
mod tenants;
mod traces;
mod transfer;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use fake::{FakeCluster, TOKEN};

/// A home directory with settings for a cluster, or for none.
struct Home {
    dir: tempfile::TempDir,
    urls: String,
    /// What else its processes find in their environment.
    variables: Vec<(&'static str, String)>,
}

/// How a run ended.
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ended {
    fn json(&self) -> serde_json::Value {
        assert_eq!(self.stdout.lines().count(), 1, "one object: {:?}", self.stdout);
        serde_json::from_str(&self.stdout).unwrap()
    }
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Home {
    fn new(cluster: Option<&FakeCluster>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), format!("{TOKEN}\n")).unwrap();
        let ca = cluster.map(|cluster| cluster.ca_pem.clone()).unwrap_or_default();
        std::fs::write(dir.path().join("ca.pem"), ca).unwrap();
        let urls = cluster.map(|cluster| cluster.urls().join(",")).unwrap_or_default();
        Self { dir, urls, variables: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        self.command_of(env!("CARGO_BIN_EXE_sluice"), args)
    }

    /// A command of another build of the binary.
    fn command_of(&self, binary: impl AsRef<OsStr>, args: &[&str]) -> Command {
        let mut command = Command::new(binary);
        command
            .args(args)
            .current_dir(self.dir.path())
            .env_clear()
            .env("HOME", self.dir.path())
            .env("XDG_STATE_HOME", self.path("state"))
            .env("XDG_CONFIG_HOME", self.path("config"))
            .env("SLUICE_TOKEN_FILE", self.path("token"))
            .env("SLUICE_CA", self.path("ca.pem"))
            .envs(self.variables.clone())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if !self.urls.is_empty() {
            command.env("SLUICE_URL", &self.urls);
        }
        command
    }

    /// Runs to the end, without standing in the way of the stand-in.
    async fn run(&self, args: &[&str]) -> Ended {
        let mut command = self.command(args);
        tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap().into()
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

/// The names in a directory that may not exist.
fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}
