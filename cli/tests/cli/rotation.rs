//! Keys are given up for others while processes run and clients send.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use rustls::HandshakeKind;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use sluice_node::tls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::fake::noise;
use crate::processes::{Site, done, eventually};
use crate::reload::{becomes, hang_up, metric};
use crate::roles::Fleet;
use crate::{Ended, Home};

const REVISION: &str = "sluice_keys_revision";
const REFUSED: &str = "sluice_commands_total|outcome=\"key-unknown\"";
const RESUMED: &str = "sluice_tls_handshakes_total|kind=\"resumed\"";

/// Copies keys file by file, as they come.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if path.is_dir() {
            copy(&path, &to);
        } else {
            std::fs::copy(path, to).unwrap();
        }
    }
}

/// A client that keeps what it is given to come back with.
fn guest(home: &Home) -> Arc<rustls::ClientConfig> {
    let cas = CertificateDer::pem_file_iter(home.path("keys/ca.pem")).unwrap();
    let cas: Vec<_> = cas.map(Result::unwrap).collect();
    Arc::new(tls::edge_client(&cas, &[b"http/1.1"]).unwrap())
}

/// Comes to an edge under the name of all edges, asks something, and tells how it was greeted.
async fn visit(guest: &Arc<rustls::ClientConfig>, edge: SocketAddr) -> HandshakeKind {
    let name = ServerName::try_from("edge.test.sluice").unwrap();
    let stream = TcpStream::connect(edge).await.unwrap();
    let mut stream = TlsConnector::from(guest.clone()).connect(name, stream).await.unwrap();
    let ask = b"GET /v1/about HTTP/1.1\r\nhost: edge\r\nconnection: close\r\n\r\n";
    stream.write_all(ask).await.unwrap();
    let mut answer = Vec::new();
    // Tickets come before it.
    stream.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 "), "{}", String::from_utf8_lossy(&answer));
    stream.get_ref().1.handshake_kind().unwrap()
}

/// Two datacenters; the second has a copy of its keys, which is as old as nobody makes it anew.
struct Bed {
    fleet: Fleet,
    edge_url: String,
    sent: AtomicUsize,
    over: AtomicBool,
}

impl Bed {
    fn new() -> Self {
        let fleet = Fleet::beside(Site::new(&["dc-a", "dc-b"]));
        let file = fleet.site.home.path("dc-b.toml");
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, text.replace("keys/dc-b", "copied/dc-b")).unwrap();
        let edge_url = format!("https://{}", fleet.edges[0].address());
        let this = Self { fleet, edge_url, sent: AtomicUsize::new(0), over: AtomicBool::new(false) };
        this.hand_over();
        this
    }

    fn home(&self) -> &Home {
        &self.fleet.site.home
    }

    fn run(&self, args: &[&str]) -> Ended {
        self.home().command(args).output().unwrap().into()
    }

    /// Gives the second datacenter the keys as they are.
    fn hand_over(&self) {
        copy(&self.home().path("keys/dc-b"), &self.home().path("copied/dc-b"));
    }

    fn rotate(&self, kinds: &str) -> Value {
        let said = done(self.run(&["admin", "key", "rotate", "keys", "--kind", kinds, "--json"]));
        serde_json::from_str(&said).unwrap()
    }

    /// Sends one file after the other, by way of either: none may fail.
    fn send_until_over(&self) {
        while !self.over.load(Ordering::SeqCst) {
            let number = self.sent.load(Ordering::SeqCst);
            let name = format!("file-{number}");
            // Small ones, and some of several chunks, which the other has a part in.
            let len = if number.is_multiple_of(3) { (3 << 20) + number } else { 5000 };
            self.home().write(&name, &noise(number as u64, len));
            let other = &self.fleet.site.urls[1];
            let (first, second) =
                if number.is_multiple_of(2) { (&self.edge_url, other) } else { (other, &self.edge_url) };
            let urls = format!("{first},{second}");
            done(self.run(&["put", &name, "--wait", "assembled", "--url", &urls]));
            self.sent.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Waits until some more files were sent.
    fn some_more(&self) {
        let before = self.sent.load(Ordering::SeqCst);
        eventually("more files", || (self.sent.load(Ordering::SeqCst) >= before + 4).then_some(()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_of_key_is_rotated_and_no_upload_fails() {
    sluice_node::tls::install_provider();
    let bed = Bed::new();
    let site = &bed.fleet.site;
    let (dc_a, dc_a_said) = site.begin("dc", "dc-a");
    let (dc_b, dc_b_said) = site.begin("dc", "dc-b");
    let (session, session_said) = site.begin("session", "session");
    let (edge, edge_said) = site.begin("edge", "edge-0");
    let old_ca = std::fs::read(bed.home().path("ca.pem")).unwrap();
    let old_token = std::fs::read(bed.home().path("token")).unwrap();
    let all = "commands,contexts,tokens,tickets,ca";
    let runtime = tokio::runtime::Handle::current();
    let edges = [bed.fleet.edges[0].address(), site.ports[1].edge.address()];
    let visit = |guest: &Arc<_>, edge| tokio::task::block_in_place(|| runtime.block_on(visit(guest, edge)));
    let mut guest_of_all = None;
    let mut resumed = 0;
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| bed.send_until_over());
        let watched = [&edge_said, &session_said, &dc_a_said];
        for (step, stage) in [(1, "next".into()), (2, "previous".into()), (3, Value::Null)] {
            let said = bed.rotate(all);
            assert_eq!((&said["revision"], &said["stage"]), (&step.into(), &stage), "{said}");
            // The other datacenter is a step behind for a while.
            watched.iter().for_each(|said| becomes(said, REVISION, step));
            bed.some_more();
            let mut again = |guest: &Arc<rustls::ClientConfig>| {
                for edge in edges.iter().chain(&edges) {
                    assert_eq!(visit(guest, *edge), HandshakeKind::Resumed, "{edge} in step {step}");
                    resumed += 1;
                }
            };
            guest_of_all.iter().for_each(&mut again);
            bed.hand_over();
            becomes(&dc_b_said, REVISION, step);
            // It comes first when the old CA and the new one are known, and the new secret of tickets is not used yet.
            let guest = guest_of_all.get_or_insert_with(|| {
                let guest = guest(bed.home());
                assert_eq!(visit(&guest, edges[0]), HandshakeKind::Full);
                guest
            });
            again(guest);
            bed.some_more();
            match step {
                1 => {
                    // Clients read it all the time: never half of it.
                    std::fs::copy(bed.home().path("keys/ca.pem"), bed.home().path("ca.new")).unwrap();
                    std::fs::rename(bed.home().path("ca.new"), bed.home().path("ca.pem")).unwrap();
                }
                2 => {
                    let mint = [
                        "admin",
                        "token",
                        "mint",
                        "--keys",
                        "keys/authority",
                        "--tenant",
                        "7",
                        "--out",
                        "new",
                    ];
                    done(bed.run(&mint));
                    std::fs::rename(bed.home().path("new"), bed.home().path("token")).unwrap();
                }
                _ => {}
            }
        }
        bed.over.store(true, Ordering::SeqCst);
        sender.join().unwrap();
    });
    // Both edges say so, too: each was visited every other time.
    for said in [&edge_said, &dc_b_said] {
        let counted = metric(said, RESUMED).await.unwrap_or(0);
        assert!(counted >= resumed / 2, "{counted} of {resumed}");
    }
    let sent = bed.sent.load(Ordering::SeqCst);
    println!("{sent} files were sent while all keys were rotated");
    for said in [&dc_a_said, &dc_b_said] {
        assert_eq!(metric(said, REFUSED).await, None, "a command was not understood");
        becomes(said, "sluice_config_last_reload_successful", 1);
    }
    // Small files of the other datacenter are heard of a little later.
    eventually("all of them", || {
        let listed = done(bed.run(&["ls", "--url", &bed.edge_url, "--json", "--limit", "1000"]));
        (0..sent).all(|number| listed.contains(&format!("\"file-{number}\""))).then_some(())
    });

    // What ended is refused: a token, and a CA.
    let list = |file: &str, bytes: &[u8]| {
        let held = std::fs::read(bed.home().path(file)).unwrap();
        std::fs::write(bed.home().path(file), bytes).unwrap();
        let ended = bed.run(&["ls", "--url", &bed.edge_url, "--retry-for", "0s"]);
        std::fs::write(bed.home().path(file), held).unwrap();
        ended
    };
    let refused = list("token", &old_token);
    assert_eq!(refused.code, Some(4), "{}", refused.stderr);
    assert_ne!(list("ca.pem", &old_ca).code, Some(0));
    let new_ca = std::fs::read(bed.home().path("keys/ca.pem")).unwrap();
    assert_eq!(list("ca.pem", &new_ca).code, Some(0));

    // Two steps at once: what it says is not understood until it has taken them over, and nothing is lost by it.
    for step in [4, 5] {
        bed.rotate("commands");
        becomes(&dc_a_said, REVISION, step);
    }
    let away = std::fs::read(bed.home().path("file-0")).unwrap();
    bed.home().write("away", &away[..(2 << 20)]);
    std::thread::scope(|scope| {
        let put = scope.spawn(|| site.run(0, &["put", "away", "--home", "dc-b", "--wait", "assembled"]));
        eventually("a command that is not understood", || {
            let refused = tokio::task::block_in_place(|| runtime.block_on(metric(&dc_b_said, REFUSED)));
            refused.filter(|count| *count > 0)
        });
        assert!(!put.is_finished());
        bed.hand_over();
        done(put.join().unwrap());
    });
    // Steps of different kinds are not mixed, and an unknown kind is named.
    for (kinds, said) in [("commands,tokens", "(rotation)"), ("all", "expected some of commands")] {
        let ended = bed.run(&["admin", "key", "rotate", "keys", "--kind", kinds]);
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        assert!(ended.stderr.contains(said), "{}", ended.stderr);
    }
    let shown = done(bed.run(&["admin", "key", "show", "keys"]));
    assert!(shown.contains("revision  5") && shown.contains("previous one still counts"), "{shown}");

    for process in [edge, session, dc_b, dc_a] {
        process.stop();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_signed_with_a_key_that_ended_is_refused_until_who_lags_has_the_new_ones() {
    tls::install_provider();
    let bed = Bed::new();
    let site = &bed.fleet.site;
    let (mut dc_a, dc_a_said) = site.begin("dc", "dc-a");
    let (dc_b, dc_b_said) = site.begin("dc", "dc-b");
    let log = dc_a.log();
    let rotate = |step: i64| {
        bed.rotate("commands");
        hang_up(&dc_a);
        becomes(&dc_a_said, REVISION, step);
    };
    let hand_over = |step: i64| {
        bed.hand_over();
        hang_up(&dc_b);
        becomes(&dc_b_said, REVISION, step);
    };
    let put = |name: &str, seed: u64| {
        bed.home().write(name, &noise(seed, 3 << 20));
        site.run(1, &["put", name, "--home", "dc-a", "--wait", "assembled"])
    };
    rotate(1);
    hand_over(1);
    done(put("before", 101));
    // It knows the new key, and goes on to use the old one: as long as others are one step ahead they understand.
    rotate(2);
    done(put("one-behind", 102));
    assert_eq!(metric(&dc_a_said, REFUSED).await, None);
    let began = Instant::now();
    rotate(3);
    let runtime = tokio::runtime::Handle::current();
    std::thread::scope(|scope| {
        let late = scope.spawn(|| put("two-behind", 103));
        eventually("commands whose key ended", || {
            let refused = tokio::task::block_in_place(|| runtime.block_on(metric(&dc_a_said, REFUSED)));
            refused.filter(|count| *count >= 5)
        });
        let words = ["\"level\":\"WARN\"", "a command was refused", "\"code\":\"key-unknown\"", "\"keys\":3"];
        eventually("a word of it in the log", || (log.count(&words) > 0).then_some(()));
        assert!(!late.is_finished());
        // What the other one says is understood all the time.
        let refused = tokio::task::block_in_place(|| runtime.block_on(metric(&dc_b_said, REFUSED)));
        assert_eq!(refused, None);
        hand_over(3);
        done(late.join().unwrap());
    });
    done(put("after", 104));
    dc_b.stop();
    dc_a.stop();
    // They were said once a minute, and not one by one.
    let lines = log.ended().into_iter().filter(|line| line.contains("a command was refused")).count() as u64;
    let minutes = began.elapsed().as_secs() / 60;
    assert!((1..=1 + minutes).contains(&lines), "{lines} lines in {minutes} minutes");
}

#[test]
fn a_step_that_was_cut_short_is_finished_before_there_is_another() {
    let home = Home::new(None);
    let run = |args: &[&str]| -> Value {
        let said = done(home.command(&[args, &["--json"]].concat()).output().unwrap().into());
        serde_json::from_str(&said).unwrap()
    };
    run(&["admin", "key", "make", "keys", "--cluster", "test", "--dc", "dc-a", "--dc", "dc-b"]);
    let rotate = ["admin", "key", "rotate", "keys", "--kind", "ca,commands"];
    for step in 1..=3 {
        copy(&home.path("keys"), &home.path("before"));
        assert_eq!(run(&rotate)["revision"], step);
        // What was written last is as it was; of the authority a certificate has no key that belongs to it.
        for late in ["dc-b", "roles/dc-b"] {
            copy(&home.path(&format!("before/{late}")), &home.path(&format!("keys/{late}")));
        }
        let key = "keys/authority/edge-key.pem";
        std::fs::copy(home.path("keys/authority/dc-1/peer-key.pem"), home.path(key)).unwrap();
        let behind = run(&["admin", "key", "show", "keys"])["behind"].as_array().unwrap().len();
        assert_eq!(behind, 5, "a datacenter, and its four roles");
        let finished = run(&rotate);
        assert_eq!(
            (&finished["revision"], finished["finished"].as_array().unwrap().len()),
            (&step.into(), 5)
        );
        let shown = run(&["admin", "key", "show", "keys"]);
        assert_eq!((&shown["revision"], &shown["behind"]), (&step.into(), &Value::Array(Vec::new())));
        std::fs::remove_dir_all(home.path("before")).unwrap();
    }
    // A second key that is lost is missed before it is used.
    assert_eq!(run(&rotate)["revision"], 4);
    let seeds = home.path("keys/authority/dc-1/command.key");
    let first = std::fs::read_to_string(&seeds).unwrap();
    std::fs::write(&seeds, format!("{}\n", first.lines().next().unwrap())).unwrap();
    let refused: Ended = home.command(&rotate).output().unwrap().into();
    assert!(refused.code != Some(0) && refused.stderr.contains("the keys of commands"), "{}", refused.stderr);
    std::fs::write(&seeds, first).unwrap();
    assert_eq!(run(&rotate)["revision"], 5);
}
