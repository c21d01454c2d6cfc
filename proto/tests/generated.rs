//! The generated code that is committed is what the `.proto` files give. `UPDATE=1 cargo test -p sluice-proto` writes
//! it anew.

use std::path::Path;

#[test]
fn generated_code_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let made = tempfile::tempdir().unwrap();
    let descriptors = protox::compile(["sluice/peer/v1/peer.proto"], [root]).unwrap();
    tonic_prost_build::configure().out_dir(made.path()).bytes(".").compile_fds(descriptors).unwrap();
    let file = "sluice.peer.v1.rs";
    let (made, kept) = (made.path().join(file), root.join("src/gen").join(file));
    let new = std::fs::read_to_string(made).unwrap();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&kept, new).unwrap();
    } else {
        assert!(std::fs::read_to_string(&kept).unwrap() == new, "{file} is out of date: run with UPDATE=1");
    }
}
