//! Uploads that were begun and not finished, so that the same call carries on.
//!
//! One small JSON file per cluster and path, in a directory of the caller's choice, written atomically. It holds the
//! metadata that the file was created with, since a retry must say the very same. A file that changed since is
//! refused: half of one and half of the other would be neither.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sluice_engine::hash::Root;
use sluice_proto::http::CreateFile;
use uuid::Uuid;

use crate::error::ClientError;
use crate::part::write_atomically;
use crate::source::FileStamp;

/// An upload that was begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unfinished {
    /// Name of the cluster.
    pub cluster: String,
    /// The source's absolute path.
    pub path: PathBuf,
    /// What the source was then.
    pub stamp: FileStamp,
    /// The file's id.
    pub id: Uuid,
    /// What the file was created with.
    pub create: CreateFile,
}

/// The directory in which unfinished uploads are noted.
#[derive(Clone, Debug)]
pub struct UnfinishedUploads {
    dir: PathBuf,
}

impl UnfinishedUploads {
    /// The notes in `dir`, which is made when the first is written.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The upload of `path` that was not finished; [`ChangedSince`](ClientError::ChangedSince) if the file is not
    /// what it was then. A note that cannot be understood counts as none.
    pub fn find(
        &self,
        cluster: &str,
        path: &Path,
        stamp: FileStamp,
    ) -> Result<Option<Unfinished>, ClientError> {
        let note = self.note(cluster, path);
        let bytes = match fs::read(&note) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(ClientError::Source { path: note, cause }),
        };
        let Ok(found) = serde_json::from_slice::<Unfinished>(&bytes) else { return Ok(None) };
        if found.stamp == stamp {
            return Ok(Some(found));
        }
        let detail = if found.stamp.size == stamp.size {
            "its time of change is another".into()
        } else {
            format!("it had {} bytes and has {} now", found.stamp.size, stamp.size)
        };
        Err(ClientError::ChangedSince { path: path.to_owned(), id: found.id, detail })
    }

    /// Notes an upload, in place of any other of the same path.
    pub fn remember(&self, upload: &Unfinished) -> Result<(), ClientError> {
        let note = self.note(&upload.cluster, &upload.path);
        fs::create_dir_all(&self.dir)
            .and_then(|()| write_atomically(&note, &serde_json::to_vec_pretty(upload)?))
            .map_err(|cause| ClientError::Target { path: note, cause })
    }

    /// Forgets the upload of a path.
    pub fn forget(&self, cluster: &str, path: &Path) -> Result<(), ClientError> {
        let note = self.note(cluster, path);
        match fs::remove_file(&note) {
            Err(cause) if cause.kind() != ErrorKind::NotFound => {
                Err(ClientError::Target { path: note, cause })
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Forgets every upload of this id.
    pub fn forget_id(&self, id: Uuid) -> Result<(), ClientError> {
        let fail = |cause: io::Error| ClientError::Target { path: self.dir.clone(), cause };
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(cause) => return Err(fail(cause)),
        };
        for entry in entries {
            let path = entry.map_err(fail)?.path();
            let note =
                fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Unfinished>(&bytes).ok());
            if note.is_some_and(|note| note.id == id) {
                fs::remove_file(&path).map_err(fail)?;
            }
        }
        Ok(())
    }

    fn note(&self, cluster: &str, path: &Path) -> PathBuf {
        let key = [cluster.as_bytes(), b"\0", path.as_os_str().as_encoded_bytes()].concat();
        self.dir.join(format!("{}.json", Root::of_bytes(&key)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upload_is_found_until_it_is_forgotten_and_refused_once_changed() {
        let dir = tempfile::tempdir().unwrap();
        let notes = UnfinishedUploads::at(dir.path().join("new"));
        let stamp = FileStamp { size: 7, modified_ns: 99 };
        let id = Uuid::now_v7();
        let upload = Unfinished {
            cluster: "c".into(),
            path: "/a/b".into(),
            stamp,
            id,
            create: CreateFile { id: Some(id), size: Some(7), ..CreateFile::default() },
        };
        let path = Path::new("/a/b");
        assert_eq!(notes.find("c", path, stamp).unwrap(), None);
        notes.forget_id(id).unwrap();
        notes.remember(&upload).unwrap();
        assert_eq!(notes.find("c", path, stamp).unwrap(), Some(upload.clone()));
        assert_eq!(notes.find("d", path, stamp).unwrap(), None);
        let error = notes.find("c", path, FileStamp { size: 8, ..stamp }).unwrap_err();
        assert!(error.to_string().ends_with("it had 7 bytes and has 8 now"), "{error}");
        assert!(notes.find("c", path, FileStamp { modified_ns: 1, ..stamp }).is_err());
        notes.forget_id(Uuid::nil()).unwrap();
        assert!(notes.find("c", path, stamp).unwrap().is_some());
        notes.forget_id(id).unwrap();
        assert_eq!(notes.find("c", path, stamp).unwrap(), None);
        notes.remember(&upload).unwrap();
        notes.forget("c", path).unwrap();
        assert_eq!(notes.find("c", path, stamp).unwrap(), None);
    }
}
