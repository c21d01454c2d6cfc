//! A peer datacenter and a client that were written from `docs/protocol.md`, in Python, beside one of ours.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use sluice::datacenter::DatacenterSettings;
use sluice_engine::share::Shares;

use crate::bed::{A, B, Bed, TENANT};

/// Ends the process with the test.
struct Script(Child);

impl Drop for Script {
    fn drop(&mut self) {
        // It has ended already unless the test failed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datacenter_in_python_completes_files_together_with_ours() {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("python");
    let prepared = Command::new(python.join("prepare")).output().unwrap();
    assert!(prepared.status.success(), "{}", String::from_utf8_lossy(&prepared.stderr));
    let interpreter = String::from_utf8(prepared.stdout).unwrap();

    let mut bed = Bed::divided(2, DatacenterSettings::default(), Shares::ONE);
    let keys = tempfile::tempdir().unwrap();
    bed.cluster.material().only(B).unwrap().save(keys.path()).unwrap();
    let mut script = Script(
        Command::new(interpreter.trim())
            .arg(python.join("check_datacenter.py"))
            .arg(keys.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut lines = BufReader::new(script.0.stdout.take().unwrap()).lines();
    let mut errors = script.0.stderr.take().unwrap();
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        errors.read_to_string(&mut text).map(|_| text)
    });
    let Some(Ok(first)) = lines.next() else { panic!("{}", errors.join().unwrap().unwrap()) };
    let port = serde_json::from_str::<Value>(&first).unwrap()["port"].as_u64().unwrap();
    bed.cluster.config_mut(A).unwrap().peers[0].address = format!("127.0.0.1:{port}");
    bed.cluster.start(A).await.unwrap();
    let config = bed.cluster.config(A).unwrap();
    let at = json!({
        "peer": config.ports.peer.address().to_string(),
        "url": config.url(),
        "admin": config.admin_url(),
        "token": bed.web.token(TENANT),
    });
    let mut stdin = script.0.stdin.take().unwrap();
    writeln!(stdin, "{at}").unwrap();
    let said = tokio::task::spawn_blocking(move || lines.map_while(Result::ok).collect::<Vec<_>>());
    let said = said.await.unwrap();
    let errors = errors.join().unwrap().unwrap();
    said.iter().for_each(|line| println!("{line}"));
    let status = script.0.wait().unwrap();
    assert!(status.success() && said.last().is_some_and(|line| line == "passed"), "{said:#?}\n{errors}");
}
