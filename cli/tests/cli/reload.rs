//! What running processes take over when their files change.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use sluice_engine::ids::DcId;
use sluice_node::material::ClusterMaterial;
use sluice_node::role::Role;
use sluice_node::tls;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::divided::{Divided, put};
use crate::fake::noise;
use crate::processes::{Running, Site, done, eventually};
use crate::roles::Fleet;

/// The certificate that an edge shows.
async fn shown(ca: &CertificateDer<'static>, edge: SocketAddr) -> CertificateDer<'static> {
    let mut config = tls::edge_client(std::slice::from_ref(ca), &[b"http/1.1"]).unwrap();
    config.resumption = rustls::client::Resumption::disabled();
    let name = ServerName::from(std::net::IpAddr::from([127, 0, 0, 1]));
    shown_to(&Arc::new(config), &name, edge).await
}

/// The certificate that is shown under this name.
async fn shown_to(
    config: &Arc<rustls::ClientConfig>,
    name: &ServerName<'static>,
    at: SocketAddr,
) -> CertificateDer<'static> {
    let stream = TcpStream::connect(at).await.unwrap();
    let stream = TlsConnector::from(config.clone()).connect(name.clone(), stream).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].clone()
}

/// The value of a metric; behind `|` a label that it has.
pub(crate) async fn metric(said: &Value, name: &str) -> Option<i64> {
    let url = format!("{}/metrics", said["admin"].as_str().unwrap());
    let text = reqwest::get(url).await.unwrap().text().await.unwrap();
    let (name, label) = name.split_once('|').unwrap_or((name, ""));
    let is_it = |line: &&str| line.starts_with(&format!("{name}{{")) && line.contains(label);
    let line = text.lines().find(is_it)?;
    line.rsplit(' ').next()?.parse().ok()
}

pub(crate) fn hang_up(process: &Running) {
    kill_process(Pid::from_child(&process.0), Signal::HUP).unwrap();
}

/// Waits for a metric, in a test whose other tasks go on.
pub(crate) fn becomes(said: &Value, name: &str, value: i64) {
    let runtime = tokio::runtime::Handle::current();
    eventually(name, || {
        tokio::task::block_in_place(|| (runtime.block_on(metric(said, name)) == Some(value)).then_some(()))
    });
}

fn change(path: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{text}");
    std::fs::write(path, text.replace(from, to)).unwrap();
}

const OK: &str = "sluice_config_last_reload_successful";
const MEMORY: &str = "sluice_memory_budget_bytes";
const UPLOADS: &str = "sluice_limit_bytes_per_second|limit=\"upload_rate\"";
const SCRUB: &str = "sluice_limit_bytes_per_second|limit=\"scrub_rate\"";
const CONNECTIONS: &str = "sluice_connections";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_and_limits_are_taken_over_without_a_restart() {
    tls::install_provider();
    let fleet = Fleet::new();
    let home = &fleet.site.home;
    let run = |args: &[&str]| done(home.command(args).output().unwrap().into());
    let (dc, dc_said) = fleet.site.begin("dc", "dc-a");
    let (session, session_said) = fleet.site.begin("session", "session");
    let (edge, edge_said) = fleet.site.begin("edge", "edge-0");
    let ca = CertificateDer::from_pem_file(home.path("ca.pem")).unwrap();
    let address = fleet.edges[0].address();
    let url = format!("https://{address}");
    let put = |name: &str, seed: u64| {
        home.write(name, &noise(seed, 3 << 20));
        run(&["put", name, "--wait", "assembled", "--url", &url]);
    };
    put("before", 1);
    let before = shown(&ca, address).await;
    for said in [&dc_said, &session_said, &edge_said] {
        becomes(said, OK, 1);
    }

    // Nobody is told.
    let renewed = run(&["admin", "key", "renew", "keys"]);
    assert!(renewed.contains("keys/dc-a"), "{renewed}");
    let runtime = tokio::runtime::Handle::current();
    eventually("the new certificate", || {
        tokio::task::block_in_place(|| (runtime.block_on(shown(&ca, address)) != before).then_some(()))
    });
    put("renewed", 2);
    // Between processes as well: this one shakes hands with both anew.
    session.stop();
    let (session, _) = fleet.site.begin("session", "session");
    put("renewed inside", 3);

    // What cannot be taken over is said, and changes nothing.
    let file = home.path("edge-0.toml");
    change(&file, "role = \"edge\"", "role = \"edge\"\nmemory = \"lots\"");
    hang_up(&edge);
    becomes(&edge_said, OK, 0);
    becomes(&edge_said, MEMORY, 256 << 20);
    put("as before", 4);
    change(&file, "lots", "64MiB");
    hang_up(&edge);
    becomes(&edge_said, OK, 1);
    becomes(&edge_said, MEMORY, 64 << 20);
    change(&home.path("dc-a.toml"), "takeover_after", "memory = \"32MiB\"\ntakeover_after");
    becomes(&dc_said, MEMORY, 32 << 20);
    // Rates, too: what is capped at next to nothing is refused, and is not once the cap is gone.
    let rates =
        |uploads: &str, scrub: &str| format!("upload_rate = \"{uploads}\"\nscrub_rate = \"{scrub}\"\nmemory");
    change(&home.path("dc-a.toml"), "memory", &rates("1KiB", "2MiB"));
    hang_up(&dc);
    becomes(&dc_said, UPLOADS, 1 << 10);
    becomes(&dc_said, SCRUB, 2 << 20);
    home.write("capped", &noise(41, 3 << 20));
    let capped = ["put", "capped", "--url", &url, "--retry-for", "2s"];
    let ended: crate::Ended = home.command(&capped).output().unwrap().into();
    assert_ne!(ended.code, Some(0), "{}", ended.stdout);
    change(&home.path("dc-a.toml"), &rates("1KiB", "2MiB"), "memory");
    hang_up(&dc);
    becomes(&dc_said, UPLOADS, 0);
    becomes(&dc_said, SCRUB, 8 << 20);
    put("not capped", 42);

    // One that was cut short: a certificate without its key. The next makes it good.
    let key = "keys/authority/edge-key.pem";
    std::fs::copy(home.path("keys/dc-a/dc-1/peer-key.pem"), home.path(key)).unwrap();
    std::fs::copy(home.path(key), home.path("keys/roles/dc-a/edge/edge-key.pem")).unwrap();
    becomes(&edge_said, OK, 0);
    run(&["admin", "key", "renew", "keys"]);
    becomes(&edge_said, OK, 1);

    // The keys of another cluster.
    let other = home.path("other");
    run(&["admin", "key", "make", "other", "--cluster", "test", "--dc", "dc-a"]);
    std::fs::rename(home.path("keys"), home.path("aside")).unwrap();
    std::fs::rename(&other, home.path("keys")).unwrap();
    becomes(&edge_said, OK, 0);
    becomes(&dc_said, OK, 0);
    assert_ne!(shown(&ca, address).await, before);
    put("as ever", 5);

    for process in [edge, session, dc] {
        process.stop();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_and_aggregators_take_over_renewed_certificates() {
    tls::install_provider();
    let divided = Divided::sharing(1, 1, None);
    let (site, home) = (&divided.site, &divided.site.home);
    let processes = ["aggregator-0", "worker", "session", "edge"].map(|name| {
        let role = name.split('-').next().unwrap();
        let (process, said) = site.begin(role, name);
        assert_eq!(said["role"], role, "{said}");
        (process, said)
    });
    let listens =
        |number: usize| -> SocketAddr { processes[number].1["listen"].as_str().unwrap().parse().unwrap() };
    let (a, b) = (DcId::new(1), DcId::new(2));
    let load = |keys: &str| ClusterMaterial::load(&home.path(keys)).unwrap();
    let (worker, other) = (load("keys/roles/dc-a/worker"), load("keys/dc-b"));
    let inside = tls::role_client(&worker, a, Role::Worker).unwrap();
    // What each shows at which of its doors, and where that is kept.
    let doors = [
        (
            listens(0),
            inside.clone(),
            tls::role_name(&worker, a, Role::Aggregator),
            "aggregator/dc-1/aggregator.pem",
        ),
        (
            site.ports[0].peer.address(),
            tls::peer_client(&other, b).unwrap(),
            tls::peer_name(&other, a),
            "aggregator/dc-1/peer.pem",
        ),
        (listens(1), inside, tls::role_name(&worker, a, Role::Worker), "worker/dc-1/worker.pem"),
    ]
    .map(|(at, config, name, file)| (at, config, name.unwrap(), format!("keys/roles/dc-a/{file}")));
    let kept = |file: &str| CertificateDer::from_pem_file(home.path(file)).unwrap();
    let sent = put(&divided.client(&[0]), &noise(81, 3 << 20)).await;
    let before: Vec<_> = doors.iter().map(|(.., file)| kept(file)).collect();
    for ((at, config, name, file), before) in doors.iter().zip(&before) {
        assert_eq!(shown_to(config, name, *at).await, *before, "{file}");
    }
    done(home.command(&["admin", "key", "renew", "keys"]).output().unwrap().into());
    let runtime = tokio::runtime::Handle::current();
    for ((at, config, name, file), before) in doors.iter().zip(&before) {
        let renewed = kept(file);
        assert_ne!(renewed, *before, "{file}");
        eventually(file, || {
            let shown = tokio::task::block_in_place(|| runtime.block_on(shown_to(config, name, *at)));
            (shown == renewed).then_some(())
        });
    }
    for (_, said) in &processes {
        becomes(said, OK, 1);
    }
    put(&divided.client(&[0]), &noise(82, 3 << 20)).await;
    done(divided.run(0, &["get", &sent.id.to_string(), "-o", "copy"]));
    for (process, _) in processes {
        process.stop();
    }
}

/// Speaks to an edge as nobody should, until it is sent away.
fn stammer(edge: SocketAddr) {
    let mut stream = std::net::TcpStream::connect(edge).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    // With an alert or without.
    let _ = stream.read_to_end(&mut Vec::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_logged_changes_while_a_process_runs_and_changes_back() {
    tls::install_provider();
    let site = Site::new(&["dc-a"]);
    let (mut dc, said) = site.begin("dc", "dc-a");
    let log = dc.log();
    let (file, edge) = (site.home.path("dc-a.toml"), site.ports[0].edge.address());
    let stammered = ["\"level\":\"DEBUG\"", "a TLS handshake failed"];
    let provoke = || {
        stammer(edge);
        // What there was to be said of it has been said by then.
        becomes(&said, CONNECTIONS, 0);
    };
    provoke();
    // Of a file, memory is taken over after what is logged.
    change(&file, "takeover_after", "log = \"debug\"\nmemory = \"32MiB\"\ntakeover_after");
    hang_up(&dc);
    becomes(&said, MEMORY, 32 << 20);
    provoke();
    eventually("a line that is logged only now", || (log.count(&stammered) > 0).then_some(()));
    change(&file, "\"debug\"\nmemory = \"32MiB\"", "\"warn\"\nmemory = \"64MiB\"");
    hang_up(&dc);
    becomes(&said, MEMORY, 64 << 20);
    provoke();
    dc.stop();
    let lines = log.ended();
    let said: Vec<_> = lines.iter().filter(|line| stammered.iter().all(|word| line.contains(word))).collect();
    assert_eq!(said.len(), 1, "neither before nor after: {said:?}");
}
