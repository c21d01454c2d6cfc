//! `put -`: what comes through a pipe has no length before its end.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Stdio};

use rustix::fs::{CWD, Mode, mkfifoat};
use rustix::process::{Pid, Signal, kill_process};
use sluice_engine::hash::Root;

use crate::fake::{FakeCluster, Fault, noise};
use crate::{Ended, Home};

const MIB: usize = 1 << 20;

/// A process whose standard input is a pipe.
fn piped(home: &Home, args: &[&str]) -> Child {
    home.command(args).stdin(Stdio::piped()).spawn().unwrap()
}

async fn ended(child: Child) -> Ended {
    tokio::task::spawn_blocking(move || child.wait_with_output()).await.unwrap().unwrap().into()
}

/// Writes all of it into the process, in a thread of its own, and closes the pipe.
fn feed(child: &mut Child, bytes: Vec<u8>) -> std::thread::JoinHandle<()> {
    let mut pipe = child.stdin.take().unwrap();
    std::thread::spawn(move || {
        // A process that has ended takes no more.
        let _ = pipe.write_all(&bytes);
    })
}

async fn put(home: &Home, args: &[&str], bytes: &[u8]) -> Ended {
    let mut child = piped(home, args);
    let feeder = feed(&mut child, bytes.to_vec());
    let ended = ended(child).await;
    feeder.join().unwrap();
    ended
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_through_a_pipe_arrives() {
    let cluster = FakeCluster::start(2).await;
    *cluster.files.assembles.lock().unwrap() = true;
    let home = Home::new(Some(&cluster));
    let bytes = noise(20, 20 * MIB + 5);
    let root = Root::of_bytes(&bytes).to_string();
    let args = ["put", "-", "--name", "s.tar", "--meta", "k=v", "--expect", &root, "--wait", "assembled"];
    let sent = put(&home, &args, &bytes).await;
    assert_eq!(sent.code, Some(0), "{}", sent.stderr);
    let id = sent.stdout.trim_end().to_owned();
    assert_eq!(sent.stdout, format!("{id}\n"), "the id alone");
    assert!(cluster.bytes(id.parse().unwrap()) == bytes);
    let status = home.run(&["status", &id, "--json"]).await.json();
    assert_eq!((&status["name"], &status["size"]), (&"s.tar".into(), &bytes.len().into()));
    assert_eq!((&status["metadata"]["k"], &status["state"]), (&"v".into(), &"assembled".into()));

    for len in [0, 1, 8 * MIB] {
        let bytes = noise(21, len);
        let sent = put(&home, &["put", "-", "--json"], &bytes).await;
        assert_eq!(sent.code, Some(0), "{len} bytes: {}", sent.stderr);
        let sent = sent.json();
        assert_eq!((&sent["size"], &sent["root"]), (&len.into(), &Root::of_bytes(&bytes).to_string().into()));
        assert_eq!(sent["chunks_sent"], len.div_ceil(MIB));
    }
    let wrong = put(&home, &["put", "-", "--expect", &root], &bytes[1..]).await;
    assert_eq!(wrong.code, Some(5), "{}", wrong.stderr);
    assert!(wrong.stderr.contains("(expected-root)"), "{}", wrong.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_named_pipe_is_read_like_any_other() {
    let cluster = FakeCluster::start(1).await;
    let home = Home::new(Some(&cluster));
    let path = home.path("fifo");
    mkfifoat(CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
    let child = home.command(&["put", "fifo"]).spawn().unwrap();
    let bytes = noise(22, 9 * MIB);
    let written = bytes.to_vec();
    let writer = std::thread::spawn(move || File::create(path).unwrap().write_all(&written).unwrap());
    let sent = ended(child).await;
    writer.join().unwrap();
    assert_eq!(sent.code, Some(0), "{}", sent.stderr);
    assert!(cluster.bytes(sent.stdout.trim_end().parse().unwrap()) == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_stream_is_made_again_and_carried_on_with() {
    let cluster = FakeCluster::start(2).await;
    let home = Home::new(Some(&cluster));
    let bytes = noise(23, 40 * MIB + 1);
    let mut child = piped(&home, &["put", "-", "--name", "n"]);
    let mut pipe = child.stdin.take().unwrap();
    pipe.write_all(&bytes[..24 * MIB]).unwrap();
    // The pipe stays open: more might come.
    cluster.until_taken(16).await;
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let ended = ended(child).await;
    drop(pipe);
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    let resume = ended.stderr.lines().find_map(|line| line.strip_prefix("resume: ")).unwrap();
    assert!(resume.starts_with("… | sluice put - --id ") && resume.ends_with(" --name n"), "{resume}");
    let id = resume.split(' ').nth(6).unwrap().to_owned();
    let open = home.run(&["status", &id]).await;
    assert!(open.stdout.contains("size      not settled"), "{}", open.stdout);
    assert!(home.run(&["ls"]).await.stdout.contains(" open "), "a list shows it");

    let sent = put(&home, &["put", "-", "--id", &id, "--name", "n", "--json"], &bytes).await;
    assert_eq!(sent.code, Some(0), "{}", sent.stderr);
    let sent = sent.json();
    assert!(sent["chunks_skipped"].as_u64().unwrap() >= 16, "{sent}");
    assert_eq!(sent["chunks_skipped"].as_u64().unwrap() + sent["chunks_sent"].as_u64().unwrap(), 41);
    assert!(cluster.bytes(id.parse().unwrap()) == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_read_is_said_with_what_to_do() {
    let cluster = FakeCluster::start(1).await;
    let home = Home::new(Some(&cluster));
    let directory = home.run(&["put", "."]).await;
    assert_eq!(directory.code, Some(2));
    assert_eq!(
        directory.stderr,
        "error: . is a directory, expected a file (directory)\n\
         hint: `tar c . | sluice put - --name NAME.tar` sends it as one file\n"
    );
    // Reading a directory fails, as a disk that dies does.
    let mut child = home.command(&["put", "-"]);
    let input = File::open(home.dir.path()).unwrap();
    let broken = ended(child.stdin(Stdio::from(input)).spawn().unwrap()).await;
    assert_eq!(broken.code, Some(1), "{}", broken.stderr);
    assert!(broken.stderr.contains("failed after 0 bytes: "), "{}", broken.stderr);
    assert!(broken.stderr.contains("(input)\nhint: make the same stream again and put it with --id "));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_has_read_enough_is_no_failure() {
    let cluster = FakeCluster::start(1).await;
    let home = Home::new(Some(&cluster));
    home.write("f", &noise(24, 40 * MIB));
    let id = home.run(&["put", "f"]).await.stdout.trim_end().to_owned();
    let mut child = home.command(&["get", &id, "-o", "-"]).spawn().unwrap();
    let mut pipe = child.stdout.take().unwrap();
    let head = tokio::task::spawn_blocking(move || {
        let mut head = vec![0; 1000];
        pipe.read_exact(&mut head).unwrap();
        head
    });
    assert!(head.await.unwrap() == noise(24, 1000));
    let ended = ended(child).await;
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_get_that_was_killed_keeps_what_it_had() {
    let cluster = FakeCluster::start(1).await;
    let home = Home::new(Some(&cluster));
    let bytes = noise(25, 48 * MIB);
    home.write("f", &bytes);
    let id = home.run(&["put", "f"]).await.stdout.trim_end().to_owned();
    let mut contents = 0;
    cluster.dcs[0].fail(move |request| {
        contents += u32::from(request.path.ends_with("/content"));
        (request.path.ends_with("/content") && contents > 3).then_some(Fault::Stall)
    });
    let child = home.command(&["get", &id, "-o", "copy", "--jobs", "2"]).spawn().unwrap();
    let part = home.path("copy.part");
    let begun = std::time::Instant::now();
    // Until something of it is on the disk.
    while !std::fs::read(&part).is_ok_and(|there| there.len() >= MIB && there[..MIB] == bytes[..MIB]) {
        assert!(begun.elapsed() < std::time::Duration::from_secs(60), "nothing came");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    kill_process(Pid::from_child(&child), Signal::KILL).unwrap();
    assert_eq!(ended(child).await.code, None);
    assert!(!home.path("copy").exists());
    cluster.dcs[0].fail(|_| None);
    let again = home.run(&["get", &id, "-o", "copy", "--json"]).await;
    assert_eq!(again.code, Some(0), "{}", again.stderr);
    let again = again.json();
    assert!(again["chunks_kept"].as_u64().unwrap() > 0, "{again}");
    assert_eq!(again["chunks_kept"].as_u64().unwrap() + again["chunks_fetched"].as_u64().unwrap(), 48);
    assert!(std::fs::read(home.path("copy")).unwrap() == bytes && !part.exists());
}
