//! `sluice put`: send a file.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde_json::json;
use sluice_client::{
    Client, ClientError, FileStamp, Source, Unfinished, UnfinishedUploads, UploadOptions, Uploaded, WaitFor,
};
use sluice_engine::hash::Root;
use uuid::Uuid;

use crate::context::{Context, quoted};
use crate::failure::Failure;
use crate::progress::Progress;
use crate::settings::{Jobs, duration, state_dir};

const EXAMPLES: &str = "\
Prints the file's id. Running the same command again carries on where it stopped, with another
datacenter if need be; a file that changed since is refused. A pipe is read once: to carry on with
it, make the same stream again and name the id.

Examples:
  sluice put disk.img
  sluice put disk.img --to https://dc-a:8443 --to https://dc-b:8443 --jobs 16
  sluice put disk.img --home dc-b --wait assembled --expires 7d --meta project=x
  sluice put disk.img --expect $(b3sum --no-names disk.img)
  tar c src | sluice put - --name src.tar";

/// How much of a stream is read at once.
const STREAM_BUFFER: usize = 1 << 20;

/// What to send, and how.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The file to send; - for standard input. A pipe, a socket or a device is read to its end.
    file: PathBuf,

    /// Send to this URL; may be repeated. By default all that are configured.
    #[arg(long, value_name = "URL")]
    to: Vec<String>,

    /// The file's id, a UUID; by default a new one, or that of an unfinished upload of this file.
    #[arg(long, value_name = "UUID")]
    id: Option<Uuid>,

    /// The file's name; by default that of the file sent.
    #[arg(long)]
    name: Option<String>,

    /// The content type.
    #[arg(long, value_name = "TYPE", default_value = "")]
    content_type: String,

    /// User metadata; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    meta: Vec<(String, String)>,

    /// The datacenter that reassembles the file; by default the first that answers.
    #[arg(long, value_name = "DC")]
    home: Option<String>,

    /// The BLAKE3 hash that the file must have, as `b3sum` prints it.
    #[arg(long, value_name = "HEX")]
    expect: Option<Root>,

    /// Requests in flight at once; auto finds out how many make it faster, up to 32.
    #[arg(long, value_name = "N|auto")]
    jobs: Option<Jobs>,

    /// How long after the last progress the file expires, such as 7d; by default never.
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,

    /// What to wait for.
    #[arg(long, value_enum, default_value_t = Wait::Complete)]
    wait: Wait,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Wait {
    /// Every byte is in some datacenter, and the root is confirmed.
    Complete,
    /// The home has the whole file.
    Assembled,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        Some(_) | None => Err("expected KEY=VALUE".into()),
    }
}

impl Args {
    fn client(&self, context: &Context) -> anyhow::Result<Client> {
        context.client(|config| {
            if !self.to.is_empty() {
                config.urls = self.to.clone();
            }
            if let Some(jobs) = self.jobs {
                jobs.apply(config);
            }
        })
    }

    fn options(&self, path: &Path) -> anyhow::Result<UploadOptions> {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(UploadOptions {
            id: self.id,
            name: self.name.clone().unwrap_or(name),
            content_type: self.content_type.clone(),
            metadata: self.meta.iter().cloned().collect::<BTreeMap<_, _>>(),
            expires_in: match &self.expires {
                Some(text) => duration("--expires", text)?.as_secs(),
                None => 0,
            },
            expected_root: self.expect,
            home: self.home.clone(),
            wait: match self.wait {
                Wait::Complete => WaitFor::Complete,
                Wait::Assembled => WaitFor::Assembled,
            },
            ..UploadOptions::default()
        })
    }

    /// The command that carries on: this one, with the id it has by now.
    fn resume(&self, id: Uuid) -> String {
        let mut words = vec!["sluice".to_owned(), "put".to_owned(), quoted(&self.file.to_string_lossy())];
        let mut flag = |name: &str, value: &str| words.extend([name.to_owned(), quoted(value)]);
        for url in &self.to {
            flag("--to", url);
        }
        flag("--id", &id.to_string());
        if let Some(name) = &self.name {
            flag("--name", name);
        }
        if !self.content_type.is_empty() {
            flag("--content-type", &self.content_type);
        }
        for (key, value) in &self.meta {
            flag("--meta", &format!("{key}={value}"));
        }
        if let Some(home) = &self.home {
            flag("--home", home);
        }
        if let Some(root) = self.expect {
            flag("--expect", &root.to_string());
        }
        if let Some(jobs) = self.jobs {
            flag("--jobs", &jobs.to_string());
        }
        if let Some(expires) = &self.expires {
            flag("--expires", expires);
        }
        match self.wait {
            Wait::Complete => {}
            Wait::Assembled => flag("--wait", "assembled"),
        }
        words.join(" ")
    }

    /// Whether something was said that becomes part of the metadata record.
    fn describes(&self) -> bool {
        self.name.is_some()
            || !self.content_type.is_empty()
            || !self.meta.is_empty()
            || self.home.is_some()
            || self.expect.is_some()
            || self.expires.is_some()
    }
}

/// Sends the file.
pub(crate) async fn run(args: Args, context: &Context) -> anyhow::Result<()> {
    if let Some(input) = stream(&args.file).await? {
        return put_stream(args, input, context).await;
    }
    let client = args.client(context)?;
    let source = Source::open(&args.file)?;
    let path = args.file.canonicalize()?;
    let mut options = args.options(&path)?;
    let begun = begin(&client, &args, &path, &source, &mut options, context).await?;
    context.set_resume(args.resume(begun.upload.id));

    let progress = Progress::start("sent");
    let result = client.upload(&source, &options, progress.observer()).await;
    drop(progress);
    let uploaded = match result {
        Ok(uploaded) => uploaded,
        Err(error) => {
            // What was said this time may be wrong, and what was begun before may be right.
            if is_final(&error) && (begun.is_new || !args.describes()) {
                begun.notes.forget(&begun.upload.cluster, &path)?;
            }
            return Err(error.into());
        }
    };
    begun.notes.forget(&begun.upload.cluster, &path)?;
    answer(&uploaded, context)
}

/// Opens what is read once and has no length: standard input, a pipe, a device. `None` for a file.
async fn stream(path: &Path) -> anyhow::Result<Option<tokio::fs::File>> {
    let failed = |cause| ClientError::Source { path: path.to_owned(), cause };
    if path.as_os_str() == "-" {
        if std::io::stdin().is_terminal() {
            let hint = "pipe something into it, or name a file";
            return Err(Failure::usage("terminal", "standard input is a terminal", hint).into());
        }
        let stdin = std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
        return Ok(Some(tokio::fs::File::from_std(stdin.into())));
    }
    let kind = match std::fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        // Opening it says what is wrong.
        Err(_) => return Ok(None),
    };
    if kind.is_dir() {
        let name = path.display();
        let hint = format!("`tar c {name} | sluice put - --name NAME.tar` sends it as one file");
        return Err(
            Failure::usage("directory", format!("{name} is a directory, expected a file"), hint).into()
        );
    }
    if kind.is_file() {
        return Ok(None);
    }
    Ok(Some(tokio::fs::File::open(path).await.map_err(failed)?))
}

/// Sends a stream. Nothing is noted of it: another process cannot carry on by itself.
async fn put_stream(args: Args, mut input: tokio::fs::File, context: &Context) -> anyhow::Result<()> {
    input.set_max_buf_size(STREAM_BUFFER);
    let client = args.client(context)?;
    let id = args.id.unwrap_or_else(Uuid::now_v7);
    let options = UploadOptions { id: Some(id), is_new: args.id.is_none(), ..args.options(Path::new(""))? };
    let same_again = if args.file.as_os_str() == "-" { "… | " } else { "" };
    context.set_resume(format!("{same_again}{}", args.resume(id)));
    let progress = Progress::start_stream("sent");
    let result = client.upload_stream(input, &options, progress.observer()).await;
    drop(progress);
    answer(&result?, context)
}

/// An upload that is noted, so that another process can carry on.
struct Begun {
    notes: UnfinishedUploads,
    upload: Unfinished,
    /// Whether it was noted now, and not by an earlier process.
    is_new: bool,
}

/// Whether the upload can never be carried on: what was said or sent contradicts what stands.
fn is_final(error: &ClientError) -> bool {
    match error {
        ClientError::Dropped { .. }
        | ClientError::Conflict { .. }
        | ClientError::ExpectedRoot { .. }
        | ClientError::RootMismatch { .. }
        | ClientError::SizeDiffers { .. } => true,
        ClientError::Refused(refused) => matches!(refused.status, 400 | 409 | 410 | 413 | 422),
        _ => false,
    }
}

/// Finds the unfinished upload of this file, or notes a new one.
async fn begin(
    client: &Client,
    args: &Args,
    path: &Path,
    source: &Source,
    options: &mut UploadOptions,
    context: &Context,
) -> anyhow::Result<Begun> {
    let cluster = client.about().await?.cluster;
    let notes = UnfinishedUploads::at(state_dir()?.join("uploads"));
    let stamp = source.stamp().unwrap_or(FileStamp { size: source.size(), modified_ns: 0 });
    let found = match notes.find(&cluster, path, stamp) {
        // Another id was asked for: what was unfinished is left behind knowingly.
        Err(ClientError::ChangedSince { id, .. }) if args.id.is_some_and(|asked| asked != id) => None,
        found => found?.filter(|found| args.id.is_none_or(|asked| asked == found.id)),
    };
    if let Some(found) = found {
        context.remark(&format!("carrying on with {}", found.id));
        options.id = Some(found.id);
        if !args.describes() {
            said_before(options, &found)?;
        }
        return Ok(Begun { notes, upload: found, is_new: false });
    }
    let id = args.id.unwrap_or_else(Uuid::now_v7);
    options.is_new = args.id.is_none();
    let upload = Unfinished {
        cluster,
        path: path.to_owned(),
        stamp,
        id,
        create: options.create_file(id, Some(source.size())),
    };
    notes.remember(&upload)?;
    options.id = Some(id);
    Ok(Begun { notes, upload, is_new: true })
}

/// Says of the file what was said when it was created: a record never changes.
fn said_before(options: &mut UploadOptions, found: &Unfinished) -> anyhow::Result<()> {
    let create = found.create.clone();
    options.name = create.name;
    options.content_type = create.content_type;
    options.metadata = create.metadata;
    options.expires_in = create.expires_in;
    options.expected_root = create.expected_root.map(|root| root.parse()).transpose()?;
    options.home = create.home;
    Ok(())
}

fn answer(uploaded: &Uploaded, context: &Context) -> anyhow::Result<()> {
    let object = json!({
        "id": uploaded.id,
        "size": uploaded.size,
        "root": uploaded.root.to_string(),
        "state": uploaded.state.name(),
        "home": uploaded.home,
        "chunks_sent": uploaded.chunks_sent,
        "chunks_skipped": uploaded.chunks_skipped,
    });
    context.answer(&object, || uploaded.id.to_string())?;
    if !context.json {
        context.remark(&format!(
            "{}, home {}, root {}, {} chunks sent, {} skipped",
            uploaded.state.name(),
            uploaded.home,
            uploaded.root,
            uploaded.chunks_sent,
            uploaded.chunks_skipped
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn the_command_that_carries_on_says_the_same() {
        let line =
            ["put", "a b.img", "--home", "dc-b", "--meta", "k=v w", "--expires", "7d", "--wait", "assembled"];
        let args = Line::parse_from(line).args;
        assert_eq!(
            args.resume(Uuid::nil()),
            "sluice put 'a b.img' --id 00000000-0000-0000-0000-000000000000 --meta 'k=v w' --home dc-b \
             --expires 7d --wait assembled"
        );
        let options = args.options(Path::new("/x/a b.img")).unwrap();
        assert_eq!((options.name.as_str(), options.expires_in), ("a b.img", 7 * 86_400));
    }
}
