//! dev and demo: real datacenters, in processes of their own.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Output};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::fake::noise;
use crate::{Ended, Home, names};

const MIB: usize = 1 << 20;

/// A running `sluice dev`, killed when it is dropped.
pub(crate) struct Dev {
    pub(crate) child: Child,
    /// What it said of itself.
    pub(crate) said: Value,
}

impl Dev {
    pub(crate) fn start(home: &Home, args: &[&str]) -> Self {
        let mut child = home.command(&[&["dev", "--data", "data", "--json"], args].concat()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        if line.is_empty() || line.contains("\"error\"") {
            let mut stderr = String::new();
            child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
            panic!("{line}{stderr}");
        }
        Self { child, said: serde_json::from_str(&line).unwrap() }
    }

    pub(crate) fn urls(&self) -> Vec<String> {
        let dcs = self.said["dcs"].as_array().unwrap();
        dcs.iter().map(|dc| dc["url"].as_str().unwrap().to_owned()).collect()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for its end.
    fn ended(mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        // One that has ended needs no end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command as a shell would that has read `env`.
pub(crate) fn run(home: &Home, args: &[&str]) -> Ended {
    let mut command = home.command(args);
    for line in std::fs::read_to_string(home.path("data/env")).unwrap().lines() {
        let (name, value) = line.strip_prefix("export ").unwrap().split_once('=').unwrap();
        command.env(name, value.trim_matches('\''));
    }
    command.output().unwrap().into()
}

fn demo(home: &Home, args: &[&str]) -> (Command, std::path::PathBuf) {
    let temporary = home.path("tmp");
    std::fs::create_dir_all(&temporary).unwrap();
    let mut command = home.command(&[&["demo"], args].concat());
    command.env("TMPDIR", &temporary);
    (command, temporary)
}

#[test]
fn a_cluster_of_ones_own_survives_a_kill() {
    let home = Home::new(None);
    let bytes = noise(1, 5 * MIB + 3);
    home.write("disk.img", &bytes);
    let dev = Dev::start(&home, &[]);
    let urls = dev.urls();
    assert_eq!(urls.len(), 2);

    let put = run(&home, &["put", "disk.img", "--wait", "assembled"]);
    assert_eq!(put.code, Some(0), "{}", put.stderr);
    let id = put.stdout.trim_end().to_owned();
    let status = run(&home, &["status", &id, "--json"]);
    assert_eq!(status.json()["state"], "assembled", "{}", status.stderr);
    assert_eq!(run(&home, &["status", "--json"]).json()["cluster"], "dev");
    let get = run(&home, &["get", &id, "-o", "copy"]);
    assert_eq!(get.code, Some(0), "{}", get.stderr);
    assert!(std::fs::read(home.path("copy")).unwrap() == bytes);

    let second = home.command(&["dev", "--data", "data"]).output().unwrap();
    let second = Ended::from(second);
    assert_eq!(second.code, Some(6));
    let by = format!("in use by process {} (sluice) (data-in-use)\nhint: ", dev.child.id());
    assert!(second.stderr.contains(&by), "{}", second.stderr);

    dev.signal(Signal::KILL);
    assert_eq!(dev.ended(), None);
    let dev = Dev::start(&home, &[]);
    assert_eq!(dev.urls(), urls, "the ports are the same");
    let ls = run(&home, &["ls"]);
    assert!(ls.stdout.starts_with(&id) && ls.stdout.contains("assembled"), "{} {}", ls.stdout, ls.stderr);
    let other = run(&home, &["get", &id, "-o", "other", "--url", &urls[1]]);
    assert_eq!(other.code, Some(0), "{}", other.stderr);
    assert!(std::fs::read(home.path("other")).unwrap() == bytes);
    assert_eq!(run(&home, &["rm", &id, "--yes"]).code, Some(0));
    assert_eq!(run(&home, &["status", &id]).code, Some(3));

    dev.signal(Signal::TERM);
    assert_eq!(dev.ended(), Some(0), "in order");
}

#[test]
fn a_cluster_that_cannot_start_says_why() {
    let home = Home::new(None);
    let run = |args: &[&str]| Ended::from(home.command(args).output().unwrap());
    let busy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = busy.local_addr().unwrap().to_string();
    let refused = run(&["dev", "--data", "data", "--listen", &address]);
    assert_eq!(refused.code, Some(6));
    let expected = format!("error: {address} is in use (port-in-use)\nhint: stop what listens there");
    assert!(refused.stderr.starts_with(&expected), "{}", refused.stderr);

    assert_eq!(run(&["dev", "--data", "data", "--dcs", "9"]).code, Some(2));
    let fewer = run(&["dev", "--data", "data", "--dcs", "3"]);
    assert_eq!(fewer.code, Some(2));
    assert!(fewer.stderr.contains("is a cluster of 2 datacenters, not of 3 (dcs)"), "{}", fewer.stderr);

    home.write("file", b"");
    let file = run(&["dev", "--data", "file"]);
    assert_eq!(file.code, Some(2), "{}", file.stderr);
    assert!(file.stderr.contains("(data-directory)"), "{}", file.stderr);

    std::fs::create_dir_all(home.path("data/dc-a")).unwrap();
    home.write("data/dc-a/volume", b"garbage");
    let garbled = run(&["dev", "--data", "data", "--json"]);
    assert_eq!((garbled.code, &garbled.json()["error"]["code"]), (Some(5), &"data-unreadable".into()));
    std::fs::remove_dir_all(home.path("data/dc-a")).unwrap();
    home.write("data/keys/token-key.pem", b"garbage");
    let garbled = run(&["dev", "--data", "data", "--json"]);
    assert_eq!((garbled.code, &garbled.json()["error"]["code"]), (Some(5), &"material".into()));
}

#[test]
fn a_port_that_is_taken_meanwhile_is_left_to_whoever_has_it() {
    let home = Home::new(None);
    let dev = Dev::start(&home, &["--dcs", "1"]);
    let urls = dev.urls();
    dev.signal(Signal::INT);
    assert_eq!(dev.ended(), Some(0));
    let _taken = std::net::TcpListener::bind(urls[0].strip_prefix("https://").unwrap()).unwrap();
    let dev = Dev::start(&home, &[]);
    assert_ne!(dev.urls(), urls);
    assert_eq!(run(&home, &["ls", "--json"]).json()["files"], serde_json::json!([]));
}

#[test]
fn the_demo_shows_every_stage_and_leaves_nothing() {
    let home = Home::new(None);
    for (size, killed) in [("0", false), ("1", false), ("1MiB", false), ("12MiB", true)] {
        let (mut command, temporary) = demo(&home, &["--size", size]);
        let ended = Ended::from(command.output().unwrap());
        assert_eq!(ended.code, Some(0), "{size}: {}{}", ended.stdout, ended.stderr);
        let stages: Vec<&str> =
            ended.stdout.lines().filter_map(|line| line.split_whitespace().next()).collect();
        let expected = ["start", "create", "upload", "complete", "assemble", "read", "compare", "OK"];
        assert_eq!(stages, expected, "{}", ended.stdout);
        assert_eq!(ended.stdout.contains("dc-b killed at "), killed, "{}", ended.stdout);
        assert!(names(&temporary).is_empty(), "{:?}", names(&temporary));
    }
}

#[test]
fn the_demo_takes_any_file_and_tells_its_figures() {
    let home = Home::new(None);
    let bytes = noise(2, 9 * MIB + 1);
    let path = home.write("some file", &bytes);
    let (mut command, _) = demo(&home, &["some file", "--json", "--keep", "kept"]);
    let figures = Ended::from(command.output().unwrap()).json();
    let root = blake3::hash(&bytes).to_string();
    for key in ["input_root", "root", "read_root", "reassembled_root"] {
        assert_eq!(figures[key], root.as_str(), "{key}");
    }
    assert_eq!((&figures["ok"], &figures["chunks"]), (&true.into(), &10.into()));
    assert!(figures["killed"]["at_chunks"].as_u64().unwrap() >= 6, "{figures}");
    assert_eq!(figures["command_bytes"].as_u64(), figures["commands"].as_u64().map(|n| n * 160));
    assert!(std::fs::read(path).unwrap() == bytes, "the input is left as it was");
    assert_eq!(names(&home.path("kept")).len(), 2, "{:?}", names(&home.path("kept")));

    let (mut again, _) = demo(&home, &["--keep", "kept"]);
    assert_eq!(again.output().unwrap().status.code(), Some(2), "it is not empty");
    let (mut missing, temporary) = demo(&home, &["nowhere"]);
    let missing = Ended::from(missing.output().unwrap());
    assert_eq!(missing.code, Some(2));
    assert!(missing.stderr.starts_with("error: cannot read nowhere: "), "{}", missing.stderr);
    assert!(names(&temporary).is_empty());
}

#[test]
fn an_interrupted_demo_tidies_up() {
    let home = Home::new(None);
    let (mut command, temporary) = demo(&home, &["--size", "64MiB"]);
    let mut child = command.spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert!(line.starts_with("start"), "{line}");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output: Output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(names(&temporary).is_empty(), "{:?}", names(&temporary));
}

#[test]
fn what_can_never_succeed_is_not_carried_on() {
    let home = Home::new(None);
    home.write("small", b"abc");
    home.write("large", &noise(4, MIB + 1));
    let dev = Dev::start(&home, &[]);
    let wrong = "00".repeat(32);
    for file in ["small", "large"] {
        let refused = run(&home, &["put", file, "--expect", &wrong]);
        assert_eq!(refused.code, Some(5), "{}", refused.stderr);
        let put = run(&home, &["put", file]);
        assert_eq!(put.code, Some(0), "{}", put.stderr);
        // Another file's id.
        home.write("other", &noise(5, 2 * MIB + 2));
        let refused = run(&home, &["put", "other", "--id", put.stdout.trim_end()]);
        assert_eq!(refused.code, Some(5), "{}", refused.stderr);
        let put = run(&home, &["put", "other"]);
        assert_eq!(put.code, Some(0), "{}", put.stderr);
    }
    // What is no file is not replaced by one, and a directory is a wrong argument.
    let id = run(&home, &["put", "small"]).stdout.trim_end().to_owned();
    for target in ["/dev/null", "."] {
        let get = run(&home, &["get", &id, "-o", target, "--force"]);
        assert_eq!(get.code, Some(2), "{}", get.stderr);
        assert!(get.stderr.contains("(not-a-file)"), "{}", get.stderr);
    }
    dev.signal(Signal::TERM);
    assert_eq!(dev.ended(), Some(0));
}

#[test]
fn damage_is_mended_by_sending_the_file_again() {
    let home = Home::new(None);
    let bytes = noise(6, 5 * MIB + 9);
    home.write("disk.img", &bytes);
    let dev = Dev::start(&home, &[]);
    let id = run(&home, &["put", "disk.img", "--wait", "assembled"]).stdout.trim_end().to_owned();
    let until = |what: &str, so: &dyn Fn(&serde_json::Value) -> bool| {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        loop {
            let status = run(&home, &["status", &id, "--json"]).json();
            if so(&status) {
                return status;
            }
            assert!(std::time::Instant::now() < deadline, "{what}: {status}");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    };
    let status = until("one copy", &|status| status["holders"].as_array().is_some_and(|all| all.len() == 1));
    dev.signal(Signal::TERM);
    assert_eq!(dev.ended(), Some(0));
    let chunks = home.path(&format!("data/{}/chunks", status["home"].as_str().unwrap()));
    let shard = chunks.join(&names(&chunks)[0]);
    let path = shard.join(&names(&shard)[0]).join("data-0");
    let mut stored = std::fs::read(&path).unwrap();
    stored[2 * MIB + 9] ^= 1;
    std::fs::write(&path, stored).unwrap();
    let dev = Dev::start(&home, &["--scrub-rate", "1GiB"]);
    until("the scrub finds it", &|status| status["damaged"] == serde_json::json!([[2, 3]]));
    let again = run(&home, &["put", "disk.img", "--id", &id, "--json"]);
    assert_eq!(again.code, Some(0), "{}", again.stderr);
    assert_eq!(again.json()["chunks_sent"], 1, "{}", again.stdout);
    let get = run(&home, &["get", &id, "-o", "copy"]);
    assert_eq!(get.code, Some(0), "{}", get.stderr);
    assert!(std::fs::read(home.path("copy")).unwrap() == bytes);
    dev.signal(Signal::TERM);
    assert_eq!(dev.ended(), Some(0));
    let check = Ended::from(home.command(&["fsck", "--data", "data"]).output().unwrap());
    assert_eq!(check.code, Some(0), "{}", check.stdout);
}

#[test]
fn a_stopped_volume_is_checked_and_damage_explained() {
    let home = Home::new(None);
    let check = |args: &[&str]| Ended::from(home.command(&[&["fsck"], args].concat()).output().unwrap());
    home.write("disk.img", &noise(3, 3 * MIB + 5));
    let dev = Dev::start(&home, &[]);
    let put = run(&home, &["put", "disk.img", "--wait", "assembled"]);
    let id = put.stdout.trim_end().to_owned();
    for data in ["data", "data/dc-a"] {
        let busy = check(&["--data", data]);
        assert_eq!(busy.code, Some(6), "{}", busy.stderr);
        assert!(busy.stderr.contains(&format!("process {} (sluice)", dev.child.id())), "{}", busy.stderr);
    }
    dev.signal(Signal::KILL);
    assert_eq!(dev.ended(), None);

    let sound = check(&["--data", "data", "--json"]);
    assert_eq!((sound.code, &sound.json()["sound"]), (Some(0), &true.into()), "{}", sound.stdout);
    assert_eq!(sound.json()["volumes"].as_array().unwrap().len(), 2);
    assert!(check(&["--data", "data/dc-a"]).stdout.starts_with("data/dc-a: sound; 1 file"));

    let chunks = home.path("data/dc-a/chunks");
    let shard = chunks.join(&names(&chunks)[0]);
    let path = shard.join(&names(&shard)[0]).join("data-0");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[2 * MIB + 9] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(check(&["--data", "data", "--quick"]).code, Some(0), "nobody hashed");
    let damaged = check(&["--data", "data", "--json"]);
    let volume = &damaged.json()["volumes"][0];
    assert_eq!((damaged.code, &volume["counts"]["bytes"]), (Some(5), &1.into()), "{}", damaged.stdout);
    assert_eq!(
        (&volume["findings"][0]["id"], &volume["findings"][0]["chunks"][0][0]),
        (&id.into(), &2.into())
    );
    let words = check(&["--data", "data"]);
    assert!(words.stdout.contains("means: ") && words.stdout.contains("to do: "), "{}", words.stdout);
    assert!(words.stderr.starts_with("error: 1 thing is damaged (damaged)"), "{}", words.stderr);

    assert_eq!(check(&["--data", "nowhere"]).code, Some(2));
    let none = check(&["--data", "."]);
    assert!(none.code == Some(2) && none.stderr.contains("(no-volume)"), "{}", none.stderr);
    std::fs::create_dir(home.path("data/dc-c")).unwrap();
    home.write("data/dc-c/thesis.txt", b"years of work");
    let foreign = check(&["--data", "data"]);
    assert!(foreign.code == Some(5) && foreign.stderr.contains("it is no volume"), "{}", foreign.stderr);
}
