//! `sluice get`: read a file back, verified.

use std::io::ErrorKind;
use std::path::PathBuf;

use serde_json::json;
use sluice_client::{ByteRange, ClientError, DownloadOptions, Target};
use sluice_engine::hash::Root;
use uuid::Uuid;

use crate::context::{Context, quoted};
use crate::failure::Failure;
use crate::progress::Progress;
use crate::settings::Jobs;

const EXAMPLES: &str = "\
Every chunk is checked against the file's root before it is written. FILE.part becomes FILE when it
is whole; running the same command again keeps of FILE.part what is sound.

Examples:
  sluice get 0193e4a0-7b1c-7def-8123-456789abcdef              to a file of the same name here
  sluice get $id -o copy.img
  sluice get $id -o - | tar t
  sluice get $id --range 0-1048575 -o head.bin                 both ends included";

/// What to read, and where to.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The file's id.
    id: Uuid,

    /// Where to write it; - for standard output. By default the file's own name, here.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Only the bytes A to B, both included; A- for all from A on.
    #[arg(long, value_name = "A-B", value_parser = byte_range)]
    range: Option<ByteRange>,

    /// The root that the file must have.
    #[arg(long, value_name = "HEX")]
    expect: Option<Root>,

    /// Replace an existing file.
    #[arg(long)]
    force: bool,

    /// Requests in flight at once; auto finds out how many make it faster, up to 32.
    #[arg(long, value_name = "N|auto")]
    jobs: Option<Jobs>,
}

fn byte_range(text: &str) -> Result<ByteRange, String> {
    let parse = || {
        let (first, last) = text.split_once('-')?;
        let first = first.parse().ok()?;
        let last = if last.is_empty() { None } else { Some(last.parse().ok()?) };
        Some(ByteRange { first, last })
    };
    parse()
        .filter(|range| range.last.is_none_or(|last| range.first <= last))
        .ok_or_else(|| "expected A-B or A-".into())
}

/// Reads the file.
pub(crate) async fn run(args: Args, context: &Context) -> anyhow::Result<()> {
    let client = context.client(|config| {
        if let Some(jobs) = args.jobs {
            jobs.apply(config);
        }
    })?;
    let to_stdout = args.output.as_ref().is_some_and(|path| path.as_os_str() == "-");
    if to_stdout && context.json {
        let hint = "write to a file, or leave --json out";
        return Err(
            Failure::usage("usage", "standard output cannot take both the file and JSON", hint).into()
        );
    }
    let path = match args.output.clone() {
        Some(path) => path,
        None => own_name(&client.status(args.id).await?.name, args.id),
    };
    let target = if to_stdout {
        Target::Writer(Box::new(std::io::stdout()))
    } else {
        context.set_resume(resume(&args, &path));
        Target::File { path: path.clone(), replace: args.force }
    };
    let options = DownloadOptions { range: args.range, expected_root: args.expect };
    let progress = Progress::start("read");
    let result = client.download(args.id, target, &options, progress.observer()).await;
    drop(progress);
    let got = match result {
        // Whoever reads has read enough.
        Err(ClientError::Target { cause, .. }) if to_stdout && cause.kind() == ErrorKind::BrokenPipe => {
            return Ok(());
        }
        result => result?,
    };
    if to_stdout {
        return Ok(());
    }
    let object = json!({
        "id": got.id, "file": path, "bytes": got.bytes, "size": got.size, "root": got.root.to_string(),
        "chunks_fetched": got.chunks_fetched, "chunks_kept": got.chunks_kept,
    });
    context.answer(&object, || path.display().to_string())
}

/// The file's own name, if it is one that can be written here; a name is no path.
fn own_name(name: &str, id: Uuid) -> PathBuf {
    let is_plain = !name.is_empty() && !name.contains('/') && name != "." && name != ".." && name != "-";
    if is_plain { PathBuf::from(name) } else { PathBuf::from(id.to_string()) }
}

fn resume(args: &Args, path: &std::path::Path) -> String {
    let mut command = format!("sluice get {} -o {}", args.id, quoted(&path.to_string_lossy()));
    if let Some(ByteRange { first, last }) = args.range {
        let last = last.map(|last| last.to_string()).unwrap_or_default();
        command.push_str(&format!(" --range {first}-{last}"));
    }
    if let Some(root) = args.expect {
        command.push_str(&format!(" --expect {root}"));
    }
    if args.force {
        command.push_str(" --force");
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_from_elsewhere_stays_in_this_directory() {
        let id = Uuid::nil();
        assert_eq!(own_name("a.iso", id), PathBuf::from("a.iso"));
        for name in ["", "..", "/etc/passwd", "a/b", "-"] {
            assert_eq!(own_name(name, id), PathBuf::from(id.to_string()), "{name}");
        }
    }

    #[test]
    fn ranges_are_read_strictly() {
        assert_eq!(byte_range("3-9"), Ok(ByteRange { first: 3, last: Some(9) }));
        assert_eq!(byte_range("3-"), Ok(ByteRange { first: 3, last: None }));
        for text in ["", "3", "-3", "9-3", "a-b", "1-2-3"] {
            assert!(byte_range(text).is_err(), "{text}");
        }
    }
}
