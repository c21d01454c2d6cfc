//! A network of its own for each test: a name space for the clients and for every datacenter, joined by a bridge in another.
//! All of it exists only in these name spaces, and goes with them.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Where the clients are; datacenters are the places from 1 on.
pub(crate) const CLIENTS: usize = 0;

/// Counts networks of this process, so that two tests at once would not meet.
static NETWORKS: AtomicUsize = AtomicUsize::new(0);

/// Places that reach each other, as long as nothing is cut.
pub(crate) struct Network {
    name: String,
    places: usize,
}

impl Network {
    /// A network with a place for clients and for each of `datacenters`.
    pub(crate) fn new(datacenters: usize) -> Self {
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let this = Self { name: format!("sluice{}-{number}", std::process::id()), places: datacenters + 1 };
        let bridge = this.space("bridge");
        ip(&["netns", "add", &bridge]);
        ip(&["-n", &bridge, "link", "add", "bridge0", "type", "bridge"]);
        ip(&["-n", &bridge, "link", "set", "bridge0", "up"]);
        for place in 0..this.places {
            let (space, end) = (this.at(place), format!("port{place}"));
            let address = format!("{}/24", address(place));
            ip(&["netns", "add", &space]);
            ip(&[
                "-n", &bridge, "link", "add", &end, "type", "veth", "peer", "name", "eth0", "netns", &space,
            ]);
            ip(&["-n", &bridge, "link", "set", &end, "master", "bridge0", "up"]);
            ip(&["-n", &space, "address", "add", &address, "dev", "eth0"]);
            ip(&["-n", &space, "link", "set", "eth0", "up"]);
            ip(&["-n", &space, "link", "set", "lo", "up"]);
            // They count what comes from each other place, and let it pass.
            for from in (0..this.places).filter(|from| *from != place) {
                this.filter(place, &["-A", "INPUT", "-s", &address_of(from)]);
            }
        }
        this.open_doors();
        this
    }

    /// Lets clients find each datacenter's edge at a port of their own machine, the only address that the certificate of
    /// every edge names.
    fn open_doors(&self) {
        let local = "/proc/sys/net/ipv4/conf/all/route_localnet";
        said(self.command(CLIENTS, "sh").args(["-c", &format!("echo 1 > {local}")]).output());
        for dc in 1..self.places {
            let (port, edge) = (door(dc).to_string(), format!("{}:8443", address(dc)));
            let here = ["-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-d", "127.0.0.1", "--dport", &port];
            self.filter(CLIENTS, &[&here[..], &["-j", "DNAT", "--to-destination", &edge]].concat());
        }
        self.filter(CLIENTS, &["-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE"]);
    }

    fn space(&self, what: &str) -> String {
        format!("{}-{what}", self.name)
    }

    fn at(&self, place: usize) -> String {
        self.space(&place.to_string())
    }

    /// A command that runs at a place.
    pub(crate) fn command(&self, place: usize, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.at(place), program]);
        command
    }

    /// Does something whose sockets are at a place, on a thread of its own.
    pub(crate) fn inside<T: Send>(&self, place: usize, work: impl Future<Output = T> + Send) -> T {
        self.at_once(place, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(work)
        })
    }

    /// Does something at a place, as a thread whose sockets, and whose processes, are there.
    pub(crate) fn at_once<T: Send>(&self, place: usize, work: impl FnOnce() -> T + Send) -> T {
        let space = File::open(format!("/run/netns/{}", self.at(place))).unwrap();
        std::thread::scope(|scope| {
            let done = scope.spawn(move || {
                move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                work()
            });
            done.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn filter(&self, place: usize, args: &[&str]) -> String {
        let mut command = self.command(place, "iptables");
        said(command.arg("-w").args(args).output())
    }

    /// Whether nothing that one place sends reaches another any more. The way back stays as it is.
    pub(crate) fn cut(&self, from: usize, to: usize, cut: bool) {
        let what = if cut { "-A" } else { "-D" };
        self.filter(to, &[what, "INPUT", "-s", &address_of(from), "-j", "DROP"]);
    }

    /// Loses a share of all packets between datacenters from now on, in hundredths.
    pub(crate) fn lose(&self, hundredths: u32) {
        let share = format!("{}", f64::from(hundredths) / 100.0);
        for to in 1..self.places {
            for from in (1..self.places).filter(|from| *from != to) {
                let from = address_of(from);
                let random = ["-m", "statistic", "--mode", "random", "--probability", &share, "-j", "DROP"];
                self.filter(to, &[&["-A", "INPUT", "-s", &from][..], &random].concat());
            }
        }
    }

    /// Lets at most so many MiB a second from each datacenter reach each other from now on; what is more is lost. Where
    /// iptables cannot do that links stay as quick as they are, which it says, loudly; in CI it panics.
    pub(crate) fn throttle(&self, mib: u32) {
        let (rate, burst) = (format!("{mib}mb/s"), format!("{}mb", 2 * mib));
        for to in 1..self.places {
            for from in (1..self.places).filter(|from| *from != to) {
                let (name, from) = (format!("from{from}"), address_of(from));
                let slow = ["-m", "hashlimit", "--hashlimit-above", &rate, "--hashlimit-burst", &burst];
                let each = ["--hashlimit-mode", "srcip", "--hashlimit-name", &name, "-j", "DROP"];
                let mut command = self.command(to, "iptables");
                command.args(["-w", "-A", "INPUT", "-s", &from]).args(slow).args(each);
                let output = command.output().unwrap();
                if !output.status.success() {
                    let why = String::from_utf8_lossy(&output.stderr);
                    let why = format!("links cannot be made slow: has iptables no hashlimit? {why}");
                    assert!(std::env::var_os("CI").is_none(), "they must be slow in CI, and {why}");
                    eprintln!("\nNOT RUN on slow links: {why}\n");
                    return;
                }
            }
        }
    }

    /// How many packets were lost on purpose so far.
    pub(crate) fn lost(&self) -> u64 {
        let rows = (1..self.places).flat_map(|place| self.counted(place));
        rows.filter(|row| row.drops).map(|row| row.packets).sum()
    }

    /// Bytes that went between datacenters so far, with all that is around them.
    pub(crate) fn bytes(&self) -> u64 {
        let rows = (1..self.places).flat_map(|place| self.counted(place));
        let clients = address_of(CLIENTS);
        rows.filter(|row| !row.drops && row.from != clients).map(|row| row.bytes).sum()
    }

    fn counted(&self, place: usize) -> Vec<Counted> {
        let listed = self.filter(place, &["-L", "INPUT", "-v", "-x", "-n"]);
        listed
            .lines()
            .filter_map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                let from = words.iter().find(|word| word.starts_with("10.77."))?;
                Some(Counted {
                    packets: words.first()?.parse().ok()?,
                    bytes: words.get(1)?.parse().ok()?,
                    drops: words.contains(&"DROP"),
                    from: (*from).to_owned(),
                })
            })
            .collect()
    }
}

/// One line of what a place counted.
struct Counted {
    packets: u64,
    bytes: u64,
    drops: bool,
    from: String,
}

impl Drop for Network {
    fn drop(&mut self) {
        let places = (0..self.places).map(|place| self.at(place));
        for space in places.chain([self.space("bridge")]) {
            // What was never made cannot be removed.
            let _ = Command::new("ip").args(["netns", "del", &space]).output();
        }
    }
}

/// The address of a place.
pub(crate) fn address(place: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, u8::try_from(place + 1).unwrap())
}

/// At which port of their own machine clients find a datacenter.
pub(crate) fn door(dc: usize) -> u16 {
    9000 + u16::try_from(dc).unwrap()
}

fn address_of(place: usize) -> String {
    address(place).to_string()
}

fn ip(args: &[&str]) {
    said(Command::new("ip").args(args).output());
}

fn said(output: std::io::Result<Output>) -> String {
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Why there can be no such network here, if that is so.
pub(crate) fn obstacle() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("only root makes network name spaces".into());
    }
    let works = |program: &str, args: &[&str]| {
        Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
    };
    let name = format!("sluice{}-try", std::process::id());
    if !works("ip", &["netns", "add", &name]) {
        return Some(
            "`ip netns add` does not work: is iproute2 installed, and may this process do it?".into(),
        );
    }
    let rule = |args: &[&str]| works("ip", &[&["netns", "exec", &name, "iptables", "-w"], args].concat());
    let random = ["-m", "statistic", "--mode", "random", "--probability", "0.02"];
    let filters = rule(&[&["-A", "INPUT", "-s", "10.77.0.1"][..], &random, &["-j", "DROP"]].concat())
        && rule(&["-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE"]);
    let removed = works("ip", &["netns", "del", &name]);
    (!filters || !removed).then(|| "iptables cannot drop or redirect packets in a network name space".into())
}
