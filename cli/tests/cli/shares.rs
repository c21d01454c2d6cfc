//! Aggregators of one datacenter that divide its slots among themselves by what a real Redis says.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use reqwest::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use sluice_client::{Event, Source};
use sluice_engine::hash::Root;
use sluice_engine::ids::{ClientFileId, FileId, Slot, TenantId};
use sluice_redis::testing::{Server, available};
use uuid::Uuid;

use crate::divided::{Divided, SUCCESSION, put, upload_here};
use crate::fake::noise;
use crate::processes::{Running, done, eventually};

const MIB: usize = 1 << 20;
const SHARES: i64 = 16;

/// Small files, so many that there are some in every share.
const FILES: u64 = 48;

fn all_are_had(divided: &Divided, by: &[usize]) -> bool {
    let had: Vec<i64> = by.iter().map(|aggregator| divided.shares(*aggregator)).collect();
    // How many falls to one is chance, and may be none.
    had.iter().sum::<i64>() == SHARES
}

fn ids(listed: &str) -> BTreeSet<String> {
    let listed: Value = serde_json::from_str(listed).unwrap();
    let files = listed["files"].as_array().unwrap();
    files.iter().map(|file| file["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn aggregators_divide_the_slots_and_each_follows_another() {
    if !available() {
        return;
    }
    let redis = Server::start();
    let divided = Arc::new(Divided::sharing(3, SHARES as u32, Some(&redis)));
    let mut worker = Some(divided.begin("worker"));
    let others = ["session", "edge"].map(|name| divided.begin(name));
    let mut aggregators: Vec<Option<Running>> =
        (0..3).map(|number| Some(divided.begin(&format!("aggregator-{number}")))).collect();
    let b = divided.site.start("dc-b");
    eventually("a part for each", || all_are_had(&divided, &[0, 1, 2]).then_some(()));

    let (near, both) = (divided.client(&[0]), divided.client(&[0, 1]));
    let mut files = Vec::new();
    for number in 0..FILES {
        let sent = put(&near, &noise(number, 3000)).await;
        files.push(sent.id.to_string());
    }
    let large = noise(200, 40 * MIB + 3);
    let sent = put(&both, &large).await;
    files.push(sent.id.to_string());
    let expected: BTreeSet<String> = files.iter().cloned().collect();
    assert_eq!(ids(&done(divided.run(0, &["ls", "--json"]))), expected, "lists are joined");
    eventually("all of them at the other datacenter", || {
        (ids(&done(divided.run(1, &["ls", "--json"]))) == expected).then_some(())
    });
    done(divided.run(1, &["get", &files[FILES as usize], "-o", "copy"]));
    assert!(std::fs::read(divided.site.home.path("copy")).unwrap() == large);

    // One after the other is killed under an upload; what it had falls to the others.
    for victim in [0, 1, 2] {
        let bytes = noise(210 + victim as u64, 40 * MIB);
        let (kill, killed) = std::sync::mpsc::channel();
        let seen = Mutex::new(0);
        let observer = move |event: &Event| {
            if let Event::Acknowledged { .. } = event {
                let mut seen = seen.lock().unwrap();
                *seen += 1;
                if *seen == 2 {
                    kill.send(()).unwrap();
                }
            }
        };
        let (source, client) = (Source::memory(bytes.clone()), near.clone());
        let upload =
            tokio::spawn(async move { client.upload(&source, &upload_here(), Arc::new(observer)).await });
        killed.recv().unwrap();
        drop(aggregators[victim].take());
        let since = Instant::now();
        let rest: Vec<usize> = (0..3).filter(|aggregator| *aggregator != victim).collect();
        eventually("two that have all", || all_are_had(&divided, &rest).then_some(()));
        let took = since.elapsed();
        println!("without {victim}: all shares were had again after {} ms", took.as_millis());
        assert!(took < SUCCESSION, "it took {took:?}");
        for file in files.iter().take(FILES as usize) {
            let status: Value =
                serde_json::from_str(&done(divided.run(0, &["status", file, "--json"]))).unwrap();
            assert_eq!(status["state"], "assembled", "{status}");
        }
        assert_eq!(upload.await.unwrap().unwrap().root, Root::of_bytes(&bytes), "without {victim}");
        aggregators[victim] = Some(divided.begin(&format!("aggregator-{victim}")));
        eventually("a part for each again", || all_are_had(&divided, &[0, 1, 2]).then_some(()));
    }

    // The worker is killed, and what all of them knew with it.
    drop(worker.take());
    worker = Some(divided.begin("worker"));
    put(&near, &noise(219, 8 * MIB)).await;
    eventually("a part for each after that", || all_are_had(&divided, &[0, 1, 2]).then_some(()));
    for file in &files {
        done(divided.run(0, &["status", file]));
    }

    // One that hangs is not waited for, and when it goes on it finds out.
    let hung = Pid::from_child(&aggregators[1].as_ref().unwrap().0);
    kill_process(hung, Signal::STOP).unwrap();
    put(&near, &noise(220, 8 * MIB)).await;
    eventually("two that have all", || all_are_had(&divided, &[0, 2]).then_some(()));
    for file in &files {
        done(divided.run(0, &["status", file]));
    }
    kill_process(hung, Signal::CONT).unwrap();
    eventually("a part for it, too", || all_are_had(&divided, &[0, 1, 2]).then_some(()));
    put(&both, &noise(221, 8 * MIB)).await;

    for process in aggregators.into_iter().flatten().chain(others).chain(worker).chain([b]) {
        process.stop();
    }
    done(divided.site.home.command(&["fsck", "--data", "data/dc-a"]).output().unwrap().into());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_nothing_is_lost_but_the_division() {
    if !available() {
        return;
    }
    let redis = Server::start();
    let divided = Divided::sharing(2, SHARES as u32, Some(&redis));
    let others = ["worker", "session", "edge"].map(|name| divided.begin(name));
    let mut aggregators = [0, 1].map(|number| Some(divided.begin(&format!("aggregator-{number}"))));
    let b = divided.site.start("dc-b");
    eventually("a part for each", || all_are_had(&divided, &[0, 1]).then_some(()));
    let near = divided.client(&[0]);
    let mut files = Vec::new();
    for number in 0..24 {
        files.push(put(&near, &noise(300 + number, 3000)).await.id.to_string());
    }
    // Redis forgets everything: nobody loses a share by that.
    redis.cli(&["FLUSHALL"]);
    put(&near, &noise(330, 4 * MIB)).await;
    eventually("a part for each", || all_are_had(&divided, &[0, 1]).then_some(()));
    // It is gone, and then so is one of the two: the other takes what the worker lets it have.
    drop(redis);
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(all_are_had(&divided, &[0, 1]), "who has something keeps it");
    drop(aggregators[0].take());
    let since = Instant::now();
    eventually("one that has all", || all_are_had(&divided, &[1]).then_some(()));
    println!("without Redis: all shares were had again after {} ms", since.elapsed().as_millis());
    for file in &files {
        done(divided.run(0, &["status", file]));
    }
    for process in aggregators.into_iter().flatten().chain(others).chain([b]) {
        process.stop();
    }
}

/// How many unfinished files there are in one slot.
const UNFINISHED: usize = 10_000;

/// The promise at its limit: an owner of a slot with very many unfinished files is killed, and the next one answers for them.
///
///     cargo nextest run --release -p sluice --test cli --run-ignored only --no-capture very_many_unfinished
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes, and a release build"]
async fn a_slot_of_very_many_unfinished_files_is_answered_for_soon() {
    let redis = Server::start();
    let divided = Divided::sharing(2, SHARES as u32, Some(&redis));
    let others = ["worker", "session", "edge"].map(|name| divided.begin(name));
    let mut aggregators = [0, 1].map(|number| Some(divided.begin(&format!("aggregator-{number}"))));
    eventually("a part for each", || all_are_had(&divided, &[0, 1]).then_some(()));

    let slot = Slot::new(0x5a7).unwrap();
    let in_slot = (0..)
        .map(|number| Uuid::from_u128(1 << 96 | number))
        .filter(|id| FileId::derive(TenantId::new(7), ClientFileId::new(*id)).slot() == slot);
    let ids: Vec<Uuid> = in_slot.take(UNFINISHED).collect();
    let http = divided.http();
    let created = Instant::now();
    stream::iter(&ids)
        .for_each_concurrent(64, async |id| {
            let body = json!({ "id": id, "size": MIB + 10, "name": "unfinished" });
            let answer = http.ask(Method::POST, "/files").json(&body).send().await.unwrap();
            assert_eq!(answer.status(), 201);
            let chunk = http.ask(Method::PUT, &format!("/files/{id}/chunks/1")).body(noise(1, 10));
            assert_eq!(chunk.send().await.unwrap().status(), 200);
        })
        .await;
    println!(
        "{UNFINISHED} files in slot {:03x} after {:.1} s",
        slot.number(),
        created.elapsed().as_secs_f64()
    );
    // One of the two has it.
    for victim in [0, 1] {
        drop(aggregators[victim].take());
        let since = Instant::now();
        let slowest = stream::iter(ids.iter().step_by(UNFINISHED / 100))
            .map(async |id| {
                let answer = http.ask(Method::GET, &format!("/files/{id}")).send().await.unwrap();
                assert_eq!(answer.status(), 200, "{id}");
                let status: Value = answer.json().await.unwrap();
                assert_eq!((&status["state"], &status["missing_chunks"]), (&json!("receiving"), &json!(1)));
                since.elapsed()
            })
            .buffer_unordered(100)
            .fold(Duration::ZERO, async |slowest, took| slowest.max(took))
            .await;
        println!("without {victim}: 100 of its files were answered for after {} ms", slowest.as_millis());
        assert!(slowest < SUCCESSION, "{slowest:?}");
        // All of them are known again, and can be listed.
        let listed = Instant::now();
        eventually("a list", || (divided.run(0, &["ls", "--json"]).code == Some(0)).then_some(()));
        println!("without {victim}: all were listed {} ms later", listed.elapsed().as_millis());
        aggregators[victim] = Some(divided.begin(&format!("aggregator-{victim}")));
        eventually("a part for each again", || all_are_had(&divided, &[0, 1]).then_some(()));
    }
    for process in aggregators.into_iter().flatten().chain(others) {
        process.stop();
    }
}
