//! `sluice admin`: what only who runs a cluster does.

mod drain;
mod tenant;
mod token;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::json;
use sluice::datacenter::StartError;
use sluice_engine::ids::DcId;
use sluice_engine::share::Shares;
use sluice_node::material::ClusterMaterial;
use sluice_node::role::Role;

use crate::context::Context;
use crate::failure::Failure;

/// Where all of a cluster's keys are.
const AUTHORITY: &str = "authority";

const KEY_EXAMPLES: &str = "\
Makes a directory for each datacenter, with what that one needs and no secret of another's; in
`roles` one for each process of it that runs by itself, with what that role needs; and
`authority`, with all of it: keep that one where no server is. Certificates are those of a CA of
its own.

Examples:
  sluice admin key make keys --cluster prod --dc dc-a --dc dc-b
  scp -r keys/dc-a dc-a.example:/etc/sluice/keys";

const RENEW_EXAMPLES: &str = "\
Every certificate, and the key of each, is replaced in all directories that `make` made. The CA and
the keys of commands, contexts, tokens and tickets stay. Processes take new certificates over when
their files change; connections that are open stay.

Examples:
  sluice admin key renew keys
  rsync -r keys/dc-a/ dc-a.example:/etc/sluice/keys/";

/// What to do.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Action {
    /// Keys and certificates of a cluster.
    #[command(subcommand)]
    Key(KeyAction),
    /// Tokens, by which clients are let in.
    #[command(subcommand)]
    Token(token::Action),
    /// Tenants, whose tokens they are.
    #[command(subcommand)]
    Tenant(tenant::Action),
    /// Have a datacenter hand its work over to another.
    Drain(drain::Args),
    /// Have a datacenter that drains take its work up again.
    Undrain(drain::UndrainArgs),
}

/// What to do with keys.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum KeyAction {
    /// Make those of a new cluster.
    #[command(after_help = KEY_EXAMPLES)]
    Make {
        /// Where to; must not exist yet.
        directory: PathBuf,

        /// Name of the cluster.
        #[arg(long, value_name = "NAME")]
        cluster: String,

        /// Name of a datacenter; once for each of them.
        #[arg(long = "dc", value_name = "NAME", required = true)]
        dcs: Vec<String>,

        /// Into how many shares the files of each datacenter are divided among its aggregators: 1,
        /// 2, 4, … or 256. Several times as many as there may be aggregators.
        #[arg(long, value_name = "N", default_value = "1")]
        shares: u32,
    },
    /// Make its certificates anew.
    #[command(after_help = RENEW_EXAMPLES)]
    Renew {
        /// The directory that `make` made.
        directory: PathBuf,
    },
}

/// Does it.
pub(crate) async fn run(action: Action, context: &Context) -> anyhow::Result<()> {
    match action {
        Action::Drain(args) => drain::run(args, context).await,
        Action::Undrain(args) => drain::undrain(args, context).await,
        Action::Key(KeyAction::Make { directory, cluster, dcs, shares }) => {
            make(&directory, &cluster, &dcs, shares, context)
        }
        Action::Key(KeyAction::Renew { directory }) => renew(&directory, context),
        Action::Token(action) => token::run(action, context).await,
        Action::Tenant(action) => tenant::run(action, context).await,
    }
}

fn make(
    directory: &Path,
    cluster: &str,
    names: &[String],
    shares: u32,
    context: &Context,
) -> anyhow::Result<()> {
    if directory.exists() {
        let message = format!("{} exists already", directory.display());
        return Err(Failure::usage("keys-exist", message, "keys are never written over: name another").into());
    }
    let shares = Shares::new(shares)
        .map_err(|error| Failure::usage("shares", error.to_string(), "16 does for up to four aggregators"))?;
    let dcs: Vec<(DcId, &str)> = (1..).map(DcId::new).zip(names.iter().map(String::as_str)).collect();
    let material = ClusterMaterial::generate(cluster, &dcs)
        .map_err(|error| Failure::usage("keys", error.to_string(), "see `sluice admin key make --help`"))?
        .dividing(shares);
    save(&material, directory)?;
    let authority = directory.join(AUTHORITY);
    let ca = directory.join("ca.pem");
    fs::write(&ca, material.ca_pem()).with_context(|| format!("cannot write {}", ca.display()))?;
    let places: Vec<PathBuf> = names.iter().map(|name| directory.join(name)).collect();
    let object = json!({ "cluster": cluster, "dcs": places, "authority": authority, "ca": ca });
    context.answer(&object, || {
        let mut text = String::new();
        for (name, place) in names.iter().zip(&places) {
            text.push_str(&format!("{name:<9} {}\n", place.display()));
        }
        text + &format!("{:<9} {}\n{:<9} {}\n", "authority", authority.display(), "ca", ca.display())
    })
}

/// Writes all of it to `authority`, and to a directory of its own what each datacenter and each role needs.
fn save(material: &ClusterMaterial, directory: &Path) -> anyhow::Result<()> {
    material.save(&directory.join(AUTHORITY)).map_err(StartError::from)?;
    for (dc, name) in material.dcs() {
        let part = material.only(dc).map_err(StartError::from)?;
        part.save(&directory.join(name)).map_err(StartError::from)?;
        for role in Role::ALL {
            let part = material.only_role(dc, role).map_err(StartError::from)?;
            part.save(&directory.join("roles").join(name).join(role.name())).map_err(StartError::from)?;
        }
    }
    Ok(())
}

fn renew(directory: &Path, context: &Context) -> anyhow::Result<()> {
    // One that was cut short is made good by the next.
    let material = ClusterMaterial::load_keys(&directory.join(AUTHORITY)).map_err(|error| {
        Failure::usage("keys", error.to_string(), "give the directory that `sluice admin key make` made")
    })?;
    let reissued = material.reissued().map_err(StartError::from)?;
    save(&reissued, directory)?;
    let dcs: Vec<PathBuf> = material.dcs().map(|(_, name)| directory.join(name)).collect();
    context.answer(&json!({ "cluster": material.name(), "dcs": dcs }), || {
        let line = |place: &PathBuf| format!("{}\n", place.display());
        dcs.iter().map(line).collect()
    })
}
