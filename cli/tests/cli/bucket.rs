//! A datacenter that keeps its files in a bucket, beside one that keeps them in a directory.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;
use sluice::ports::ReservedPort;
use sluice_client::{Client, ClientConfig, Event, Source, Token, UploadOptions, WaitFor};
use sluice_engine::hash::Root;
use sluice_engine::ids::{ClientFileId, FileId, TenantId};
use sluice_fault_s3::{Garage, Key};
use sluice_node::tls;
use sluice_store::{ChunkStore, S3Credentials, S3Options, S3Store};
use uuid::Uuid;

use crate::Ended;
use crate::divided::{Divided, put};
use crate::fake::noise;
use crate::kubernetes::asked_by_the_dashboard;
use crate::processes::{Running, Site, any, done, eventually};

const MIB: usize = 1 << 20;

/// Has the process `name` of dc-a keep its files in a bucket, asked with this key.
fn move_to_bucket(site: &Site, name: &str, garage: &Garage, key: &Key) {
    let path = site.home.path(&format!("{name}.toml"));
    let text = std::fs::read_to_string(&path).unwrap();
    let store = format!(
        "store = {{ s3 = {{ endpoint = \"{}\", bucket = \"{}\", region = \"{}\", credentials = \"s3.toml\" }} }}\n",
        garage.endpoint(),
        garage.bucket(),
        garage.region()
    );
    site.home.write(&format!("{name}.toml"), text.replace("data = \"data/dc-a\"\n", &store).as_bytes());
    let credentials = format!("key_id = \"{}\"\nsecret = \"{}\"\n", key.id, key.secret);
    site.home.write("s3.toml", credentials.as_bytes());
}

/// The store of `dc-a`, once its process is gone.
async fn store(garage: &Garage) -> S3Store {
    let key = garage.key();
    let credentials = S3Credentials { key_id: key.id.clone(), secret: key.secret.clone() };
    let bucket = garage.bucket().to_owned();
    let options = S3Options::new(garage.endpoint(), bucket, garage.region().into(), credentials);
    S3Store::open(S3Options { prefix: "dc-a/".into(), ..options }).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_go_through_a_datacenter_in_a_bucket_and_one_in_a_directory() {
    let Some(garage) = Garage::start() else { return };
    tls::install_provider();
    let site = Site::new(&["dc-a", "dc-b"]);
    move_to_bucket(&site, "dc-a", &garage, garage.key());
    done(site.home.command(&["config", "check", "dc-a.toml"]).output().unwrap().into());
    let (a, b) = (site.start("dc-a"), site.start("dc-b"));

    let ca = std::fs::read(site.home.path("ca.pem")).unwrap();
    let token = Token::new(&std::fs::read_to_string(site.home.path("token")).unwrap());
    let client = Client::new(ClientConfig::new(site.urls.clone(), token, ca)).unwrap();
    let mut files = Vec::new();
    for (home, len) in
        [("dc-a", 130 * MIB + 7), ("dc-b", 70 * MIB + 1), ("dc-a", 3 * MIB), ("dc-a", 9), ("dc-b", 0)]
    {
        let (bytes, id) = (noise(len as u64, len), Uuid::now_v7());
        let options = UploadOptions {
            id: Some(id),
            is_new: true,
            home: Some(home.into()),
            wait: WaitFor::Assembled,
            ..UploadOptions::default()
        };
        let sent =
            client.upload(&Source::memory(bytes.clone()), &options, Arc::new(|_: &Event| {})).await.unwrap();
        assert_eq!((sent.root, sent.home.as_str()), (Root::of_bytes(&bytes), home));
        files.push((id, bytes, home));
    }
    let metrics = reqwest::get(format!("http://{}/metrics", site.ports[0].admin.address()))
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    let counted = |name: &str| -> u64 {
        let line = metrics.lines().find(|line| line.starts_with(name) && line.contains("dc-a"));
        line.unwrap_or_else(|| panic!("no {name}")).rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(counted("sluice_bucket_sent_bytes_total") >= 65 * MIB as u64);
    assert!(metrics.contains("request=\"UploadPartCopy\""), "{metrics}");
    let asked = asked_by_the_dashboard("sluice_bucket_");
    assert!(asked.len() >= 7, "{asked:?}");
    for name in &asked {
        counted(name);
    }

    // Killed, it finds everything again.
    drop(a);
    let a = site.start("dc-a");
    for (id, bytes, home) in &files {
        let id = id.to_string();
        for url in 0..2 {
            eventually("an assembled file", || {
                let status: Value =
                    serde_json::from_str(&site.run(url, &["status", &id, "--json"]).stdout).ok()?;
                (status["state"] == "assembled" && status["home"] == *home).then_some(())
            });
            done(site.run(url, &["get", &id, "-o", "copy"]));
            assert!(std::fs::read(site.home.path("copy")).unwrap() == *bytes, "{id} from {url}");
            std::fs::remove_file(site.home.path("copy")).unwrap();
        }
    }
    let listed = done(site.run(0, &["ls", "--json"]));
    assert!(
        files.iter().filter(|(_, _, home)| *home == "dc-a").all(|(id, ..)| listed.contains(&id.to_string())),
        "{listed}"
    );
    done(site.run(1, &["rm", &files[2].0.to_string(), "--yes"]));
    eventually("the end of a file", || {
        let ended = site.run(0, &["get", &files[2].0.to_string(), "-o", "copy"]);
        (ended.code != Some(0)).then_some(())
    });
    a.stop();
    b.stop();

    // What is left in the bucket, without any process.
    let store = store(&garage).await;
    for (n, (id, bytes, home)) in files.iter().enumerate() {
        let file = FileId::derive(TenantId::new(7), ClientFileId::new(*id));
        let summary = store.summary(file).await.unwrap();
        match (n, *home) {
            (2, _) => assert!(summary.unwrap().held.is_empty(), "deleted"),
            (_, "dc-a") => {
                assert_eq!(summary.unwrap().published, Some(Root::of_bytes(bytes)));
                assert_eq!(store.recheck(file).await.unwrap(), Root::of_bytes(bytes));
            }
            (_, _) => assert!(summary.is_none_or(|summary| summary.published.is_none())),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_of_its_own_keeps_its_files_in_a_bucket() {
    let Some(garage) = Garage::start() else { return };
    let divided = Divided::sharing(1, 4, None);
    move_to_bucket(&divided.site, "worker", &garage, garage.key());
    let b = divided.site.start("dc-b");
    let mut killed = ["worker", "aggregator-0"].map(|name| (name, divided.begin(name)));
    let others = ["session", "edge"].map(|name| divided.begin(name));
    let both = divided.client(&[0, 1]);
    let mut files = Vec::new();
    for len in [70 * MIB + 7, 3 * MIB, 9, 0] {
        let bytes = noise(len as u64, len);
        let sent = put(&both, &bytes).await;
        // A small one stays where it was taken, which on a busy machine may be the other.
        assert!(sent.home == "dc-a" || len < MIB, "{len} bytes are at {}", sent.home);
        files.push((sent.id.to_string(), bytes));
    }

    // Killed under an upload, one after the other.
    let bytes = noise(91, 64 * MIB);
    for (name, running) in &mut killed {
        let sent = divided.put_under_kill(name, running, &bytes, 1).await;
        files.push((sent.id.to_string(), bytes.clone()));
    }
    for (id, bytes) in &files {
        for dc in [0, 1] {
            done(divided.run(dc, &["get", id, "-o", "copy", "--force"]));
            assert!(std::fs::read(divided.site.home.path("copy")).unwrap() == *bytes, "{id}");
        }
    }
    // While dc-a is away for more than its second, dc-b takes over what it has all of: an empty file, and it is dc-b's then.
    let mut homes = BTreeMap::new();
    for (id, _) in &files {
        let status = divided.site.agree(id, "a home", |status| status["state"] == "assembled");
        homes.insert(id.clone(), status["home"].as_str().unwrap().to_owned());
    }
    // Since it was killed.
    let sent = divided.metric("worker", "sluice_bucket_sent_bytes_total{dc=\"dc-a\"} ");
    assert!(sent >= Some(64 * MIB as i64), "{sent:?}");
    killed.map(|(_, running)| running).into_iter().chain(others).chain([b]).for_each(Running::stop);
    let store = store(&garage).await;
    for (id, bytes) in &files {
        let file = FileId::derive(TenantId::new(7), id.parse().unwrap());
        let summary = store.summary(file).await.unwrap();
        if homes[id] == "dc-a" {
            let checked = store.recheck(file).await;
            let root = checked.unwrap_or_else(|error| panic!("{id}, {}: {error}; {summary:?}", bytes.len()));
            assert_eq!(root, Root::of_bytes(bytes));
        }
    }
}

/// Two porters beside the worker that keeps the bucket of dc-a, and an edge that knows only them.
pub(crate) fn with_porters(divided: &Divided, garage: &Garage) -> [ReservedPort; 2] {
    let (home, keeper) = (&divided.site.home, divided.site.inside[0].address());
    move_to_bucket(&divided.site, "worker", garage, garage.key());
    let text = std::fs::read_to_string(home.path("worker.toml")).unwrap();
    let asks = text.lines().find(|line| line.starts_with("aggregators")).unwrap();
    let ports = [any(), any()];
    for (n, port) in ports.iter().enumerate() {
        let name = format!("worker-{}.toml", n + 1);
        let text = text.replace(asks, &format!("keeper = \"{keeper}\""));
        let text =
            text.replace(&format!("listen = \"{keeper}\""), &format!("listen = \"{}\"", port.address()));
        home.write(&name, text.as_bytes());
        done(home.command(&["config", "check", &name]).output().unwrap().into());
    }
    let edge = std::fs::read_to_string(home.path("edge.toml")).unwrap();
    let known = edge.lines().find(|line| line.starts_with("workers")).unwrap();
    let porters = format!("workers = \"{},{}\"", ports[0].address(), ports[1].address());
    home.write("edge.toml", edge.replace(known, &porters).as_bytes());
    ports
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn porters_carry_bytes_past_the_worker_that_keeps_the_bucket_and_each_may_be_killed() {
    let Some(garage) = Garage::start() else { return };
    let divided = Divided::sharing(1, 4, None);
    let _ports = with_porters(&divided, &garage);
    let b = divided.site.start("dc-b");
    let names = ["aggregator-0", "worker", "worker-1", "worker-2", "session", "edge"];
    let mut running: BTreeMap<&str, Running> =
        names.into_iter().map(|name| (name, divided.begin(name))).collect();
    let (here, both) = (divided.client(&[0]), divided.client(&[0, 1]));
    let sent =
        |name: &str| divided.metric(name, "sluice_bucket_sent_bytes_total{dc=\"dc-a\"} ").unwrap_or_default();
    let mut files = Vec::new();
    for (client, len) in [(&here, 48 * MIB), (&both, 70 * MIB + 7), (&both, 3 * MIB), (&both, 9), (&both, 0)]
    {
        let bytes = noise(len as u64, len);
        files.push((put(client, &bytes).await.id.to_string(), bytes));
        if len == 48 * MIB {
            let (kept, carried) = (sent("worker"), [sent("worker-1"), sent("worker-2")]);
            assert!(carried.iter().all(|sent| *sent >= 4 * MIB as i64), "{carried:?}");
            assert!(kept < MIB as i64, "{kept}");
        }
    }

    // Each is killed under an upload, and comes back.
    for (n, name) in ["worker-1", "worker", "worker-2", "aggregator-0"].into_iter().enumerate() {
        let bytes = noise(300 + n as u64, 64 * MIB);
        let sent = divided.put_under_kill(name, running.get_mut(name).unwrap(), &bytes, 1).await;
        files.push((sent.id.to_string(), bytes));
    }
    for (id, bytes) in &files {
        for dc in [0, 1] {
            done(divided.run(dc, &["get", id, "-o", "copy", "--force"]));
            assert!(std::fs::read(divided.site.home.path("copy")).unwrap() == *bytes, "{id}");
        }
    }
    // What is asked by way of a porter is answered as anywhere.
    let listed = done(divided.run(0, &["ls", "--json"]));
    assert!(files.iter().all(|(id, _)| listed.contains(id)), "{listed}");
    done(divided.run(0, &["rm", &files[2].0, "--yes"]));
    assert_eq!(divided.run(0, &["get", &files[2].0, "-o", "gone"]).code, Some(3));
    let removed = files.remove(2).0;

    running.into_values().chain([b]).for_each(Running::stop);
    let store = store(&garage).await;
    let inside = |id: &str| FileId::derive(TenantId::new(7), id.parse().unwrap());
    // A small one stays where it was taken, which on a busy machine may be the other.
    for (id, bytes) in files.iter().filter(|(_, bytes)| bytes.len() >= MIB) {
        assert_eq!(store.recheck(inside(id)).await.unwrap(), Root::of_bytes(bytes));
    }
    assert!(store.summary(inside(&removed)).await.unwrap().unwrap().held.is_empty());
}

#[test]
fn a_bucket_that_cannot_be_used_is_named_and_no_secret_is_told() {
    let Some(garage) = Garage::start() else { return };
    let site = Site::new(&["dc-a"]);
    let run = |key: &Key| -> Ended {
        move_to_bucket(&site, "dc-a", &garage, key);
        let ended: Ended = site.home.command(&["dc", "--config", "dc-a.toml"]).output().unwrap().into();
        assert!(!format!("{}{}", ended.stdout, ended.stderr).contains(&key.secret));
        ended
    };
    let ended = run(&garage.limited_key(&["read"]));
    assert_eq!(ended.code, Some(4), "{}", ended.stderr);
    assert!(ended.stderr.contains("s3:PutObject is missing for s3://sluice/dc-a/"), "{}", ended.stderr);
    assert!(ended.stderr.contains("bucket-right") && ended.stderr.contains("policy"), "{}", ended.stderr);
    let ended = run(&Key { secret: "c3".repeat(32), ..garage.key().clone() });
    assert_eq!(ended.code, Some(4), "{}", ended.stderr);

    move_to_bucket(&site, "dc-a", &garage, garage.key());
    let text = std::fs::read_to_string(site.home.path("dc-a.toml")).unwrap();
    let changed = |from: &str, to: &str| -> Ended {
        site.home.write("dc-a.toml", text.replace(from, to).as_bytes());
        site.home.command(&["dc", "--config", "dc-a.toml"]).output().unwrap().into()
    };
    let ended = changed("bucket = \"sluice\"", "bucket = \"nowhere\"");
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("there is no such bucket"), "{}", ended.stderr);
    let ended = changed(&garage.endpoint(), "http://127.0.0.1:1");
    assert_eq!(ended.code, Some(6), "{}", ended.stderr);
    assert!(ended.stderr.contains("bucket-unreachable"), "{}", ended.stderr);
}
