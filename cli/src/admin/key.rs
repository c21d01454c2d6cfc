//! `sluice admin key`: the keys and certificates of a cluster, and what takes their place.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::json;
use sluice::datacenter::StartError;
use sluice_engine::ids::DcId;
use sluice_engine::share::Shares;
use sluice_node::material::{ClusterMaterial, KeyKind, MaterialError, Stage};
use sluice_node::role::Role;

use crate::context::Context;
use crate::failure::Failure;

/// Where all of a cluster's keys are.
const AUTHORITY: &str = "authority";

/// What clients trust.
const CA: &str = "ca.pem";

const MAKE_EXAMPLES: &str = "\
Makes a directory for each datacenter, with what that one needs and no secret of another's; in
`roles` one for each process of it that runs by itself, with what that role needs; and
`authority`, with all of it: keep that one where no server is. Certificates are those of a CA of
its own.

Examples:
  sluice admin key make keys --cluster prod --dc dc-a --dc dc-b
  scp -r keys/dc-a dc-a.example:/etc/sluice/keys";

const RENEW_EXAMPLES: &str = "\
Every certificate, and the key of each, is replaced in all directories that `make` made. The CA and
the keys of commands, contexts, tokens and tickets stay: see `rotate`. Processes take new certificates over when
their files change; connections that are open stay.

Examples:
  sluice admin key renew keys
  rsync -r keys/dc-a/ dc-a.example:/etc/sluice/keys/";

const ROTATE_EXAMPLES: &str = "\
Keys are given up in three steps, without a restart and without a request that fails. Each step is
one run of this, after which the directories are copied to where they belong, and
`sluice_keys_revision` in the metrics of every process of every datacenter becomes what was printed:

  1. New keys are made. Everybody knows them, nobody uses them. For `ca`: give ca.pem to clients.
  2. The new keys are used, and the old ones still count. For `tokens`: mint everybody's anew. For
     `contexts`: wait five more minutes.
  3. The old keys end. What is signed with them is refused, whenever it was signed; what began with
     a token that ended goes on for five minutes at the most.

Whoever has not yet taken over a step is understood, and understands, as long as others are one step
away. Tokens and the CA concern clients, so they have to be named.

Examples:
  sluice admin key rotate keys
  sluice admin key rotate keys --kind tokens,ca
  rsync -r keys/dc-a/ dc-a.example:/etc/sluice/keys/";

/// What to do with keys.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Action {
    /// Make those of a new cluster.
    #[command(after_help = MAKE_EXAMPLES)]
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
    /// Make the next step in giving keys up for new ones.
    #[command(after_help = ROTATE_EXAMPLES)]
    Rotate {
        /// The directory that `make` made.
        directory: PathBuf,

        /// Which keys: commands, contexts, tokens, tickets, ca. All have to be at the same step.
        #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = kind,
              default_value = "commands,contexts,tickets")]
        kind: Vec<KeyKind>,
    },
    /// Where the rotations of its keys stand.
    Show {
        /// The directory that `make` made, or one of those in it.
        directory: PathBuf,
    },
}

/// Does it.
pub(super) fn run(action: Action, context: &Context) -> anyhow::Result<()> {
    match action {
        Action::Make { directory, cluster, dcs, shares } => make(&directory, &cluster, &dcs, shares, context),
        Action::Renew { directory } => renew(&directory, context),
        Action::Rotate { directory, kind } => rotate(&directory, &kind, context),
        Action::Show { directory } => show(&directory, context),
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
    let (authority, ca) = (directory.join(AUTHORITY), directory.join(CA));
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
    // For clients: there all the time, whoever reads it.
    let (new, ca) = (directory.join(".ca.pem.new"), directory.join(CA));
    let written = fs::write(&new, material.ca_pem()).and_then(|()| fs::rename(&new, &ca));
    written.with_context(|| format!("cannot write {}", ca.display()))
}

/// What is wrong with a directory that should hold keys.
fn unreadable(error: MaterialError) -> Failure {
    Failure::usage("keys", error.to_string(), "give the directory that `sluice admin key make` made")
}

fn renew(directory: &Path, context: &Context) -> anyhow::Result<()> {
    // One that was cut short is made good by the next.
    let material = ClusterMaterial::load_keys(&directory.join(AUTHORITY)).map_err(unreadable)?;
    let reissued = material.reissued().map_err(StartError::from)?;
    save(&reissued, directory)?;
    let dcs: Vec<PathBuf> = material.dcs().map(|(_, name)| directory.join(name)).collect();
    context.answer(&json!({ "cluster": material.name(), "dcs": dcs }), || {
        let line = |place: &PathBuf| format!("{}\n", place.display());
        dcs.iter().map(line).collect()
    })
}

/// A kind of keys, by its name.
fn kind(name: &str) -> Result<KeyKind, String> {
    KeyKind::from_name(name).ok_or_else(|| {
        let names: Vec<&str> = KeyKind::ALL.iter().map(|kind| kind.name()).collect();
        format!("expected some of {}", names.join(", "))
    })
}

/// What a rotation has come to, in words.
const fn standing(stage: Option<Stage>) -> &'static str {
    match stage {
        None => "one key",
        Some(Stage::Next) => "the next key is known, and not used yet",
        Some(Stage::Previous) => "the new key is used, and the previous one still counts",
    }
}

/// What to do before the step that follows.
fn then(kinds: &[KeyKind], stage: Option<Stage>) -> String {
    let also = |kind, text| if kinds.contains(&kind) { text } else { "" };
    match stage {
        Some(Stage::Next) => {
            let ca = also(KeyKind::Ca, ", and clients have the new ca.pem");
            format!("once every process has this revision{ca}: run this again, and the new keys are used")
        }
        Some(Stage::Previous) => {
            let tokens = also(KeyKind::Tokens, ", and everybody has a new token");
            let contexts = also(KeyKind::Contexts, " for five minutes");
            format!(
                "once every process has this revision{contexts}{tokens}: run this again, and the old keys end"
            )
        }
        None => "the old keys ended: what is signed with them is refused by whoever has this revision".into(),
    }
}

/// The directories, and the certificates for clients, that are not of the revision of the authority: a step was cut short.
fn behind(material: &ClusterMaterial, directory: &Path) -> Vec<PathBuf> {
    let names = material.dcs().flat_map(|(_, name)| {
        let roles = Role::ALL.map(|role| directory.join("roles").join(name).join(role.name()));
        std::iter::once(directory.join(name)).chain(roles)
    });
    let is_behind = |place: &PathBuf| {
        ClusterMaterial::load_keys(place).map(|part| part.revision()).ok() != Some(material.revision())
    };
    let ca = directory.join(CA);
    let others = fs::read_to_string(&ca).ok() != Some(material.ca_pem());
    names.filter(is_behind).chain(others.then_some(ca)).collect()
}

/// All that the authority has. A step of the CA that was cut short may have left a certificate without its key.
fn authority(directory: &Path) -> Result<ClusterMaterial, Failure> {
    let place = directory.join(AUTHORITY);
    ClusterMaterial::load(&place).or_else(|error| {
        let keys = ClusterMaterial::load_keys(&place).map_err(|_| unreadable(error))?;
        keys.reissued().map_err(unreadable)
    })
}

fn rotate(directory: &Path, kinds: &[KeyKind], context: &Context) -> anyhow::Result<()> {
    let material = authority(directory)?;
    // Processes never see two steps at once: one that was cut short is finished before there is another.
    let behind = behind(&material, directory);
    if !behind.is_empty() {
        save(&material, directory)?;
        let revision = material.revision();
        let object = json!({ "revision": revision, "finished": behind });
        return context.answer(&object, || {
            let line = |place: &PathBuf| format!("{}\n", place.display());
            let places: String = behind.iter().map(line).collect();
            format!(
                "revision  {revision}: a step that was cut short is finished, and no other was made\n{places}"
            )
        });
    }
    let stage = kinds.first().and_then(|kind| material.stage(*kind));
    if let Some(other) = kinds.iter().find(|kind| material.stage(**kind) != stage) {
        let hint = "name those that stand where the others do: `sluice admin key show` tells";
        let message = format!("{other} and {} are at different steps of their rotations", kinds[0]);
        return Err(Failure::usage("rotation", message, hint).into());
    }
    let rotated = material.rotated(kinds).map_err(StartError::from)?;
    save(&rotated, directory)?;
    let (stage, revision) = (rotated.stage(kinds[0]), rotated.revision());
    let names: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
    let object = json!({ "revision": revision, "kinds": names, "stage": stage.map(Stage::name) });
    context.answer(&object, || {
        let (standing, then) = (standing(stage), then(kinds, stage));
        format!("revision  {revision}\n{}: {standing}\nnext      {then}\n", names.join(", "))
    })
}

fn show(directory: &Path, context: &Context) -> anyhow::Result<()> {
    let authority = directory.join(AUTHORITY);
    let place = if authority.exists() { &authority } else { directory };
    let material = ClusterMaterial::load_keys(place).map_err(unreadable)?;
    let stages = KeyKind::ALL.map(|kind| (kind.name(), material.stage(kind)));
    let rotation: BTreeMap<_, _> =
        stages.iter().map(|(kind, stage)| (kind, stage.map(Stage::name))).collect();
    let behind = if *place == authority { behind(&material, directory) } else { Vec::new() };
    let object = json!({
        "cluster": material.name(), "revision": material.revision(), "rotation": rotation, "behind": behind,
    });
    context.answer(&object, || {
        let line = |(kind, stage): &(&str, _)| format!("{kind:<9} {}\n", standing(*stage));
        let late =
            |place: &PathBuf| format!("behind    {}: run `sluice admin key rotate` again\n", place.display());
        let stages: String = stages.iter().map(line).collect();
        format!("revision  {}\n{stages}{}", material.revision(), behind.iter().map(late).collect::<String>())
    })
}
