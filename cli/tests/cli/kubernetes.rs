//! What `k8s` describes, run as it describes it.

use std::collections::BTreeSet;
use std::process::Command;

use crate::interpreter;

/// The metrics with this prefix that the dashboard asks for, as processes name them.
pub(crate) fn asked_by_the_dashboard(prefix: &str) -> BTreeSet<String> {
    let dashboard = interpreter::root().join("k8s/base/common/dashboard.json");
    let text = std::fs::read_to_string(dashboard).unwrap();
    let names = text.match_indices(prefix).map(|(at, _)| {
        let end = text[at..].find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap();
        text[at..at + end].to_owned()
    });
    names.collect()
}

/// What has to be there for it, on a machine whose network may be divided.
const PROGRAMS: [&str; 5] = ["kubectl", "ip", "iptables-restore", "prometheus", "redis-server"];

fn is_there(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
    found.is_ok_and(|found| found.status.success())
}

/// Why it cannot be run here, if it cannot.
fn lacking() -> Option<String> {
    let missing: Vec<&str> = PROGRAMS.into_iter().filter(|program| !is_there(program)).collect();
    if !missing.is_empty() {
        return Some(format!(
            "{} is missing: apt install iproute2 iptables prometheus redis-server; kubectl, which renders, is not Debian's: \
             https://kubernetes.io/docs/tasks/tools/",
            missing.join(", ")
        ));
    }
    (!rustix::process::geteuid().is_root()).then(|| "only root may divide the network".to_owned())
}

fn check(overlays: &[&str]) {
    if let Some(why) = lacking() {
        assert!(std::env::var_os("CI").is_none(), "{why}");
        eprintln!("not run: {why}");
        return;
    }
    let root = interpreter::root();
    let mut command = Command::new(interpreter::interpreter());
    command.arg(root.join("tests/python/check_kubernetes.py"));
    command.args(["--binary", env!("CARGO_BIN_EXE_sluice")]);
    command.args(overlays.iter().flat_map(|overlay| ["--overlay", *overlay]));
    let checked = command.output().unwrap();
    let said = String::from_utf8_lossy(&checked.stdout);
    println!("{said}");
    assert!(checked.status.success(), "{said}{}", String::from_utf8_lossy(&checked.stderr));
    if let Some(why) = said.lines().find(|line| line.starts_with("not run: ")) {
        assert!(std::env::var_os("CI").is_none(), "{why}");
        return;
    }
    assert!(said.ends_with("passed\n"), "{said}");
}

#[test]
fn two_datacenters_of_many_processes_are_restarted_under_load() {
    check(&["dc-a", "dc-b"]);
}

#[test]
fn two_datacenters_of_which_one_is_in_a_bucket_are_restarted_under_load() {
    check(&["dc-a-bucket", "dc-b"]);
}

#[test]
fn two_datacenters_of_one_process_each_are_restarted_under_load() {
    check(&["minimal"]);
}

#[test]
fn alerts_fire_when_they_should() {
    if !is_there("promtool") {
        assert!(std::env::var_os("CI").is_none(), "promtool is missing: apt install prometheus");
        eprintln!("not run: promtool is missing: apt install prometheus");
        return;
    }
    let rules = interpreter::root().join("k8s/rules");
    for args in [["check", "rules", "sluice.rules.yaml"], ["test", "rules", "sluice.test.yaml"]] {
        let ran = Command::new("promtool").args(args).current_dir(&rules).output().unwrap();
        let said =
            format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
        assert!(ran.status.success() && said.contains("SUCCESS"), "{said}");
    }
}
