//! Draining a datacenter by the command line, as an operator does.

use crate::cluster::{Dev, run};
use crate::fake::noise;
use crate::{Ended, Home};

/// Runs a command of the operator's.
fn operate(home: &Home, args: &[&str]) -> Ended {
    let token = home.path("data/operator");
    run(home, &[args, &["--token-file", token.to_str().unwrap()]].concat())
}

#[test]
fn a_datacenter_is_drained_evacuated_and_taken_back() {
    let home = Home::new(None);
    let bytes = noise(2, (3 << 20) + 7);
    home.write("disk.img", &bytes);
    let dev = Dev::start(&home, &["--upload-rate", "dc-a=64MiB"]);
    let put = run(&home, &["put", "disk.img", "--wait", "assembled", "--home", "dc-a"]);
    assert_eq!(put.code, Some(0), "{}", put.stderr);
    let id = put.stdout.trim_end();

    let drain = ["admin", "drain", "dc-a", "--to", "dc-b"];
    let refused = run(&home, &drain);
    assert_eq!(refused.code, Some(4), "{}", refused.stderr);
    assert!(refused.stderr.contains("(forbidden)"), "{}", refused.stderr);
    let nowhere = operate(&home, &["admin", "drain", "dc-z", "--to", "dc-b"]);
    assert!(nowhere.code == Some(2) && nowhere.stderr.contains("there is no datacenter dc-z"));
    let itself = operate(&home, &["admin", "drain", "dc-a", "--to", "dc-a"]);
    assert!(
        itself.code == Some(2) && itself.stderr.contains("cannot hand over to itself"),
        "{}",
        itself.stderr
    );

    let data = operate(&home, &[&drain[..], &["--phase", "data", "--json"]].concat());
    assert_eq!((data.code, &data.json()["phase"]), (Some(0), &"data".into()), "{}", data.stderr);
    let status = run(&home, &["status"]);
    assert!(status.stdout.contains("drains: data to dc-b"), "{}", status.stdout);
    let back = operate(&home, &["admin", "drain", "dc-b", "--to", "dc-a"]);
    assert!(back.stderr.contains("dc-a is draining itself (precondition)"), "{}", back.stderr);

    let all = operate(&home, &[&drain[..], &["--evacuate"]].concat());
    assert_eq!(all.code, Some(0), "{}", all.stderr);
    for done in ["data      done", "sessions  done", "channels  done"] {
        assert!(all.stderr.contains(done), "{}", all.stderr);
    }
    assert!(all.stdout.contains("dc-a holds the sole copy of nothing"), "{}", all.stdout);
    let status = run(&home, &["status", id, "--json"]);
    assert_eq!(status.json()["home"], "dc-b");

    // Whoever comes anew, and knows of no other, is sent on as well.
    home.write("late.img", &noise(3, (2 << 20) + 9));
    for file in ["late.img", "disk.img"] {
        let late = run(&home, &["put", file, "--url", &dev.urls()[0], "--wait", "assembled"]);
        assert_eq!(late.code, Some(0), "{}", late.stderr);
        assert!(late.stderr.contains("home dc-b"), "{}", late.stderr);
    }

    let undrain = operate(&home, &["admin", "undrain", "dc-a"]);
    assert_eq!((undrain.code, undrain.stdout.as_str()), (Some(0), "dc-a      does not drain\n"));
    let get = run(&home, &["get", id, "-o", "copy"]);
    assert_eq!(get.code, Some(0), "{}", get.stderr);
    assert!(std::fs::read(home.path("copy")).unwrap() == bytes);
    drop(dev);
}
