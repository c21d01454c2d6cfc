//! Real servers for tests, on loopback, each in a directory of its own, stopped when they are dropped.

use std::io;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::config::RedisConfig;

/// A running `redis-server`.
pub struct Server {
    process: Child,
    port: u16,
    home: TempDir,
    password: Option<String>,
}

/// Whether tests with real servers can run here. Where they cannot it says so, and in CI it panics.
pub fn available() -> bool {
    if Command::new("redis-server").arg("--version").output().is_ok_and(|output| output.status.success()) {
        return true;
    }
    let missing = "redis-server is missing: apt-get install redis-server";
    assert!(std::env::var_os("CI").is_none(), "{missing}");
    eprintln!("DID NOT RUN: {missing}");
    false
}

impl Server {
    /// One that lets everybody in.
    pub fn start() -> Self {
        Self::with(None, &[])
    }

    /// One that wants a password.
    pub fn with_password(password: &str) -> Self {
        Self::with(Some(password), &["--requirepass", password])
    }

    /// One that follows `other`.
    pub fn following(other: &Self) -> Self {
        Self::with(None, &["--replicaof", "127.0.0.1", &other.port.to_string()])
    }

    /// One with these settings.
    pub fn with(password: Option<&str>, settings: &[&str]) -> Self {
        // A port that was free may be taken before the server binds it.
        for _ in 0..10 {
            let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
            let port = free.expect("a free port").port();
            let home = tempfile::tempdir().expect("a directory");
            let process = spawn(port, home.path(), settings).expect("redis-server starts");
            let mut server = Self { process, port, home, password: password.map(str::to_owned) };
            if server.answers() {
                return server;
            }
        }
        panic!("redis-server does not start");
    }

    /// Its port on 127.0.0.1.
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// How to connect to it, on a machine that may be busy.
    pub fn config(&self) -> RedisConfig {
        let mut config = RedisConfig::new(&self.url(), None, None).expect("a URL");
        (config.patience, config.connect) = (Duration::from_secs(10), Duration::from_secs(10));
        config.password.clone_from(&self.password);
        config
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Runs a command by `redis-cli`, and returns what it prints.
    pub fn cli(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("redis-cli");
        command.args(["-p", &self.port.to_string(), "--no-auth-warning"]);
        if let Some(password) = &self.password {
            command.env("REDISCLI_AUTH", password);
        }
        let output = command.args(arguments).output().expect("redis-cli runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Kills it with -9, and forgets what it knew.
    pub fn kill(&mut self) {
        self.process.kill().expect("a child");
        self.process.wait().expect("a child");
    }

    /// Starts it again at the same port, empty.
    pub fn restart(&mut self, settings: &[&str]) {
        self.kill();
        let begun = std::time::Instant::now();
        while begun.elapsed() < Duration::from_secs(20) {
            self.process = spawn(self.port, self.home.path(), settings).expect("redis-server starts");
            if self.answers() {
                return;
            }
        }
        panic!("redis-server does not start again");
    }

    /// Waits until a replica has what its primary has been told so far.
    pub fn catches_up_with(&self, primary: &Self) {
        // `WAIT` would wait for what its own connection wrote.
        assert_eq!(primary.cli(&["SET", "mark", "here"]), "OK");
        let begun = std::time::Instant::now();
        while self.cli(&["GET", "mark"]) != "here" {
            assert!(begun.elapsed() < Duration::from_secs(60), "the replica does not follow");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Cuts a replica off from its primary: what that takes from now on is lost to it.
    pub fn cut_off(&self) {
        // Nobody listens there.
        assert_eq!(self.cli(&["REPLICAOF", "127.0.0.1", "1"]), "OK");
    }

    /// Makes a replica a primary, with what it has.
    pub fn promote(&self) {
        assert_eq!(self.cli(&["REPLICAOF", "NO", "ONE"]), "OK");
    }

    /// Stops it (SIGSTOP): connections stay, and nothing is answered.
    pub fn hang(&self) {
        self.signal("STOP");
    }

    /// Lets it go on.
    pub fn go_on(&self) {
        self.signal("CONT");
    }

    fn signal(&self, name: &str) {
        let pid = self.process.id().to_string();
        let done = Command::new("kill").args(["-s", name, &pid]).status().expect("kill runs");
        assert!(done.success(), "kill -s {name}");
    }

    /// Waits until it answers; false if it ends instead.
    fn answers(&mut self) -> bool {
        let begun = std::time::Instant::now();
        while begun.elapsed() < Duration::from_secs(20) {
            if self.process.try_wait().expect("a child").is_some() {
                return false;
            }
            if self.cli(&["PING"]) == "PONG" {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn spawn(port: u16, home: &Path, settings: &[&str]) -> io::Result<Child> {
    Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .args(["--repl-diskless-sync-delay", "0", "--repl-timeout", "5", "--dir"])
        .arg(home)
        .args(settings)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
}
