//! Edges and session services in processes of their own.

use std::sync::{Arc, Mutex};

use sluice::ports::ReservedPort;
use sluice_client::{Client, ClientConfig, Event, Source, Token, UploadOptions, WaitFor};
use sluice_engine::hash::Root;

use crate::fake::noise;
use crate::interpreter;
use crate::processes::{Running, Site, any, done};

const MIB: usize = 1 << 20;

/// A datacenter whose edges are processes of their own: files of them, and their ports.
pub(crate) struct Fleet {
    pub(crate) site: Site,
    pub(crate) edges: Vec<ReservedPort>,
    #[allow(dead_code, reason = "held for its drop")]
    sessions: ReservedPort,
}

impl Fleet {
    pub(crate) fn new() -> Self {
        Self::beside(Site::new(&["dc-a"]))
    }

    /// The same in `dc-a` of more than one.
    pub(crate) fn beside(site: Site) -> Self {
        let (sessions, edges) = (any(), vec![any(), any()]);
        let write = |name: &str, role: &str, listen: &ReservedPort, more: &str| {
            let text = format!(
                "role = \"{role}\"\ndc = \"dc-a\"\nkeys = \"keys/roles/dc-a/{role}\"\nlisten = \"{}\"\n\
                 admin = \"127.0.0.1:0\"\n{more}",
                listen.address()
            );
            site.home.write(&format!("{name}.toml"), text.as_bytes());
            done(site.home.command(&["config", "check", &format!("{name}.toml")]).output().unwrap().into());
        };
        write("session", "session", &sessions, "");
        let asks = format!(
            "sessions = \"{}\"\nworkers = \"localhost:{}\"\n",
            sessions.address(),
            site.inside[0].address().port()
        );
        for (number, listen) in edges.iter().enumerate() {
            write(&format!("edge-{number}"), "edge", listen, &asks);
        }
        Self { site, edges, sessions }
    }

    fn edge(&self, number: usize) -> Running {
        let (edge, said) = self.site.begin("edge", &format!("edge-{number}"));
        assert_eq!(said["role"], "edge", "{said}");
        edge
    }

    fn client(&self) -> Client {
        let urls = self.edges.iter().map(|edge| format!("https://{}", edge.address())).collect();
        let ca = std::fs::read(self.site.home.path("ca.pem")).unwrap();
        let token = Token::new(&std::fs::read_to_string(self.site.home.path("token")).unwrap());
        Client::new(ClientConfig::new(urls, token, ca)).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn edges_are_killed_and_come_back_under_an_upload() {
    let fleet = Fleet::new();
    let (dc, _) = fleet.site.begin("dc", "dc-a");
    let (session, said) = fleet.site.begin("session", "session");
    assert_eq!(said["role"], "session", "{said}");
    let edges = Arc::new(Mutex::new([Some(fleet.edge(0)), Some(fleet.edge(1))]));
    let bytes = noise(11, 64 * MIB + 3);
    // One edge is killed after three runs, and when the other has carried on for as long it comes back.
    let (seen, killed) = (Mutex::new(0), edges.clone());
    let (wants_back, came_back) = std::sync::mpsc::channel();
    let observer = move |event: &Event| {
        if let Event::Acknowledged { .. } = event {
            let mut seen = seen.lock().unwrap();
            *seen += 1;
            match *seen {
                3 => drop(killed.lock().unwrap()[0].take()),
                6 => wants_back.send(()).unwrap(),
                _ => {}
            }
        }
    };
    let (client, source) = (fleet.client(), Source::memory(bytes.clone()));
    let options = UploadOptions { is_new: true, wait: WaitFor::Assembled, ..UploadOptions::default() };
    let upload = tokio::spawn(async move { client.upload(&source, &options, Arc::new(observer)).await });
    tokio::task::block_in_place(|| came_back.recv().unwrap());
    edges.lock().unwrap()[0] = Some(fleet.edge(0));
    let sent = upload.await.unwrap().unwrap();
    assert_eq!((sent.root, sent.home.as_str()), (Root::of_bytes(&bytes), "dc-a"));

    // Living contexts work without the session service.
    drop(session);
    let id = sent.id.to_string();
    let get = |edge: usize, copy: &str| {
        let url = format!("https://{}", fleet.edges[edge].address());
        let get = ["get", &id, "-o", copy, "--url", &url];
        done(fleet.site.home.command(&get).output().unwrap().into());
        assert!(std::fs::read(fleet.site.home.path(copy)).unwrap() == bytes);
    };
    // This one has asked before.
    get(1, "copy");
    let (session, _) = fleet.site.begin("session", "session");
    get(0, "again");

    for edge in edges.lock().unwrap().iter_mut().filter_map(Option::take) {
        edge.stop();
    }
    session.stop();
    dc.stop();
}

#[test]
fn streams_with_credit_go_through_an_edge_to_another_process() {
    let fleet = Fleet::new();
    let (dc, _) = fleet.site.begin("dc", "dc-a");
    let (session, _) = fleet.site.begin("session", "session");
    let edges = [fleet.edge(0), fleet.edge(1)];
    let script = interpreter::root().join("tests/python/check_ingest.py");
    let mut check = std::process::Command::new(interpreter::interpreter());
    check.arg(script).arg("--ca").arg(fleet.site.home.path("ca.pem"));
    check.arg("--token").arg(fleet.site.home.path("token"));
    check.args(fleet.edges.iter().map(|edge| format!("https://{}", edge.address())));
    let checked = check.output().unwrap();
    let said = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success(), "{said}{}", String::from_utf8_lossy(&checked.stderr));
    assert!(said.ends_with("passed\n"), "{said}");
    edges.into_iter().for_each(Running::stop);
    session.stop();
    dc.stop();
}

#[test]
fn keys_of_another_role_are_no_use() {
    let fleet = Fleet::new();
    let text = std::fs::read_to_string(fleet.site.home.path("edge-0.toml")).unwrap();
    let wrong = text.replace("roles/dc-a/edge", "roles/dc-a/worker");
    fleet.site.home.write("wrong.toml", wrong.as_bytes());
    let run = |args: &[&str]| -> crate::Ended { fleet.site.home.command(args).output().unwrap().into() };
    for args in [&["config", "check", "wrong.toml"][..], &["edge", "--config", "wrong.toml"]] {
        let ended = run(args);
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        assert!(ended.stderr.contains("edge.dc-1.test.sluice"), "{}", ended.stderr);
    }
    let ended = run(&["session", "--config", "edge-0.toml"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("role edge"), "{}", ended.stderr);
}
