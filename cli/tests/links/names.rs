//! One name for the processes of a role, as a headless service of Kubernetes has it: a name server says which addresses it has,
//! and says others when processes come and go.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sluice_client::{UploadOptions, WaitFor};
use sluice_fault_s3::Garage;

use crate::can_be_apart;
use crate::network::{Network, address};
use crate::site::{BINARY, MIB, Site, bucket, eventually, nobody, noise};

/// What the porters are called, and the same as a question has it (RFC 1035, 3.1).
const NAME: &str = "workers.apart";
const ASKED: &[u8] = b"\x07workers\x05apart\0";

/// Where the name server is; libc knows no other port than 53.
const SERVER: (Ipv4Addr, u16) = (Ipv4Addr::new(127, 0, 0, 53), 53);

/// Runs a program whose libc asks that name server and no cache, by files that are others for it alone: `ip netns exec` gives
/// each process mounts of its own.
const ASKING: &str = "mount --bind resolv.conf /etc/resolv.conf && \
    { [ ! -e /etc/nsswitch.conf ] || mount --bind nsswitch.conf /etc/nsswitch.conf; } && exec \"$0\" \"$@\"";

/// A name server for one name. Its thread ends with it.
struct Names(Arc<Mutex<Vec<Ipv4Addr>>>);

impl Names {
    /// Answers at a place.
    fn serve(network: &Network, place: usize) -> Self {
        let socket = network.at_once(place, || UdpSocket::bind(SERVER)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let names = Self(Arc::default());
        let known = Arc::downgrade(&names.0);
        std::thread::spawn(move || {
            let mut question = [0; 512];
            while let Some(known) = known.upgrade() {
                let Ok((len, from)) = socket.recv_from(&mut question) else { continue };
                if let Some(answer) = answer(&question[..len], &known.lock().unwrap()) {
                    socket.send_to(&answer, from).unwrap();
                }
            }
        });
        names
    }

    /// The name has these addresses from now on.
    fn are(&self, porters: &[u8]) {
        *self.0.lock().unwrap() = porters.iter().map(|porter| at(*porter)).collect();
    }
}

/// What is said to who asks for the name: its addresses, or that it has none of another kind (RFC 1035, 4.1).
fn answer(question: &[u8], addresses: &[Ipv4Addr]) -> Option<Vec<u8>> {
    let &[0, kind, 0, 1, ..] = question.get(12..)?.strip_prefix(ASKED)? else { return None };
    let found: &[Ipv4Addr] = if kind == 1 { addresses } else { &[] };
    let mut said = question[..2].to_vec();
    // An answer without error, to one question, with so many records.
    said.extend([0x81, 0x80, 0, 1, 0, u8::try_from(found.len()).unwrap(), 0, 0, 0, 0]);
    said.extend(&question[12..12 + ASKED.len() + 4]);
    for address in found {
        // Of the name of the question; an address, which is not to be kept.
        said.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
        said.extend(address.octets());
    }
    Some(said)
}

/// Where a porter is.
fn at(porter: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 1, porter)
}

/// Files for all roles of `dc-1`, which keeps a bucket, and for porters 1 to 4 beside; its edge knows porters by their name.
fn write_files(site: &Site, garage: &Garage) {
    site.write_key(garage);
    site.write("resolv.conf", &format!("nameserver {}\n", SERVER.0));
    site.write("nsswitch.conf", "hosts: files dns\n");
    let write = |name: &str, role: &str, text: &str| {
        let who = format!("role = \"{role}\"\ndc = \"dc-1\"\nkeys = \"keys/roles/dc-1/{role}\"\n");
        site.write(&format!("{name}.toml"), &(who + text));
    };
    let (store, inside) = (bucket(garage), "admin = \"127.0.0.1:0\"\nlisten = \"127.0.0.1");
    write("session", "session", &format!("{inside}:8446\"\n"));
    let asks = "peer = \"127.0.0.1:8444\"\nworkers = \"127.0.0.1:8445\"\n";
    write("aggregator", "aggregator", &format!("{inside}:8447\"\n{asks}"));
    write("keeper", "worker", &format!("{inside}:8445\"\naggregators = \"127.0.0.1:8447\"\n{store}"));
    for porter in 1..=4 {
        let listens = format!("listen = \"{0}:8445\"\nadmin = \"{0}:9090\"\n", at(porter));
        let text = format!("{listens}keeper = \"127.0.0.1:8445\"\n{store}");
        write(&format!("porter-{porter}"), "worker", &text);
    }
    let listens = format!("listen = \"{}:8443\"\nadmin = \"127.0.0.1:0\"\n", address(1));
    write("edge", "edge", &format!("{listens}sessions = \"127.0.0.1:8446\"\nworkers = \"{NAME}:8445\"\n"));
}

/// Sends files until each of these porters has carried some of their bytes; how long that took.
fn all_carry(site: &Site, seed: u64, porters: &[u8]) -> Duration {
    let carried = |porter: &u8| -> u64 {
        let url = format!("http://{}:9090/metrics", at(*porter));
        let text = async { reqwest::get(url).await.unwrap().text().await.unwrap() };
        let text = site.network.inside(1, text);
        let name = "sluice_bucket_sent_bytes_total{dc=\"dc-1\"} ";
        text.lines().find_map(|line| line.strip_prefix(name)?.parse::<u64>().ok()).unwrap()
    };
    let (began, before) = (Instant::now(), porters.iter().map(carried).collect::<Vec<_>>());
    let options = UploadOptions { wait: WaitFor::Assembled, ..UploadOptions::default() };
    let mut number = seed * 1_000;
    eventually("bytes by way of every porter", || {
        number += 1;
        let bytes = noise(number, 24 * MIB);
        let id = site.upload(&[1], &bytes, &options, nobody()).id;
        site.equal(&[1], id, &bytes);
        let now = porters.iter().map(carried);
        now.zip(&before).all(|(now, before)| now >= before + MIB as u64).then_some(())
    });
    began.elapsed()
}

#[test]
fn an_edge_reaches_every_address_of_a_name_and_follows_when_they_change() {
    if !can_be_apart() {
        return;
    }
    let network = Network::new(1);
    let Some(garage) = network.at_once(1, Garage::start) else { return };
    let names = Names::serve(&network, 1);
    let site = Site::on(network, 1, |_| String::new());
    write_files(&site, &garage);
    let begin = |verb: &str, name: &str| site.begin(site.network.command(1, BINARY), verb, name);
    begin("aggregator", "aggregator");
    begin("worker", "keeper");
    begin("session", "session");
    (1..=3).for_each(|porter| begin("worker", &format!("porter-{porter}")));
    names.are(&[1, 2, 3]);
    let mut edge = site.network.command(1, "sh");
    edge.args(["-c", ASKING, BINARY]);
    site.begin(edge, "edge", "edge");
    let first = all_carry(&site, 91, &[1, 2, 3]);

    // Two go, and one comes.
    begin("worker", "porter-4");
    names.are(&[3, 4]);
    ["porter-1", "porter-2"].iter().for_each(|gone| site.end(gone));
    let then = all_carry(&site, 92, &[3, 4]);
    println!("every porter was reached in {first:?}, and in {then:?} after the name's answer had changed");
}
