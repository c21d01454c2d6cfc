//! put, get, status, ls, rm.

use rustix::process::{Pid, Signal, kill_process};
use sluice_proto::problem::{Problem, Refusal};

use crate::fake::{FakeCluster, Fault, noise};
use crate::{Ended, Home, names};

const MIB: usize = 1 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_goes_there_and_back() {
    let cluster = FakeCluster::start(2).await;
    let home = Home::new(Some(&cluster));
    let bytes = noise(1, 9 * MIB + 5);
    home.write("disk.img", &bytes);
    let root = blake3::hash(&bytes).to_string();

    let put = home.run(&["put", "disk.img", "--meta", "k=v", "--expires", "7d", "--expect", &root]).await;
    assert_eq!(put.code, Some(0), "{}", put.stderr);
    let id = put.stdout.trim_end().to_owned();
    assert_eq!(put.stdout, format!("{id}\n"), "the id alone");
    assert!(cluster.bytes(id.parse().unwrap()) == bytes);
    assert!(put.stderr.contains(&root));
    assert!(names(&home.path("state/sluice/uploads")).is_empty(), "nothing is left unfinished");

    let get = home.run(&["get", &id, "-o", "copy.img"]).await;
    assert_eq!((get.code, get.stdout.as_str()), (Some(0), "copy.img\n"), "{}", get.stderr);
    assert!(std::fs::read(home.path("copy.img")).unwrap() == bytes);
    let again = home.run(&["get", &id, "-o", "copy.img"]).await;
    assert_eq!(again.code, Some(2));
    assert_eq!(again.stderr, "error: copy.img exists (exists)\nhint: use --force to replace it\n");
    assert_eq!(home.run(&["get", &id, "-o", "copy.img", "--force"]).await.code, Some(0));
    let range = home.run(&["get", &id, "--range", "1048570-1048580", "-o", "part", "--json"]).await;
    assert_eq!(range.json()["bytes"], 11);
    assert!(std::fs::read(home.path("part")).unwrap() == bytes[1_048_570..=1_048_580]);

    let status = home.run(&["status", &id]).await;
    assert!(status.stdout.contains("complete, home dc-a"), "{}", status.stdout);
    assert!(status.stdout.contains(&root));
    assert_eq!(home.run(&["status", &id, "--json"]).await.json()["metadata"]["k"], "v");
    assert_eq!(home.run(&["status", "--json"]).await.json()["cluster"], "test");
    let ls = home.run(&["ls"]).await;
    assert!(
        ls.stdout.starts_with(&format!("{id}  complete")) && ls.stdout.ends_with("disk.img\n"),
        "{}",
        ls.stdout
    );
    assert_eq!(
        home.run(&["ls", "--state", "receiving", "--json"]).await.json()["files"],
        serde_json::json!([])
    );

    assert_eq!(home.run(&["ls", "--limit", "5000"]).await.stdout, ls.stdout);

    let asked = home.run(&["rm", &id]).await;
    assert_eq!(asked.code, Some(2));
    assert!(asked.stderr.contains("(not-confirmed)\nhint: give --yes"), "{}", asked.stderr);
    assert_eq!(home.run(&["rm", &id, "--yes"]).await.code, Some(0));
    let gone = home.run(&["get", &id, "-o", "x"]).await;
    assert_eq!(gone.code, Some(3));
    assert!(gone.stderr.contains("(dropped)"), "{}", gone.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn json_is_one_object_also_for_errors() {
    let cluster = FakeCluster::start(2).await;
    let home = Home::new(Some(&cluster));
    home.write("f", &noise(2, 3 * MIB));
    let put = home.run(&["put", "f", "--json"]).await.json();
    let keys: Vec<&String> = put.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["chunks_sent", "chunks_skipped", "home", "id", "root", "size", "state"]);
    assert_eq!((&put["chunks_sent"], &put["size"]), (&3.into(), &(3 * MIB).into()));
    let missing = home.run(&["status", "00000000-0000-0000-0000-000000000000", "--json"]).await;
    assert_eq!(missing.code, Some(3));
    assert_eq!(missing.json()["error"]["code"], "not-found");
    assert!(missing.stderr.starts_with("error: dc-a refused the status of "), "{}", missing.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_are_passed_on_in_the_words_of_the_server() {
    let cluster = FakeCluster::start(1).await;
    let home = Home::new(Some(&cluster));
    home.write("f", &noise(3, MIB));
    cluster.dcs[0].fail(|request| {
        let refusal = Refusal::new(Problem::ChunkLength, "length 1048575, expected 1048576")
            .hint("send whole chunks of 1 MiB; only the last may be short");
        request.is_chunk().then_some(Fault::Refuse(refusal))
    });
    // With a home it goes in chunks, also if it is small.
    let put = home.run(&["put", "f", "--home", "dc-a"]).await;
    assert_eq!(put.code, Some(2));
    assert_eq!(
        put.stderr,
        "error: dc-a refused chunk 0: length 1048575, expected 1048576 (chunk-length)\n\
         hint: send whole chunks of 1 MiB; only the last may be short\n\
         trace: 0123456789abcdef0123456789abcdef\n"
    );
    assert_eq!(put.stdout, "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exit_codes_tell_what_to_do() {
    let cluster = FakeCluster::start(1).await;
    let home = Home::new(Some(&cluster));
    home.write("f", &noise(4, 2 * MIB));
    let wrong = "0".repeat(64);
    let expect = home.run(&["put", "f", "--expect", &wrong]).await;
    assert_eq!(expect.code, Some(5), "{}", expect.stderr);
    assert_eq!(home.run(&["put", "nothing"]).await.code, Some(2));

    home.write("token", b"another");
    assert_eq!(home.run(&["ls"]).await.code, Some(4));
    home.write("token", crate::TOKEN.as_bytes());

    cluster.dcs[0].fail(|request| request.is_chunk().then_some(Fault::Break));
    home.write("g", &noise(5, MIB));
    let later = home.run(&["put", "g", "--home", "dc-a", "--retry-for", "300ms"]).await;
    assert_eq!(later.code, Some(6), "{}", later.stderr);
    assert!(later.stderr.contains("(unreachable)"), "{}", later.stderr);
    assert!(later.stderr.contains("\nresume: sluice put g --id "), "{}", later.stderr);
    assert!(later.stderr.contains(" --retry-for 300ms"), "{}", later.stderr);
    cluster.dcs[0].fail(|request| request.path.ends_with("/content").then_some(Fault::Corrupt));
    let put = home.run(&["put", "g", "--home", "dc-a", "--json"]).await;
    assert_eq!(put.code, Some(0), "{}", put.stderr);
    let id = put.json()["id"].as_str().unwrap().to_owned();
    assert!(later.stderr.contains(&id), "the same id was carried on with");
    let corrupt = home.run(&["get", &id, "-o", "out"]).await;
    assert_eq!(corrupt.code, Some(5), "{}", corrupt.stderr);
    assert!(!home.path("out").exists());
}

/// Interrupts `put` when some chunks are there, and says how it ended.
async fn interrupted_put(cluster: &FakeCluster, home: &Home) -> Ended {
    cluster.dcs[1].fail(|request| request.is_chunk().then_some(Fault::Stall));
    let child = home.command(&["put", "disk.img", "--name", "n"]).spawn().unwrap();
    cluster.until_taken(4).await;
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let ended = tokio::task::spawn_blocking(move || child.wait_with_output()).await.unwrap().unwrap();
    cluster.dcs[1].fail(|_| None);
    ended.into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_put_says_how_to_carry_on_and_does() {
    let cluster = FakeCluster::start(2).await;
    let home = Home::new(Some(&cluster));
    let bytes = noise(6, 64 * MIB);
    home.write("disk.img", &bytes);
    let ended = interrupted_put(&cluster, &home).await;
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    let resume = ended.stderr.lines().find_map(|line| line.strip_prefix("resume: ")).unwrap();
    assert!(resume.starts_with("sluice put disk.img --id ") && resume.ends_with(" --name n"), "{resume}");
    let id = resume.split(' ').nth(4).unwrap().to_owned();

    // Without --name: what was said then is said again.
    let put = home.run(&["put", "disk.img", "--json"]).await;
    assert_eq!(put.code, Some(0), "{}", put.stderr);
    assert!(put.stderr.contains(&format!("carrying on with {id}")));
    let put = put.json();
    assert_eq!(put["id"], id.as_str());
    assert!(put["chunks_skipped"].as_u64().unwrap() >= 4);
    assert_eq!(put["chunks_skipped"].as_u64().unwrap() + put["chunks_sent"].as_u64().unwrap(), 64);
    assert!(cluster.bytes(id.parse().unwrap()) == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_changed_since_is_refused_until_the_upload_is_given_up() {
    let cluster = FakeCluster::start(2).await;
    let home = Home::new(Some(&cluster));
    home.write("disk.img", &noise(7, 64 * MIB));
    assert_eq!(interrupted_put(&cluster, &home).await.code, Some(130));
    home.write("disk.img", &noise(8, 5 * MIB));
    let refused = home.run(&["put", "disk.img", "--json"]).await;
    assert_eq!(refused.code, Some(5));
    assert_eq!(refused.json()["error"]["code"], "source-changed");
    assert!(refused.stderr.contains("it had 67108864 bytes and has 5242880 now"), "{}", refused.stderr);
    let id = refused.stderr.split_once("sluice rm ").unwrap().1.split('`').next().unwrap().to_owned();
    assert_eq!(home.run(&["rm", &id, "--yes"]).await.code, Some(0));
    let put = home.run(&["put", "disk.img"]).await;
    assert_eq!(put.code, Some(0), "{}", put.stderr);
    assert_ne!(put.stdout.trim_end(), id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_survives_the_death_of_a_datacenter() {
    let cluster = FakeCluster::start(2).await;
    let home = Home::new(Some(&cluster));
    let bytes = noise(9, 64 * MIB);
    home.write("disk.img", &bytes);
    let child = home.command(&["put", "disk.img", "--jobs", "2"]).spawn().unwrap();
    cluster.until_taken(24).await;
    cluster.dcs[1].kill();
    let ended = tokio::task::spawn_blocking(move || child.wait_with_output()).await.unwrap().unwrap();
    let ended = Ended::from(ended);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(cluster.bytes(ended.stdout.trim_end().parse().unwrap()) == bytes);
}
