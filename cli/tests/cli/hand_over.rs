//! Work goes from a datacenter of processes to one that is a single process, and back.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use sluice_redis::testing::{Server, available};

use crate::Ended;
use crate::divided::Divided;
use crate::fake::noise;
use crate::processes::{Running, done, eventually};

const MIB: usize = 1 << 20;
const SHARES: u32 = 16;

struct Bed {
    divided: Divided,
    over: AtomicBool,
}

/// However it ends.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Bed {
    fn command(&self, dc: usize, args: &[&str]) -> Ended {
        self.divided.run(dc, args)
    }

    fn operate(&self, dc: usize, args: &[&str]) -> Ended {
        let operator = self.divided.site.home.path("operator");
        self.command(dc, &[args, &["--token-file", operator.to_str().unwrap()]].concat())
    }

    /// Sends small files through a datacenter, and a large one all the while; says which they were.
    fn send(&self, dc: usize, tag: &str) -> Vec<(String, Vec<u8>)> {
        let home = &self.divided.site.home;
        let put = |name: String, bytes: Vec<u8>| {
            home.write(&name, &bytes);
            let id = done(self.command(dc, &["put", &name, "--wait", "assembled", "--jobs", "2"]));
            (id.trim().to_owned(), bytes)
        };
        std::thread::scope(|scope| {
            let large = scope.spawn(|| put(format!("{tag}-large"), noise(77, 200 * MIB + 5)));
            let mut sent = Vec::new();
            while !self.over.load(Ordering::SeqCst) || sent.len() < 10 {
                let number = sent.len();
                // Some of several chunks.
                let len = if number.is_multiple_of(4) { 2 * MIB + number } else { 4000 + number };
                sent.push(put(format!("{tag}-{number}"), noise(number as u64, len)));
            }
            sent.push(large.join().unwrap());
            sent
        })
    }

    /// A token that nobody has used, in a file.
    fn new_token(&self, name: &str) -> String {
        let token = format!("token-{name}");
        let mint = ["admin", "token", "mint", "--keys", "keys/authority", "--tenant", "7", "--out", &token];
        done(self.divided.site.home.command(&mint).output().unwrap().into());
        self.divided.site.home.path(&token).to_str().unwrap().to_owned()
    }

    /// Requests whose context came from the other datacenter.
    fn moved(&self, dc: usize) -> Option<i64> {
        let runtime = tokio::runtime::Handle::current();
        match dc {
            0 => self.divided.metric("session", "sluice_moved_contexts_total{dc=\"dc-a\"} "),
            _ => tokio::task::block_in_place(|| {
                runtime.block_on(self.divided.site.metric(1, "sluice_moved_contexts_total{dc=\"dc-b\"} "))
            }),
        }
    }

    /// All of it is at `dc`, which alone is asked.
    fn check(&self, dc: usize, sent: &[(String, Vec<u8>)]) {
        let copy = self.divided.site.home.path("copy");
        for (id, bytes) in sent {
            done(self.command(dc, &["get", id, "-o", "copy", "--force"]));
            assert!(std::fs::read(&copy).unwrap() == *bytes, "{id}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datacenter_of_processes_is_drained_and_takes_over_itself() {
    if !available() {
        return;
    }
    sluice_node::tls::install_provider();
    let redis = Server::start();
    let bed = Bed { divided: Divided::sharing(2, SHARES, Some(&redis)), over: AtomicBool::new(false) };
    let divided = &bed.divided;
    let mint = ["admin", "token", "mint", "--keys", "keys/authority", "--operator", "--out", "operator"];
    done(divided.site.home.command(&mint).output().unwrap().into());
    let names = ["worker", "aggregator-0", "aggregator-1", "session", "edge"];
    let mut processes: Vec<Running> = names.iter().map(|name| divided.begin(name)).collect();
    let mut b = divided.site.start("dc-b");
    eventually("a part for each", || {
        let had = [0, 1].map(|aggregator| divided.shares(aggregator));
        (had.iter().sum::<i64>() == i64::from(SHARES)).then_some(())
    });

    for (from, to) in [(0, 1), (1, 0)] {
        let (name, target) = (["dc-a", "dc-b"][from], ["dc-a", "dc-b"][to]);
        bed.over.store(false, Ordering::SeqCst);
        let sent = std::thread::scope(|scope| {
            let sender = scope.spawn(|| bed.send(from, name));
            let _over = Over(&bed.over);
            let drain = ["admin", "drain", name, "--to", target, "--phase", "sessions"];
            // Links of some share may only just come up.
            eventually("a target that can be reached", || {
                (bed.operate(from, &drain).code == Some(0)).then_some(())
            });
            // A session that begins now begins at the target.
            let mut number = 0;
            eventually("a context that comes from there", || {
                number += 1;
                let token = bed.new_token(&format!("{name}-{number}"));
                done(bed.command(from, &["ls", "--token-file", &token]));
                bed.moved(from).filter(|moved| *moved > 0)
            });
            let drained = bed.operate(from, &["admin", "drain", name, "--to", target, "--evacuate"]);
            bed.over.store(true, Ordering::SeqCst);
            let sent = sender.join().unwrap();
            assert_eq!(drained.code, Some(0), "{}", drained.stderr);
            for phase in ["data      done", "sessions  done", "channels  done"] {
                assert!(drained.stderr.contains(phase), "{}", drained.stderr);
            }
            println!(
                "{name}: {} files were sent while it was drained; {}",
                sent.len(),
                drained.stdout.trim()
            );
            sent
        });
        // The large one may have been unfinished when the drain was done.
        eventually("nothing that is left", || {
            let status = bed.operate(from, &["admin", "drain", name, "--to", target, "--evacuate", "--json"]);
            let status: Value = serde_json::from_str(&status.stdout).ok()?;
            (status["files_left"] == 0 && status["phase"] == "channels").then_some(())
        });
        if from == 0 {
            let passed = divided.metric("worker", "sluice_spill_bytes_total{dc=\"dc-a\",peer=\"dc-b\"} ");
            assert!(passed.is_some_and(|bytes| bytes > 0), "{passed:?}");
            // It can be switched off.
            processes.clear();
            bed.check(to, &sent);
            processes = names.iter().map(|name| divided.begin(name)).collect();
        } else {
            drop(b);
            bed.check(to, &sent);
            b = divided.site.start("dc-b");
        }
        eventually("taken back", || {
            let undrained = bed.operate(from, &["admin", "undrain", name]);
            (undrained.code == Some(0)).then_some(())
        });
        let sent = bed.send(from, &format!("{name}-again"));
        bed.check(from, &sent);
    }
    processes.into_iter().chain([b]).for_each(Running::stop);
    done(divided.site.home.command(&["fsck", "--data", "data/dc-a"]).output().unwrap().into());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_much_for_a_worker_goes_to_another_datacenter_until_there_is_room() {
    let bed = Bed { divided: Divided::sharing(1, 1, None), over: AtomicBool::new(true) };
    let divided = &bed.divided;
    let file = divided.site.home.path("worker.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("upload_rate = \"4MiB\"\n{text}")).unwrap();
    let processes = ["aggregator-0", "worker", "session", "edge"].map(|name| divided.begin(name));
    let b = divided.site.start("dc-b");
    let spilled =
        || divided.metric("worker", "sluice_spill_bytes_total{dc=\"dc-a\",peer=\"dc-b\"} ").unwrap();
    let put = |name: &str, len: usize| {
        let bytes = noise(len as u64, len);
        divided.site.home.write(name, &bytes);
        let id = done(bed.command(0, &["put", name, "--wait", "assembled"])).trim().to_owned();
        bed.check(0, &[(id, bytes)]);
    };
    put("too-much", 96 * MIB);
    let passed = spilled();
    println!("{passed} bytes of {} went to the other datacenter", 96 * MIB);
    assert!(passed >= 16 * MIB as i64, "{passed}");
    // The cap is lifted while it runs: nothing goes any more.
    std::fs::write(&file, text).unwrap();
    eventually("no cap", || {
        let rate =
            divided.metric("worker", "sluice_limit_bytes_per_second{dc=\"dc-a\",limit=\"upload_rate\"} ");
        (rate == Some(0)).then_some(())
    });
    // What was used up of the cap is forgotten with it.
    let before = spilled();
    put("not-too-much", 64 * MIB);
    assert_eq!(spilled(), before);
    b.stop();
    processes.into_iter().for_each(Running::stop);
}
