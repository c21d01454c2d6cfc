//! Certificates that do not count: where a process would start with them, and at the doors inside a cluster.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use serde_json::Value;
use sluice_engine::ids::{DcId, Timestamp};
use sluice_node::clock::{Clock as _, SystemClock};
use sluice_node::material::ClusterMaterial;
use sluice_node::role::Role;
use sluice_node::tls;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::divided::Divided;
use crate::fake::noise;
use crate::processes::{Site, done, eventually};
use crate::{Ended, Home};

const DAY_MS: u64 = 86_400_000;

/// What a door says of whoever shows a certificate of another CA, or of another time.
const DOES_NOT_COUNT: &str = "a caller shows a certificate that does not count";

/// When certificates were made that have expired since.
fn long_ago() -> Timestamp {
    Timestamp::new(SystemClock.now().number() - 11 * 365 * DAY_MS)
}

fn authority(home: &Home) -> ClusterMaterial {
    ClusterMaterial::load(&home.path("keys/authority")).unwrap()
}

/// Makes the certificates of all processes anew, as if it were another time.
fn renew_at(home: &Home, now: Timestamp) {
    let all = authority(home).reissued_at(now).unwrap();
    for (dc, name) in all.dcs() {
        all.only(dc).unwrap().save(&home.path(&format!("keys/{name}"))).unwrap();
        for role in Role::ALL {
            let part = all.only_role(dc, role).unwrap();
            part.save(&home.path(&format!("keys/roles/{name}/{role}"))).unwrap();
        }
    }
}

#[test]
fn nothing_starts_with_a_certificate_that_has_expired_and_the_file_is_named() {
    let divided = Divided::sharing(1, 1, None);
    let (site, home) = (&divided.site, &divided.site.home);
    let check = |file: &str| -> Ended {
        home.command(&["config", "check", &format!("{file}.toml")]).output().unwrap().into()
    };
    let processes = [
        ("session", "session", "keys/roles/dc-a/session/dc-1/session.pem"),
        ("edge", "edge", "keys/roles/dc-a/edge/edge.pem"),
        ("worker", "worker", "keys/roles/dc-a/worker/dc-1/worker.pem"),
        ("aggregator", "aggregator-0", "keys/roles/dc-a/aggregator/dc-1/peer.pem"),
        ("dc", "dc-b", "keys/dc-b/edge.pem"),
    ];
    renew_at(home, long_ago());
    for (verb, file, named) in processes {
        let ended = check(file);
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        let when = format!(" in {named} has expired, at 20");
        for said in [when.as_str(), "(certificate-expired)", "key renew`"] {
            assert!(ended.stderr.contains(said), "{said}: {}", ended.stderr);
        }
        // One that starts says something else, and is ended with this.
        let (_process, said) = site.begin(verb, file);
        assert_eq!(said["error"]["code"], "certificate-expired", "{said}");
        assert!(said["error"]["message"].as_str().unwrap().contains(named), "{said}");
    }
    renew_at(home, SystemClock.now().plus(2 * DAY_MS));
    for (_, file, named) in processes {
        let ended = check(file);
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        assert!(ended.stderr.contains(named), "{}", ended.stderr);
        assert!(ended.stderr.contains("(certificate-not-yet)"), "{}", ended.stderr);
    }
    done(home.command(&["admin", "key", "renew", "keys"]).output().unwrap().into());
    for (_, file, _) in processes {
        done(check(file));
    }
    site.start("dc-b").stop();
}

/// What keeps somebody out: in the handshake or, since TLS 1.3 looks at a client last, with what is read after it.
async fn heard(config: &Arc<rustls::ClientConfig>, name: &ServerName<'static>, at: SocketAddr) -> String {
    let stream = TcpStream::connect(at).await.unwrap();
    let error = match TlsConnector::from(config.clone()).connect(name.clone(), stream).await {
        Err(error) => error,
        Ok(mut stream) => {
            let read = tokio::time::timeout(Duration::from_secs(10), stream.read_u8()).await;
            read.expect("an end").expect_err("let in")
        }
    };
    error.to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_shows_a_certificate_that_does_not_count_is_turned_away_and_said_once() {
    tls::install_provider();
    let (a, b) = (DcId::new(1), DcId::new(2));
    let site = Site::new(&["dc-a", "dc-b"]);
    let home = &site.home;
    // The CA vouches for dc-b, and dc-a knows of no such datacenter.
    let (index, file) = (home.path("keys/dc-a/cluster.json"), home.path("dc-a.toml"));
    let mut known: Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
    known["dcs"].as_array_mut().unwrap().retain(|dc| dc["name"] == "dc-a");
    std::fs::write(&index, known.to_string()).unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.split("[peers").next().unwrap()).unwrap();
    let mut dc = site.start("dc-a");
    let log = dc.log();

    let all = authority(home);
    let expired = all.reissued_at(long_ago()).unwrap();
    let foreign = ClusterMaterial::generate("test", &[(a, "dc-a"), (b, "dc-b")]).unwrap();
    // A stranger that takes whomever it meets.
    let mut roots = rustls::RootCertStore::empty();
    all.cas().into_iter().for_each(|ca| roots.add(ca).unwrap());
    let shows = foreign.role_identity(a, Role::Edge).unwrap().clone();
    let stranger = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_client_cert_resolver(Arc::new(shows));
    let (peer, inside) = (site.ports[0].peer.address(), site.inside[0].address());
    let (peer_name, name) =
        (tls::peer_name(&all, a).unwrap(), tls::role_name(&all, a, Role::Worker).unwrap());
    let strangers = [
        (
            tls::peer_client(&expired, b).unwrap(),
            (&peer_name, peer),
            "CertificateExpired",
            ["\"door\":\"peer\"", DOES_NOT_COUNT, "expired"],
        ),
        (
            tls::peer_client(&all, b).unwrap(),
            (&peer_name, peer),
            "close_notify",
            [
                "\"door\":\"peer\"",
                "a peer's certificate names no other datacenter of this cluster",
                "does not name one datacenter of this cluster",
            ],
        ),
        (
            Arc::new(stranger),
            (&name, inside),
            "received fatal alert",
            ["\"door\":\"worker\"", DOES_NOT_COUNT, "invalid peer certificate"],
        ),
        (
            tls::role_client(&foreign, a, Role::Edge).unwrap(),
            (&name, inside),
            "invalid peer certificate",
            ["\"door\":\"worker\"", "a caller does not take the certificate of this door", "alert"],
        ),
        (
            tls::role_client(&all, b, Role::Edge).unwrap(),
            (&name, inside),
            "close_notify",
            ["\"door\":\"worker\"", "a caller's certificate names no role of this cluster", "127.0.0.1"],
        ),
        (
            tls::role_client(&all, a, Role::Edge).unwrap(),
            (&peer_name, peer),
            "NoApplicationProtocol",
            ["\"door\":\"peer\"", "a caller's handshake failed", "known protocol"],
        ),
    ];
    let (last, turned_away) = strangers.split_last().unwrap();
    for (config, (name, at), reason, line) in turned_away {
        for _ in 0..5 {
            let heard = heard(config, name, *at).await;
            assert!(heard.contains(reason), "{reason}: {heard}");
        }
        eventually(reason, || (log.count(&[&line[..], &["\"level\":\"WARN\""]].concat()) == 1).then_some(()));
    }
    // It speaks something else: nothing to warn of.
    let (config, (name, at), reason, line) = last;
    let heard = heard(config, name, *at).await;
    assert!(heard.contains(reason), "{heard}");

    home.write("file", &noise(91, 3 << 20));
    done(site.run(0, &["put", "file", "--wait", "assembled"]));
    dc.stop();
    let lines = log.ended();
    let count =
        |line: &[&str]| lines.iter().filter(|said| line.iter().all(|word| said.contains(word))).count();
    for (.., line) in turned_away {
        assert_eq!(count(line), 1, "{line:?}: {lines:#?}");
    }
    assert_eq!(count(line), 0, "{lines:#?}");
}

/// A certificate of another CA is named by whoever calls, too: either side may be the one that is wrong.
#[test]
fn whoever_calls_with_a_certificate_that_does_not_count_says_so() {
    let divided = Divided::sharing(2, 1, None);
    let (site, home) = (&divided.site, &divided.site.home);
    let make = ["admin", "key", "make", "others", "--cluster", "test", "--dc", "dc-a", "--dc", "dc-b"];
    done(home.command(&make).output().unwrap().into());
    let _worker = divided.begin("worker");
    let mut a = divided.begin("aggregator-0");
    for (file, part) in [("dc-b", "dc-b"), ("aggregator-1", "roles/dc-a/aggregator")] {
        let text = std::fs::read_to_string(home.path(&format!("{file}.toml"))).unwrap();
        let text = text.replace(&format!("\"keys/{part}\""), &format!("\"others/{part}\""));
        home.write(&format!("{file}.toml"), text.as_bytes());
    }
    // They are of one CA, and the rest of dc-a is of another.
    let (_b, mut other) = (site.start("dc-b"), divided.begin("aggregator-1"));
    let (link, call) = ("no link, for a certificate", "no call, for a certificate");
    for (process, said) in [(&mut a, link), (&mut other, call)] {
        let log = process.log();
        eventually(said, || (log.count(&[said, "\"level\":\"WARN\""]) == 1).then_some(()));
    }
}
