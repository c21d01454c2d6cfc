//! `sluice edge` and `sluice session`: one role of a datacenter as a process, from a file that says where everything is.

pub(crate) mod file;

use std::path::PathBuf;

use serde_json::json;
use sluice_node::descriptors::raise_descriptors;
use sluice_node::role::Role;
use sluice_node::telemetry;

use self::file::RoleFile;
use crate::context::Context;
use crate::failure::Failure;
use crate::reload::{self, ConfigFile as _, Hangup};
use crate::signals::Signals;

pub(crate) const EDGE_EXAMPLES: &str = "\
An edge keeps nothing: run as many as you need, and stop or kill any of them at any time. Its
file looks like this; what is left out of it has a default, paths are relative to the file:
  role = \"edge\"
  dc = \"dc-a\"                          # the datacenter's name, as the keys have it
  keys = \"keys/roles/dc-a/edge\"        # made by `sluice admin key make`
  listen = \"0.0.0.0:8443\"              # where clients come in
  admin = \"127.0.0.1:9091\"             # /livez /startupz /readyz /metrics
  sessions = \"sessions.dc-a:8446\"      # each address of the name is a process
  workers = \"workers.dc-a:8445\"        # for `sluice dc` it is listen.inside of its file
  memory = \"256MiB\"                    # for bodies in flight
  log = \"warn\"

Of a process that runs, log, memory and certificates are taken over when the files change, at once
at SIGHUP; one that makes no sense is logged, and nothing of it counts. All else counts from the
next start.

Examples:
  sluice config check /etc/sluice/edge.toml
  sluice edge --config /etc/sluice/edge.toml";

pub(crate) const SESSION_EXAMPLES: &str = "\
A session service turns tokens into session contexts, for edges. It keeps nothing. Its file looks
like this:
  role = \"session\"
  dc = \"dc-a\"
  keys = \"keys/roles/dc-a/session\"     # made by `sluice admin key make`
  listen = \"0.0.0.0:8446\"              # where edges ask
  admin = \"127.0.0.1:9092\"
  log = \"warn\"

Examples:
  sluice session --config /etc/sluice/session.toml";

/// Which process.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The file that describes it.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// Runs a process of `role` until it is told to stop.
pub(crate) async fn run(role: Role, args: Args, context: &Context) -> anyhow::Result<()> {
    let file = RoleFile::read(&args.config)?;
    if file.role() != role {
        let message = format!("{} describes a process of role {}", args.config.display(), file.role());
        let hint = format!("run it with `sluice {} --config`", file.role());
        return Err(Failure::usage("configuration", message, hint).into());
    }
    let log = telemetry::init(file.log())
        .map_err(|error| Failure::usage("configuration", error.to_string(), "such as warn or info"))?;
    raise_descriptors();
    let hangup = Hangup::listen()?;
    let (signals, process) = Signals::start(file.start()).await?;
    let (listen, admin) = (process.address().to_string(), format!("http://{}", process.admin_address()));
    let object = json!({ "role": role.name(), "listen": listen, "admin": admin });
    context.answer(&object, || format!("{role:<10} {listen}   admin {admin}\n"))?;
    let _watching = reload::watch(args.config, file, log, process.live().clone(), hangup);
    signals.serve_until(context, |deadline| process.stop(deadline)).await;
    Ok(())
}
