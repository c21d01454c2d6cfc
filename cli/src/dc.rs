//! `sluice dc`: one whole datacenter in the foreground, from a file that says where everything is.

pub(crate) mod file;

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use sluice::datacenter::Datacenter;
use sluice_node::descriptors::raise_descriptors;
use sluice_node::telemetry;

use self::file::DcFile;
use crate::context::Context;
use crate::reload::{self, ConfigFile as _, Hangup};
use crate::role::not_begun;
use crate::signals::Signals;

const EXAMPLES: &str = "\
A file looks like this; what is left out of it has a default, paths are relative to the file:
  dc = \"dc-a\"                       # its name, as the keys have it
  keys = \"keys/dc-a\"                # made by `sluice admin key make`
  data = \"/var/lib/sluice\"         # or, instead of it, a bucket whose keys begin with \"dc-a/\":
    # store = { s3 = { endpoint = \"https://s3.example\", bucket = \"sluice\", region = \"eu\",
    #                  credentials = \"s3.toml\" } }   that file: key_id = \"...\" and secret = \"...\"
  url = \"https://dc-a.example:8443\" # where clients find it
  listen = { edge = \"0.0.0.0:8443\", peer = \"0.0.0.0:8444\", admin = \"127.0.0.1:9090\" }
                                    # and inside = \"0.0.0.0:8445\", for edges of other processes, and
                                    # for what other datacenters pass on
  memory = \"256MiB\"                 # for bodies in flight and chunks read ahead; half as much again with a bucket
  upload_rate = \"1GiB\"              # bytes a second of uploads that are taken; what is more waits,
                                    # or goes to a datacenter that has room
  scrub_rate = \"8MiB\"               # bytes a second at which what is stored is read again; 0: never
  takeover_after = \"10min\"          # unfinished files of a datacenter that is gone; or \"never\"
  absent_after = \"1min\"           # until what only such a datacenter has counts as missing
  redis = \"redis://cache.dc-a:6379\"    # for processes beside it, if there are any
  redis_password = \"redis-password\"    # the file of its password
  log = \"warn\"
  [peers.dc-b]
  address = \"dc-b.example:8444\"
  url = \"https://dc-b.example:8443\"
  workers = \"dc-b.example:8445\"     # what its own file calls inside; without it chunks are not passed
                                    # on, only clients sent there that follow
  sessions = \"dc-b.example:8446\"    # if its session services are processes of their own

Of a process that runs, log, memory, upload_rate, scrub_rate, keys and certificates are
taken over when the files change, at once at SIGHUP; one that makes no sense is logged, and nothing of it counts. All else
counts from the next start.

Examples:
  sluice config check /etc/sluice/dc-a.toml
  sluice dc --config /etc/sluice/dc-a.toml";

/// Which datacenter.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The file that describes it.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,

    /// How long requests in flight may take to finish, after a signal.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    stop_within: Duration,
}

/// Runs the datacenter until it is told to stop.
pub(crate) async fn run(args: Args, context: &Context) -> anyhow::Result<()> {
    let file = DcFile::read(&args.config)?;
    file.check()?;
    let telemetry = telemetry::init(file.log(), "dc", Some(file.dc())).map_err(not_begun)?;
    raise_descriptors();
    let config = file.reserve()?;
    let hangup = Hangup::listen()?;
    let (signals, datacenter) = Signals::start(Datacenter::start(&config)).await?;
    let object = json!({ "dc": config.name(), "url": config.url(), "admin": config.admin_url() });
    context.answer(&object, || {
        format!("{:<7} {}   admin {}\n", config.name(), config.url(), config.admin_url())
    })?;
    let _watching = reload::watch(args.config, file, telemetry.level(), datacenter.live().clone(), hangup);
    signals.serve_until(context, args.stop_within, |deadline| datacenter.stop(deadline)).await;
    telemetry.finish().await;
    Ok(())
}
