//! The whole program once, small: against a real `sluice dev`, with what it prints and what it leaves behind.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// Next to this program, where a build of the workspace has put it; `loadtest` builds it if it is not there.
fn sluice() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_BIN_EXE_loadtest")).with_file_name("sluice");
    path.is_file().then_some(path)
}

fn loadtest(dir: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loadtest"));
    command.arg("--json").args(arguments).arg("--dir").arg(dir);
    if let Some(sluice) = sluice() {
        command.arg("--sluice").arg(sluice);
    }
    command.output().unwrap()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).unwrap().next().is_none()
}

#[test]
fn a_run_measures_draws_and_leaves_nothing() {
    let (dir, plots) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let svg = plots.path().join("run.svg");
    for door in ["http1", "http2", "grpc"] {
        let output = loadtest(
            dir.path(),
            &["run", "--size", "70MiB", "--files", "2", "--door", door, "--svg", svg.to_str().unwrap()],
        );
        let report = json(&output);
        assert_eq!(report["verified"], true);
        assert_eq!(report["upload"]["bytes"], 140 << 20);
        for direction in ["upload", "download"] {
            let of = |name: &str| report[direction][name].as_f64().unwrap();
            assert!(of("server_cpu_s_per_gib") > 0.0, "{report}");
            assert!(of("peak_rss_bytes") > 1e6, "{report}");
            let server = report[direction]["cost"]["server"]["user"].as_f64().unwrap();
            let machine = report[direction]["cost"]["machine"]["user"].as_f64().unwrap();
            // Both are counted in ticks of a hundredth of a second, read one after the other.
            assert!(server <= machine + 0.05, "the server is a part of the machine: {report}");
        }
        assert!(report["acknowledgement_ms"]["p99"].as_f64() >= report["acknowledgement_ms"]["p50"].as_f64());
        let traffic = &report["between_dcs"];
        assert!(traffic["commands"].as_u64() > Some(0), "{report}");
        assert_eq!(traffic["command_bytes"].as_u64(), traffic["commands"].as_u64().map(|n| n * 160));
        assert!(std::fs::read_to_string(&svg).unwrap().contains("</svg>"));
        assert!(is_empty(dir.path()), "something was left behind");
    }
}

#[test]
fn idle_connections_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let report = json(&loadtest(dir.path(), &["idle", "--connections", "100"]));
    assert_eq!(report["connections"], 100);
    assert!(report["kept_kib"].as_f64() > Some(0.0), "{report}");
    assert!(is_empty(dir.path()));
}

/// Like `loadtest … | head`, when `head` has seen enough.
#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loadtest"));
    command.args(["ledger", "--size", "65GiB"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    drop(process.stdout.take());
    let output = process.wait_with_output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn what_has_no_room_is_refused_before_it_begins() {
    let dir = tempfile::tempdir().unwrap();
    let output = loadtest(dir.path(), &["run", "--size", "34PiB"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("use a smaller --size"));
    assert!(is_empty(dir.path()));
}

/// A signal ends the server, too, and its data with it.
#[test]
fn an_interrupted_run_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_loadtest"));
    command.args(["run", "--size", "64MiB", "--files", "16", "--dir"]).arg(dir.path());
    if let Some(sluice) = sluice() {
        command.arg("--sluice").arg(sluice);
    }
    let mut process = command.spawn().unwrap();
    // Until the server has written something.
    let data = || walk(dir.path()).into_iter().any(|path| path.ends_with("env"));
    while !data() {
        assert!(process.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let pid = rustix::process::Pid::from_raw(i32::try_from(process.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(130));
    assert!(is_empty(dir.path()), "{:?}", walk(dir.path()));
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[test]
fn roles_are_measured_in_one_process_and_in_four() {
    let dir = tempfile::tempdir().unwrap();
    let report = json(&loadtest(dir.path(), &["roles", "--size", "70MiB", "--pairs", "1"]));
    for direction in ["upload", "download"] {
        let of = |name: &str| report[direction][name].as_f64().unwrap();
        assert!(of("one_process") > 0.0 && of("processes") > 0.0 && of("ratio") > 0.0, "{report}");
        assert_eq!(report[direction]["roles"].as_array().unwrap().len(), 4, "{report}");
    }
    assert!(is_empty(dir.path()), "something was left behind");
}

#[test]
fn a_datacenter_in_a_bucket_is_measured_beside_its_server() {
    // It says that it is not installed, or fails in CI.
    if sluice_fault_s3::Garage::start().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let report = json(&loadtest(dir.path(), &["bucket", "--size", "64MiB", "--runs", "1"]));
    assert_eq!(report["layout"], "one-process", "{report}");
    for row in report["work"].as_array().unwrap() {
        let of = |name: &str| row[name].as_f64().unwrap();
        assert!(of("sluice") > 0.0 && of("server") > 0.0 && of("ratio") > 0.0, "{report}");
    }
    let [upload, download] = [&report["requests"][0], &report["requests"][1]];
    let of = |name: &str| upload[name].as_f64().unwrap();
    // What is asked now and then without any file may fall into one of the two.
    assert!((of("per_8_mib") - 2.0).abs() < 0.5 && of("per_file") < 20.0, "{report}");
    // One for each eight chunks, and for values as many as there are connections, or fewer.
    let got = download["kinds"]["GetObject"].as_f64().unwrap();
    assert!((8.0..=24.0).contains(&got), "{report}");
    assert!(is_empty(dir.path()), "something was left behind");
}

#[test]
fn a_datacenter_in_a_bucket_is_measured_with_each_role_in_a_process_of_its_own() {
    // It says that it is not installed, or fails in CI.
    if sluice_fault_s3::Garage::start().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let report = json(&loadtest(dir.path(), &["bucket", "--apart", "--size", "64MiB", "--runs", "1"]));
    assert_eq!(report["layout"], "apart", "{report}");
    for row in report["work"].as_array().unwrap() {
        let processes = row["processes"].as_object().unwrap();
        let spent = |name: &str| processes[name].as_f64().unwrap();
        let names = ["aggregator", "edge", "keeper", "porter", "session"];
        assert!(processes.len() == names.len() && spent("edge") > 0.0 && spent("porter") > 0.0, "{report}");
        let sum: f64 = names.into_iter().map(spent).sum();
        assert!((row["sluice"].as_f64().unwrap() - sum).abs() < 1e-6, "{report}");
        assert!(row["server"].as_f64().unwrap() > 0.0, "{report}");
    }
    let [upload, download] = [&report["requests"][0], &report["requests"][1]];
    // The porter puts what comes, and the keeper has it copied: of either alone it would be one.
    assert!((upload["per_8_mib"].as_f64().unwrap() - 2.0).abs() < 0.8, "{report}");
    // The porter gets what is downloaded, and the keeper its values.
    let got = download["kinds"]["GetObject"].as_f64().unwrap();
    assert!((8.0..=24.0).contains(&got), "{report}");
    assert!(is_empty(dir.path()), "something was left behind");
}
