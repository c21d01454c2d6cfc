//! The generated code that is committed is what the `.proto` files give. `UPDATE=1 cargo test -p sluice-proto` writes
//! it anew.

use std::path::Path;

use protox::prost::Message;

const PEER: &str = "sluice/peer/v1/peer.proto";
const INGEST: &str = "sluice/v1/ingest.proto";

/// Compares what was made with what is kept, or keeps it.
fn check(file: &str, made: &[u8]) {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gen").join(file);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&kept, made).expect("a file that can be written");
    } else {
        let kept = std::fs::read(&kept).unwrap_or_default();
        assert!(kept == made, "{file} is out of date: run with UPDATE=1");
    }
}

#[test]
fn generated_code_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let made = tempfile::tempdir().unwrap();
    for (proto, codec, file) in [
        (PEER, "tonic_prost::ProstCodec", "sluice.peer.v1.rs"),
        (INGEST, "crate::codec::BoundedCodec", "sluice.v1.rs"),
    ] {
        let descriptors = protox::compile([proto], [root]).unwrap();
        tonic_prost_build::configure()
            .out_dir(made.path())
            .bytes(".")
            .btree_map(".")
            .codec_path(codec)
            .compile_fds(descriptors)
            .unwrap();
        check(file, &std::fs::read(made.path().join(file)).unwrap());
    }
}

#[test]
fn the_description_that_servers_give_of_themselves_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut compiler = protox::Compiler::new([root]).unwrap();
    compiler.include_source_info(false).include_imports(true).open_file(INGEST).unwrap();
    check("sluice.v1.binpb", &compiler.file_descriptor_set().encode_to_vec());
}
