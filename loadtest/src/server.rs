//! A `sluice dev` of its own for a measurement: a process, so that what it spends can be told from what the client
//! spends, and a temporary directory.
//!
//! Dropping a [`Server`] stops the process, waits for it, and removes the directory: on every way out, Ctrl-C included.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::client::{Door, Target};

/// How long a server that was told to stop may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// A server under measurement.
pub(crate) struct Server {
    process: Child,
    _directory: TempDir,
    announced: Announced,
}

/// What `sluice dev --json` says.
#[derive(Deserialize)]
struct Announced {
    dcs: Vec<Datacenter>,
    ca: PathBuf,
    token_file: PathBuf,
}

#[derive(Deserialize)]
struct Datacenter {
    name: String,
    url: String,
    admin: String,
}

/// What went between datacenters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Traffic {
    pub(crate) commands: u64,
    pub(crate) command_bytes: u64,
    pub(crate) pulled_bytes: u64,
}

impl Server {
    /// Starts `dcs` datacenters with their data below `parent`.
    pub(crate) fn start(sluice: &Path, parent: &Path, dcs: u16) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("sluice-load-").tempdir_in(parent)?;
        // What it remarks is for people who started it themselves.
        let remarks = File::create(directory.path().join("remarks"))?;
        let mut process = Command::new(sluice)
            .args(["--json", "dev", "--dcs", &dcs.to_string(), "--data"])
            .arg(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(remarks)
            .spawn()
            .with_context(|| format!("cannot start {}", sluice.display()))?;
        let stdout = process.stdout.take();
        let mut line = String::new();
        let read = stdout.map(|stdout| BufReader::new(stdout).read_line(&mut line));
        match (read, serde_json::from_str(&line)) {
            (Some(Ok(_)), Ok(announced)) => Ok(Self { process, _directory: directory, announced }),
            _ => {
                stop(&mut process);
                let remarks = std::fs::read_to_string(directory.path().join("remarks")).unwrap_or_default();
                bail!("{} did not start: {}", sluice.display(), remarks.trim())
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Its edges, by name of the datacenter.
    pub(crate) fn targets(&self, door: Door) -> anyhow::Result<Vec<(String, Target)>> {
        let ca = std::fs::read(&self.announced.ca)?;
        let token = std::fs::read_to_string(&self.announced.token_file)?;
        let targets = self.announced.dcs.iter().map(|dc| {
            let target = Target::new(address(&dc.url)?, "localhost", &ca, door, Some(token.trim()))?;
            Ok((dc.name.clone(), target))
        });
        targets.collect()
    }

    /// What its datacenters have said and given to one another since they started.
    pub(crate) async fn traffic(&self) -> anyhow::Result<Traffic> {
        let mut traffic = Traffic::default();
        for dc in &self.announced.dcs {
            let text = metrics(address(&dc.admin)?).await?;
            let sent = sum(&text, "sluice_commands_total", &["direction=\"sent\"", "outcome=\"sent\""]);
            traffic.commands += sent;
            traffic.command_bytes += sent * sluice_engine::command::COMMAND_LEN as u64;
            traffic.pulled_bytes += sum(&text, "sluice_pulled_bytes_total", &[]);
        }
        Ok(traffic)
    }
}

impl Traffic {
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            commands: self.commands - before.commands,
            command_bytes: self.command_bytes - before.command_bytes,
            pulled_bytes: self.pulled_bytes - before.pulled_bytes,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        stop(&mut self.process);
    }
}

/// Tells a process to stop, and kills it if it does not.
pub(crate) fn stop(process: &mut Child) {
    let pid = i32::try_from(process.id()).ok().and_then(Pid::from_raw);
    if let (Ok(None), Some(pid)) = (process.try_wait(), pid) {
        // It is our child and was not waited for, so the number is still its own.
        let _ = kill_process(pid, Signal::TERM);
    }
    let until = Instant::now() + PATIENCE;
    while matches!(process.try_wait(), Ok(None)) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    // Fails if it has ended, as it should have.
    let _ = process.kill();
    let _ = process.wait();
}

/// The `sluice` to measure: the one that was named, or the one built beside this program.
///
/// Under `cargo run` it is built first, so that what is measured is what is in the tree.
pub(crate) fn binary(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(path) = named {
        ensure!(path.is_file(), "{} is no program", path.display());
        // It is started from other directories.
        return std::path::absolute(path).with_context(|| format!("cannot find {}", path.display()));
    }
    let own = std::env::current_exe()?;
    let beside = own.with_file_name("sluice");
    if let Some(cargo) = std::env::var_os("CARGO") {
        let mut build = Command::new(cargo);
        build.args(["build", "--locked", "--quiet", "-p", "sluice"]);
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        let built = build.status().context("cannot build sluice")?;
        ensure!(built.success(), "sluice does not build");
    }
    ensure!(
        beside.is_file(),
        "{} is missing: build it with `cargo build --release -p sluice`, or name another with --sluice",
        beside.display()
    );
    Ok(beside)
}

/// The address in a URL whose host is one.
pub(crate) fn address(url: &str) -> anyhow::Result<SocketAddr> {
    let (_, address) = url.split_once("://").context("a URL without a scheme")?;
    address.trim_end_matches('/').parse().with_context(|| format!("{url} names no address"))
}

pub(crate) async fn metrics(address: SocketAddr) -> anyhow::Result<String> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = http::Request::get("/metrics")
        .header(http::header::HOST, address.to_string())
        .body(Empty::<Bytes>::new())?;
    let body = sender.send_request(request).await?.into_body().collect().await?.to_bytes();
    Ok(String::from_utf8(body.to_vec())?)
}

/// The sum of all samples of a counter that carry these labels.
fn sum(text: &str, name: &str, labels: &[&str]) -> u64 {
    let samples = text.lines().filter_map(|line| line.strip_prefix(name)).filter_map(|rest| {
        let (its_labels, value) = rest.rsplit_once(' ')?;
        let is_it = its_labels.is_empty() || its_labels.starts_with('{');
        let carries = labels.iter().all(|label| its_labels.contains(label));
        (is_it && carries).then(|| value.parse::<u64>().ok()).flatten()
    });
    samples.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_summed_by_name_and_label() {
        let text = "# TYPE a counter\na_total{k=\"1\",d=\"sent\"} 3\na_total{k=\"2\",d=\"sent\"} 4\n\
                    a_total{k=\"2\",d=\"received\"} 50\na_total_other{d=\"sent\"} 600\nb_total 7\n# EOF\n";
        assert_eq!(sum(text, "a_total", &["d=\"sent\""]), 7);
        assert_eq!(sum(text, "a_total", &[]), 57);
        assert_eq!(sum(text, "b_total", &[]), 7);
        assert_eq!(sum(text, "c_total", &[]), 0);
    }

    #[test]
    fn addresses_of_urls() {
        assert_eq!(address("https://127.0.0.1:8443").unwrap(), ([127, 0, 0, 1], 8443).into());
        assert!(address("https://localhost:1").is_err());
        assert!(address("127.0.0.1:1").is_err());
    }
}
