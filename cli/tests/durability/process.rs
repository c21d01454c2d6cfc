//! `sluice dev` as a process, from its start to its end.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// A running `sluice dev`. Killed when it is dropped.
pub(crate) struct Dev {
    child: Child,
    /// Where each datacenter answers clients.
    pub(crate) urls: Vec<String>,
}

/// The binary, with nothing of this process's surroundings.
pub(crate) fn sluice(home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.args(args).current_dir(home).env_clear().env("HOME", home).stdin(Stdio::null());
    command
}

impl Dev {
    /// Begins a process on `data`; what it says on standard error goes to `log` in `home`.
    pub(crate) fn spawn(home: &Path, data: &Path) -> Child {
        let log = File::options().create(true).append(true).open(home.join("log")).unwrap();
        let data = data.to_str().unwrap();
        sluice(home, &["dev", "--data", data, "--json"]).stdout(Stdio::piped()).stderr(log).spawn().unwrap()
    }

    /// Begins one and waits until it serves; what it said if it does not.
    pub(crate) fn start(home: &Path, data: &Path) -> Result<Self, String> {
        let mut child = Self::spawn(home, data);
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).unwrap_or_default();
        let Some(dcs) = said["dcs"].as_array() else {
            let code = child.wait().unwrap().code();
            let log = std::fs::read_to_string(home.join("log")).unwrap_or_default();
            let last: Vec<&str> = log.lines().rev().take(8).collect();
            return Err(format!("it ended with {code:?} and said {line:?}; last in its log: {last:#?}"));
        };
        let urls = dcs.iter().map(|dc| dc["url"].as_str().unwrap().to_owned()).collect();
        Ok(Self { urls, child })
    }

    /// Ends it in order; its exit code.
    pub(crate) fn stop(mut self) -> Option<i32> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        self.child.wait().unwrap().code()
    }

    /// Kills it where it stands.
    pub(crate) fn kill(mut self) {
        end(&mut self.child);
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Has the volumes of a process that has ended checked, byte by byte; what is damaged.
pub(crate) fn sound(home: &Path, data: &Path) -> Result<(), String> {
    let output = sluice(home, &["fsck", "--data", data.to_str().unwrap(), "--json"]).output().unwrap();
    match output.status.code() {
        Some(0) => Ok(()),
        code => Err(format!("fsck ended with {code:?}: {}", String::from_utf8_lossy(&output.stdout))),
    }
}

/// Kills a process with -9, and waits until it is gone. One that has ended needs no end.
pub(crate) fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}
