//! Processes of a datacenter that share a real Redis: slow, down, flushed, with another password.

use std::path::Path;

use sluice_redis::testing::{Server, available};

use crate::Ended;
use crate::kubernetes::asked_by_the_dashboard;
use crate::processes::{Running, done, eventually};
use crate::roles::Fleet;

/// A fleet whose processes share `redis`.
struct Sharing {
    fleet: Fleet,
    dc: Running,
    session: Option<Running>,
    edge: Running,
}

const PASSWORD: &str = "hunter2";

fn server() -> Server {
    Server::with_password(PASSWORD)
}

fn share(path: &Path, server: &Server) {
    let text = std::fs::read_to_string(path).unwrap();
    // Before the tables.
    let keys = format!("redis = \"{}\"\nredis_password = \"redis-password\"\n", server.url());
    std::fs::write(path, keys + &text).unwrap();
}

impl Sharing {
    fn start(server: &Server) -> Self {
        let fleet = Fleet::new();
        fleet.site.home.write("redis-password", format!("{PASSWORD}\n").as_bytes());
        for name in ["dc-a", "session", "edge-0"] {
            share(&fleet.site.home.path(&format!("{name}.toml")), server);
        }
        let mint = "admin token mint --keys keys/authority --operator --life 1h --out operator";
        done(fleet.site.home.command(&mint.split(' ').collect::<Vec<_>>()).output().unwrap().into());
        let (dc, said) = fleet.site.begin("dc", "dc-a");
        assert_eq!(said["dc"], "dc-a", "{said}");
        let (session, said) = fleet.site.begin("session", "session");
        assert_eq!(said["role"], "session", "{said}");
        let (edge, _) = fleet.site.begin("edge", "edge-0");
        Self { fleet, dc, session: Some(session), edge }
    }

    /// A token of the tenant 7 in a file of this name.
    fn mint(&self, name: &str) {
        let mint = ["admin", "token", "mint", "--keys", "keys/authority", "--tenant", "7", "--out", name];
        done(self.fleet.site.home.command(&mint).output().unwrap().into());
    }

    /// Asks the edge that is a process of its own for a list.
    fn list(&self, token: &str) -> Ended {
        let url = format!("https://{}", self.fleet.edges[0].address());
        let home = &self.fleet.site.home;
        let mut list = home.command(&["ls", "--url", &url, "--retry-for", "0s"]);
        list.env("SLUICE_TOKEN_FILE", home.path(token)).output().unwrap().into()
    }

    fn revoke(&self, token: &str) {
        let home = &self.fleet.site.home;
        let mut revoke =
            home.command(&["admin", "token", "revoke", token, "--url", &self.fleet.site.urls[0]]);
        done(revoke.env("SLUICE_TOKEN_FILE", home.path("operator")).output().unwrap().into());
    }

    fn logs_in(&self, token: &str) {
        eventually("a login", || (self.list(token).code == Some(0)).then_some(()));
    }
}

#[test]
fn the_wrong_password_ends_a_process_with_a_word() {
    if !available() {
        return;
    }
    let (server, fleet) = (server(), Fleet::new());
    fleet.site.home.write("redis-password", b"wrong");
    for (verb, name) in [("dc", "dc-a"), ("session", "session"), ("edge", "edge-0")] {
        let file = format!("{name}.toml");
        share(&fleet.site.home.path(&file), &server);
        done(fleet.site.home.command(&["config", "check", &file]).output().unwrap().into());
        let ended: Ended = fleet.site.home.command(&[verb, "--config", &file]).output().unwrap().into();
        assert_eq!(ended.code, Some(4), "{}", ended.stderr);
        assert!(ended.stderr.contains("refuses us") && ended.stderr.contains("(redis)"), "{}", ended.stderr);
        assert!(!ended.stderr.contains("wrong\n"), "{}", ended.stderr);
    }
}

/// Faults 33 and 34.
#[test]
fn without_redis_living_contexts_work_and_logins_fail_and_nothing_revoked_comes_back() {
    if !available() {
        return;
    }
    let mut server = server();
    let mut sharing = Sharing::start(&server);
    for token in ["one", "two", "three", "four"] {
        sharing.mint(token);
    }
    sharing.logs_in("one");
    sharing.logs_in("two");
    // Revoked at the datacenter's own edge: the process of the other edge, and its session service, hear of it.
    sharing.revoke("two");
    assert_eq!(sharing.list("two").code, Some(4));
    let redis = |sharing: &Sharing, server: &Server| {
        let read = server.cli(&["HLEN", "sluice:test:1:revoked"]);
        drop(sharing.list("one"));
        (read == "1").then_some(())
    };
    eventually("the revocation in Redis", || redis(&sharing, &server));
    let admin = sharing.fleet.site.ports[0].admin.address();
    sluice_node::tls::install_provider();
    let metrics = async { reqwest::get(format!("http://{admin}/metrics")).await?.text().await };
    let metrics = tokio::runtime::Runtime::new().unwrap().block_on(metrics).unwrap();
    let asked = asked_by_the_dashboard("sluice_redis_");
    assert!(asked.len() >= 3, "{asked:?}");
    for name in asked {
        assert!(metrics.contains(&format!("\n{name}{{")), "no {name} in\n{metrics}");
    }

    server.kill();
    let refused = eventually("a login that fails", || {
        let ended = sharing.list("three");
        (ended.code == Some(6)).then_some(ended)
    });
    assert!(refused.stderr.contains("(unavailable)"), "{}", refused.stderr);
    assert_eq!(sharing.list("one").code, Some(0), "a living context");
    assert_eq!(sharing.list("two").code, Some(4), "a revoked one");
    // It comes back empty, and so does the session service: what is revoked is taught again.
    server.restart(&["--requirepass", PASSWORD]);
    drop(sharing.session.take());
    sharing.session = Some(sharing.fleet.site.begin("session", "session").0);
    sharing.logs_in("three");
    assert_eq!(sharing.list("two").code, Some(4));
    eventually("the revocation in Redis, again", || redis(&sharing, &server));

    // One that hangs costs logins a moment, and nothing else.
    server.hang();
    let refused = eventually("a login that fails", || {
        let ended = sharing.list("four");
        (ended.code == Some(6)).then_some(ended)
    });
    assert!(refused.stderr.contains("(unavailable)"), "{}", refused.stderr);
    assert_eq!(sharing.list("three").code, Some(0));
    server.go_on();
    sharing.logs_in("four");
    let Sharing { dc, session, edge, .. } = sharing;
    edge.stop();
    session.into_iter().for_each(Running::stop);
    dc.stop();
}
