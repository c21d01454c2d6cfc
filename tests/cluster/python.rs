//! A client in another language, made from `ingest.proto` alone, against real datacenters.

use std::process::Command;

use sluice_proto::http::{FilePage, State};

use crate::bed::{A, B, Bed, TENANT};
use crate::interpreter::{interpreter, root};

#[tokio::test(flavor = "multi_thread")]
async fn a_client_made_from_the_proto_alone_uploads_to_both_and_reads_back() {
    let bed = Bed::start(2).await;
    let directory = tempfile::tempdir().unwrap();
    let (ca, token) = (directory.path().join("ca.pem"), directory.path().join("token"));
    std::fs::write(&ca, bed.ca_pem()).unwrap();
    std::fs::write(&token, bed.token(TENANT)).unwrap();
    let urls = [bed.url(A).to_owned(), bed.url(B).to_owned()];
    let client = tokio::task::spawn_blocking(move || {
        let script = root().join("tests/python/check_ingest.py");
        let mut command = Command::new(interpreter());
        command.arg(script).arg("--ca").arg(ca).arg("--token").arg(token).args(urls).output().unwrap()
    });
    let client = client.await.unwrap();
    let said = String::from_utf8(client.stdout).unwrap();
    assert!(client.status.success(), "{said}{}", String::from_utf8_lossy(&client.stderr));
    println!("{said}");

    // What came in through one door is there at the other.
    let sent: Vec<Vec<&str>> = said.lines().map(|line| line.split(' ').collect()).collect();
    let uploaded = sent.iter().filter(|words| words[0] == "upload").count();
    assert_eq!(uploaded, 2, "{said}");
    for dc in [A, B] {
        let page: FilePage = bed.get(dc, "/files", &[]).await.json();
        for words in sent.iter().filter(|words| words[0] == "upload") {
            let file = page.files.iter().find(|file| file.id.to_string() == words[1]).unwrap();
            assert_eq!(file.root.as_deref(), Some(words[2]), "{file:?}");
            assert!([State::Complete, State::Assembled].contains(&file.state), "{file:?}");
        }
        let stored = bed.metric(dc, "sluice_chunks_total", r#"door="grpc",outcome="stored""#).await;
        assert!(stored > 0.0, "{dc} took its part");
    }
}
