//! `sluice admin token`: tokens are made with the authority's keys, and ended by an operator's.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context as _;
use serde_json::json;
use sluice::datacenter::StartError;
use sluice_engine::context::Scope;
use sluice_engine::ids::{RevocationEpoch, TenantId, Timestamp};
use sluice_node::clock::{Clock, SystemClock};
use sluice_node::material::ClusterMaterial;
use sluice_node::token::{MAX_TOKEN_LEN, TokenGrant, UnverifiedToken};
use sluice_proto::http::Revoke;
use uuid::Uuid;

use crate::context::Context;
use crate::failure::Failure;
use crate::settings::duration;
use crate::size::{self, words};

const MINT_EXAMPLES: &str = "\
Examples:
  sluice admin token mint --keys keys/authority --tenant 7 --out alice.token
  sluice admin token mint --keys keys/authority --tenant 7 --scope read --life 1d --out reader.token
  sluice admin token mint --keys keys/authority --tenant 7 --quota 1TiB --quota-files 10000 --rate 50MiB --out bob.token
  sluice admin token mint --keys keys/authority --operator --life 1h --out operator.token";

const REVOKE_EXAMPLES: &str = "\
Voids a token, and what came of it, at once in the datacenter that answers, and in the others as soon as they hear of it;
also after restarts. SLUICE_TOKEN_FILE has to name an operator's token (`mint --operator`), not the one that is revoked.

Examples:
  SLUICE_TOKEN_FILE=operator.token sluice admin token revoke alice.token
  SLUICE_TOKEN_FILE=operator.token sluice admin token revoke --tenant 7 --id 0193e4a0-7b1c-7def-8123-456789abcdef";

/// What to do with tokens.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Action {
    /// Make a token.
    #[command(after_help = MINT_EXAMPLES)]
    Mint(Mint),
    /// What a token says. The token itself is not printed.
    Show {
        /// The file of the token.
        file: PathBuf,

        /// A directory of the cluster's keys: says whether the signature holds, too.
        #[arg(long, value_name = "DIR")]
        keys: Option<PathBuf>,
    },
    /// Void a token.
    #[command(after_help = REVOKE_EXAMPLES)]
    Revoke {
        /// The file of the token.
        #[arg(required_unless_present = "id", conflicts_with = "id")]
        file: Option<PathBuf>,

        /// Its id, as `show` prints it, if the token itself is not there.
        #[arg(long, value_name = "ID", requires = "tenant")]
        id: Option<Uuid>,

        /// Number of the tenant whose token it is.
        #[arg(long, value_name = "NUMBER", requires = "id")]
        tenant: Option<u64>,
    },
}

/// What a token is to be.
#[derive(Debug, clap::Args)]
pub(crate) struct Mint {
    /// The directory `authority` of the cluster's keys.
    #[arg(long, value_name = "DIR")]
    keys: PathBuf,

    /// Number of the tenant whose token it is.
    #[arg(long, value_name = "NUMBER", required_unless_present = "operator")]
    tenant: Option<u64>,

    /// Name of the tenant, for people.
    #[arg(long, value_name = "NAME", default_value = "")]
    name: String,

    /// What it allows; several may be given, by default all that a tenant may do.
    #[arg(long = "scope", value_name = "SCOPE", value_parser = scope)]
    scopes: Vec<Scope>,

    /// A token for who runs the cluster: it revokes tokens of any tenant, and reads and writes no file.
    #[arg(long, conflicts_with_all = ["tenant", "scopes", "quota", "quota_files", "rate"])]
    operator: bool,

    /// Bytes that the tenant may store in a datacenter, such as 1TiB; 0: no limit.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    quota: u64,

    /// Files that the tenant may have in a datacenter, unfinished and finished together, such as 10000; 0: no limit.
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    quota_files: u64,

    /// Bytes a second that the tenant may send to a datacenter and read from it, together, such as 50MiB; 0: no limit.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    rate: u64,

    /// Name of a datacenter where it may be used; several may be given, by default everywhere.
    #[arg(long = "dc", value_name = "NAME")]
    dcs: Vec<String>,

    /// How long it lives.
    #[arg(long, value_name = "TIME", default_value = "90d")]
    life: String,

    /// The file to write it to, for its owner only; must not exist yet.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

fn scope(text: &str) -> Result<Scope, String> {
    let names = Scope::OF_TENANTS.map(Scope::name).join(", ");
    // An operator's token is none of a tenant's.
    let scope = Scope::from_name(text).filter(|scope| Scope::OF_TENANTS.contains(scope));
    scope.ok_or_else(|| format!("expected one of {names}"))
}

/// Does it.
pub(crate) async fn run(action: Action, context: &Context) -> anyhow::Result<()> {
    match action {
        Action::Mint(args) => mint(args, context),
        Action::Show { file, keys } => show(&file, keys.as_deref(), context),
        Action::Revoke { file: Some(file), .. } => {
            let token = read(&file)?.1;
            let epoch = token.epoch.number().saturating_add(1);
            let (tenant, session) = (token.tenant.number(), Some(token.session.uuid()));
            revoke(Revoke { tenant, session, epoch: Some(epoch) }, context).await
        }
        Action::Revoke { file: None, id, tenant } => {
            // Both are there: clap asks for them.
            let revoked = Revoke { tenant: tenant.unwrap_or_default(), session: id, epoch: None };
            revoke(revoked, context).await
        }
    }
}

fn mint(args: Mint, context: &Context) -> anyhow::Result<()> {
    let material = ClusterMaterial::load(&args.keys).map_err(StartError::from)?;
    let mint = material.token_mint().map_err(|error| {
        Failure::usage("keys", error.to_string(), "give the directory authority, where all of the keys are")
    })?;
    let now = SystemClock.now();
    let tenant = TenantId::new(args.tenant.unwrap_or_default());
    let life = duration("life", &args.life)?;
    if life.as_secs() == 0 {
        let message = format!("life is {:?}, expected a second or more", args.life);
        return Err(Failure::usage("duration", message, "such as 90s, 15min or 7d").into());
    }
    let mut grant = TokenGrant::everything(tenant, args.name, life);
    if args.operator {
        grant.scopes = vec![Scope::Operate];
    } else if !args.scopes.is_empty() {
        grant.scopes = args.scopes;
    }
    (grant.quota, grant.quota_files, grant.rate) = (args.quota, args.quota_files, args.rate);
    grant.epoch = RevocationEpoch::new(now.number());
    for name in &args.dcs {
        grant.dcs.push(material.dc_named(name).ok_or_else(|| {
            let known: Vec<&str> = material.dcs().map(|(_, name)| name).collect();
            let hint = format!("the cluster has {}", known.join(", "));
            Failure::usage("dc", format!("no datacenter is called {name:?}"), hint)
        })?);
    }
    let token = mint.mint(&grant, now)?;
    let out = &args.out;
    let write = || -> io::Result<()> {
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(out)?;
        file.write_all(token.as_bytes())?;
        file.sync_all()
    };
    match write() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let message = format!("{} exists already", out.display());
            let hint = "tokens are never written over: name another";
            return Err(Failure::usage("exists", message, hint).into());
        }
        written => written.with_context(|| format!("cannot write {}", out.display()))?,
    }
    let id = UnverifiedToken::read(&token)?.session.uuid();
    context.answer(&json!({ "token_file": out, "tenant": tenant.number(), "id": id }), || {
        format!("{}\n", out.display())
    })
}

fn show(file: &Path, keys: Option<&Path>, context: &Context) -> anyhow::Result<()> {
    let (text, token) = read(file)?;
    let signature = match keys {
        None => "not checked: give --keys".to_owned(),
        Some(keys) => {
            let material = ClusterMaterial::load(keys).map_err(StartError::from)?;
            match material.token_verifier().verify(&text, SystemClock.now()) {
                Ok(_) => "holds, and the token counts now".to_owned(),
                Err(error) => error.to_string(),
            }
        }
    };
    let UnverifiedToken {
        cluster,
        tenant,
        tenant_name,
        session,
        scopes,
        quota,
        quota_files,
        rate,
        dcs,
        epoch,
        ..
    } = &token;
    let object = json!({
        "cluster": cluster, "tenant": tenant.number(), "name": tenant_name, "id": session.uuid(),
        "scopes": scopes, "quota": quota, "quota_files": quota_files, "rate": rate,
        "dcs": dcs.iter().map(|dc| dc.number()).collect::<Vec<_>>(),
        "epoch": epoch.number(), "begins": token.begins_at.number() / 1000, "ends": token.ends_at.number() / 1000,
        "signature": signature,
    });
    context.answer(&object, || {
        let limit = |bytes: u64, more: &str| match bytes {
            0 => "no limit".to_owned(),
            bytes => format!("{}{more}", words(bytes)),
        };
        let dcs = match &dcs[..] {
            [] => "all".to_owned(),
            some => some.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        };
        let lines = [
            ("cluster", cluster.clone()),
            ("tenant", format!("{} {tenant_name}", tenant.number()).trim_end().to_owned()),
            ("id", session.to_string()),
            ("scopes", scopes.join(", ")),
            ("quota", limit(*quota, "")),
            (
                "files",
                match quota_files {
                    0 => "no limit".to_owned(),
                    some => some.to_string(),
                },
            ),
            ("rate", limit(*rate, " a second")),
            ("dcs", dcs),
            ("begins", when(token.begins_at.number())),
            ("ends", when(token.ends_at.number())),
            ("signature", signature.clone()),
        ];
        lines.iter().map(|(name, value)| format!("{name:<10} {value}\n")).collect()
    })
}

/// Has tokens revoked, and says what came of it.
pub(super) async fn revoke(revoked: Revoke, context: &Context) -> anyhow::Result<()> {
    let done = context.client_for_questions()?.revoke(&revoked).await?;
    context.answer(&done, || {
        let what = match done.session {
            Some(session) => format!("token {session} of tenant {}", done.tenant),
            None => format!("all tokens of tenant {} from before {}", done.tenant, when(done.epoch)),
        };
        format!("revoked   {what}\nby        {}; the other datacenters are being told\n", done.dc)
    })
}

/// The token in a file, and what it says of itself.
fn read(file: &Path) -> anyhow::Result<(String, UnverifiedToken)> {
    let mut text = String::new();
    let opened = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    let longest = MAX_TOKEN_LEN as u64 + 2;
    opened
        .take(longest)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {}", file.display()))?;
    let token = UnverifiedToken::read(text.trim()).map_err(|error| {
        let message = format!("{}: {error}", file.display());
        Failure::usage("token", message, "give the file that `sluice admin token mint` wrote")
    })?;
    Ok((text.trim().to_owned(), token))
}

/// A moment in Unix milliseconds, for people.
pub(super) fn when(ms: u64) -> String {
    match UNIX_EPOCH.checked_add(Duration::from_millis(Timestamp::new(ms).number())) {
        // Later than the calendar of the library goes.
        Some(at) if ms < 253_402_300_800_000 => humantime::format_rfc3339_seconds(at).to_string(),
        Some(_) | None => "the end of time".to_owned(),
    }
}
