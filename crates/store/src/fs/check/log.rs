//! Checking the log: every frame, and every record in it. Its index is a cache, and not looked at.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use sluice_engine::ids::FileId;
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::ranges::Ranges;

use super::{Check, FindingKind};
use crate::fs::log::Scan;
use crate::fs::volume::VolumeId;

/// What the newest record of a file says.
#[derive(Clone, Copy)]
struct Newest {
    segment: u64,
    /// The file's length, if its bytes are in the record.
    whole: Option<u32>,
}

impl Check<'_> {
    /// Looks at every segment. Files with an index are not the log's any more.
    /// Returns the others.
    pub(super) fn log(&mut self, volume: VolumeId, indexed: &BTreeSet<FileId>) -> BTreeSet<FileId> {
        let dir = self.layout.dir("log");
        let mut segments: BTreeMap<u64, String> = BTreeMap::new();
        for name in self.list(&dir) {
            let number = |prefix| name.strip_prefix(prefix).and_then(|rest: &str| rest.parse::<u64>().ok());
            match number("log-") {
                Some(segment) => {
                    segments.insert(segment, name);
                }
                None if number("run-").is_some() || name == "manifest" => {}
                None => self.unknown(&dir.join(&name)),
            }
        }
        let mut newest: HashMap<FileId, Newest> = HashMap::new();
        let last = segments.keys().last().copied();
        for (&number, name) in &segments {
            self.segment(volume, number, last == Some(number), &dir.join(name), &mut newest);
        }
        newest.retain(|file, _| !indexed.contains(file));
        for record in newest.values() {
            self.report.files += 1;
            if let Some(len) = record.whole {
                self.report.published += 1;
                self.report.chunks += u64::from(len).div_ceil(CHUNK_LEN);
                self.report.bytes += u64::from(len);
            }
        }
        newest.into_keys().collect()
    }

    fn segment(
        &mut self,
        volume: VolumeId,
        number: u64,
        is_last: bool,
        path: &Path,
        newest: &mut HashMap<FileId, Newest>,
    ) {
        let file = match self.open(path) {
            Ok(file) => file,
            Err(error) => return self.found(FindingKind::Unreadable, path, error),
        };
        let scan = Scan { volume, number, file: &file, is_last };
        let found = scan.run(0, &mut |front, place| {
            let whole = front.seal.map(|seal| seal.len);
            newest.insert(front.file, Newest { segment: place.segment, whole });
            Ok(())
        });
        match found {
            Ok(found) => {
                for (range, saved) in found.damaged {
                    let detail =
                        format!("bytes {} to {}: {saved} records of it are intact", range.start, range.end);
                    self.found(FindingKind::Log, path, detail);
                }
                if found.torn {
                    self.found(FindingKind::TornTail, path, format!("a frame at byte {} is torn", found.end));
                }
            }
            Err(error) => {
                // What this version cannot read counts as damaged, and with it what lies behind.
                newest.retain(|_, record| record.segment != number);
                self.add(FindingKind::Log, path, None, Ranges::new().iter().collect(), error.to_string());
            }
        }
    }
}
