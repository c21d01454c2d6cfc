//! Cuts in both directions and in one, links that lose packets, a datacenter that hangs, and a home that dies: what clients
//! send, in every shape, ends with equal bytes wherever it is read.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use sluice_client::{Event, Order, UploadOptions, WaitFor};
use uuid::Uuid;

use crate::can_be_apart;
use crate::site::{Kept, MIB, Site, eventually, nobody, noise};

/// Those that are gone are given up on soon.
const HASTY: &str = "takeover_after = \"3s\"\nabsent_after = \"2s\"";

/// Those that are gone will be back.
pub(crate) const PATIENT: &str = "takeover_after = \"10min\"\nabsent_after = \"10min\"";

fn acknowledged() -> UploadOptions {
    UploadOptions { wait: WaitFor::Acknowledged, ..UploadOptions::default() }
}

/// Files in several shapes, sent by way of these datacenters, each under its id: one of more than a stripe, and some that are
/// smaller.
pub(crate) fn send_all(site: &Site, seed: u64, dcs: &[usize]) -> Vec<(Uuid, Vec<u8>)> {
    let bytes = noise(seed * 100 + 98, 70 * MIB);
    let order = Order::Shuffled { seed, inside: true };
    let id = site.upload(dcs, &bytes, &UploadOptions { order, ..acknowledged() }, nobody()).id;
    let mut sent = vec![(id, bytes)];
    sent.extend(send_few(site, seed, dcs));
    sent
}

/// Those that are smaller.
pub(crate) fn send_few(site: &Site, seed: u64, dcs: &[usize]) -> Vec<(Uuid, Vec<u8>)> {
    let mut sent = Vec::new();
    let mut send = |len: usize, options: UploadOptions| {
        let bytes = noise(seed * 100 + sent.len() as u64, len);
        let id = site.upload(dcs, &bytes, &options, nobody()).id;
        sent.push((id, bytes));
    };
    send(3 * MIB + 17, acknowledged());
    send(MIB, acknowledged());
    send(1, acknowledged());
    send(0, acknowledged());
    let home = format!("dc-{}", dcs.last().unwrap());
    send(5 * MIB, UploadOptions { home: Some(home), ..acknowledged() });
    let bytes = noise(seed * 100 + 99, 9 * MIB + 4);
    sent.push((site.stream(dcs, &bytes, &acknowledged()), bytes));
    sent
}

#[test]
fn two_datacenters_cut_in_both_directions_and_in_one_end_with_equal_bytes() {
    if !can_be_apart() {
        return;
    }
    let site = Site::new(2, PATIENT);
    site.start_all();
    for (seed, cuts) in [(1, &[(1, 2), (2, 1)][..]), (2, &[(2, 1)][..])] {
        cuts.iter().for_each(|&(from, to)| site.network.cut(from, to, true));
        // Over TCP nobody is heard who does not hear: one direction is enough to end both links.
        site.linked(&[(1, 2)]);
        let mut sent = send_all(&site, seed, &[1]);
        sent.extend(send_all(&site, seed + 10, &[2]));
        // One file by way of both, who cannot tell each other.
        sent.extend(send_all(&site, seed + 20, &[1, 2]));
        cuts.iter().for_each(|&(from, to)| site.network.cut(from, to, false));
        site.linked(&[]);
        for (id, bytes) in &sent {
            site.equal(&[1, 2], *id, bytes);
        }
        println!("cut {cuts:?}: {} files, {:?}", sent.len(), site.quiet());
    }
    site.check_volumes();
}

#[test]
fn three_datacenters_on_links_that_lose_one_packet_in_fifty_end_with_equal_bytes() {
    lose_packets(Kept::Volumes);
}

#[test]
fn three_datacenters_of_buckets_on_links_that_lose_one_packet_in_fifty_end_with_equal_bytes() {
    lose_packets(Kept::Buckets);
}

fn lose_packets(kept: Kept) {
    if !can_be_apart() {
        return;
    }
    let Some(site) = Site::keeping(kept, 3, PATIENT) else { return };
    site.start_all();
    site.network.lose(2);
    let mut sent = send_all(&site, 40, &[1, 2, 3]);
    // While one pair does not reach each other at all, and the third reaches both.
    site.network.cut(1, 2, true);
    site.network.cut(2, 1, true);
    sent.extend(match kept {
        Kept::Volumes => send_all(&site, 41, &[2, 3]),
        // Which are slower, and have little to learn from a large one more.
        Kept::Buckets => send_few(&site, 41, &[2, 3]),
    });
    site.network.cut(1, 2, false);
    site.network.cut(2, 1, false);
    for (id, bytes) in &sent {
        site.equal(&[1, 2, 3], *id, bytes);
    }
    let lost = site.network.lost();
    assert!(lost > 10, "only {lost} packets were lost");
    println!("{kept:?}: {} files, {lost} packets lost, {:?}", sent.len(), site.quiet());
    site.check_volumes();
}

#[test]
fn while_a_datacenter_hangs_uploads_go_on_at_another_and_when_it_goes_on_both_agree() {
    if !can_be_apart() {
        return;
    }
    let site = Site::new(2, PATIENT);
    site.start_all();
    let processes = site.processes();
    // Some of it is still on its way to the other when that stops.
    let mut sent = send_all(&site, 80, &[1, 2]);
    site.hang(2);
    // Nobody has missed it yet.
    sent.extend(send_few(&site, 81, &[1]));
    eventually("dc-1 misses dc-2", || (!site.reaches(1, 2)).then_some(()));
    sent.extend(send_all(&site, 82, &[1]));
    assert!(!site.reaches(1, 2), "dc-2 answered");
    site.go_on(2);
    site.linked(&[]);
    sent.extend(send_few(&site, 83, &[2]));
    for (id, bytes) in &sent {
        site.equal(&[1, 2], *id, bytes);
    }
    assert_eq!(site.processes(), processes, "nobody began anew");
    println!("{} files, {:?}", sent.len(), site.quiet());
    site.check_volumes();
}

#[test]
fn a_home_that_is_lost_in_the_middle_costs_only_what_it_alone_had() {
    lose_home(Kept::Volumes, 200);
}

#[test]
fn a_home_in_a_bucket_that_is_lost_in_the_middle_costs_only_what_it_alone_had() {
    lose_home(Kept::Buckets, 128);
}

fn lose_home(kept: Kept, chunks: u64) {
    if !can_be_apart() {
        return;
    }
    let Some(site) = Site::keeping(kept, 3, HASTY) else { return };
    site.start_all();
    let site = Arc::new(site);
    let bytes = noise(7, chunks as usize * MIB);
    let taken = Arc::new(Mutex::new(Vec::new()));
    let (seen, killer) = (taken.clone(), site.clone());
    let killed = AtomicBool::new(false);
    let observer = move |event: &Event<'_>| {
        if let Event::Acknowledged { dc, start, count, .. } = event {
            let mut seen = seen.lock().unwrap();
            seen.push(((*dc).to_owned(), *start..*start + *count));
            let dcs: BTreeSet<&String> = seen.iter().map(|(dc, _)| dc).collect();
            if dcs.len() == 3 && seen.len() >= 9 && !killed.swap(true, Ordering::Relaxed) {
                // Killed, and nothing that is still on its way arrives; be it the metadata, which others may lack.
                killer.kill(1);
            }
        }
    };
    let options =
        UploadOptions { home: Some("dc-1".into()), wait: WaitFor::Assembled, ..UploadOptions::default() };
    let sent = site.upload(&[1, 2, 3], &bytes, &options, Arc::new(observer));
    let of = |name: &str| -> BTreeSet<u64> {
        let taken = taken.lock().unwrap();
        taken.iter().filter(|(dc, _)| dc == name).flat_map(|(_, range)| range.clone()).collect()
    };
    let (lost, kept) = (of("dc-1"), &of("dc-2") | &of("dc-3"));
    assert!(!lost.is_empty());
    assert_eq!(kept, (0..chunks).collect::<BTreeSet<_>>());
    assert_eq!(sent.chunks_sent, chunks + lost.len() as u64, "what others had was not sent again");
    assert!(["dc-2", "dc-3"].contains(&sent.home.as_str()), "{}", sent.home);
    site.equal(&[2, 3], sent.id, &bytes);
    let (count, traffic) = (lost.len(), site.network.bytes());
    println!("{kept:?}: {count} of {chunks} chunks were lost with dc-1 and sent again; {traffic} bytes");
    site.start(1);
    site.linked(&[]);
    eventually("one home", || {
        let all: Vec<_> = (1..=3).filter_map(|dc| site.status(dc, sent.id)).collect();
        (all.len() == 3 && all.iter().all(|status| status.home == sent.home)).then_some(())
    });
    site.equal(&[1, 2, 3], sent.id, &bytes);
    site.check_volumes();
}
