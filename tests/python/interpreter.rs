//! The Python that tests run.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the project is.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Python with what `tests/python/requirements.txt` names, installed first if it is missing.
pub(crate) fn interpreter() -> String {
    let prepared = Command::new(root().join("tests/python/prepare")).output().unwrap();
    assert!(prepared.status.success(), "{}", String::from_utf8_lossy(&prepared.stderr));
    String::from_utf8(prepared.stdout).unwrap().trim().to_owned()
}
