//! `sluice admin tenant`: where a tenant stands, and the end of all its tokens.

use sluice_proto::http::Revoke;

use super::token::{revoke, when};
use crate::context::Context;
use crate::size::words;

const REVOKE_EXAMPLES: &str = "\
Voids every token of the tenant that was minted until now, at once in the datacenter that answers, and in the others as
soon as they hear of it; also after restarts. Tokens that are minted later count. SLUICE_TOKEN_FILE has to name an
operator's token.

Examples:
  sluice admin token mint --keys keys/authority --operator --life 1h --out operator.token
  SLUICE_TOKEN_FILE=operator.token sluice admin tenant revoke 7";

/// What to do with tenants.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Action {
    /// What the datacenter that answers knows of a tenant; needs an operator's token.
    Show {
        /// Number of the tenant.
        tenant: u64,
    },
    /// Void all tokens of a tenant.
    #[command(after_help = REVOKE_EXAMPLES)]
    Revoke {
        /// Number of the tenant.
        tenant: u64,
    },
}

/// Does it.
pub(crate) async fn run(action: Action, context: &Context) -> anyhow::Result<()> {
    match action {
        Action::Show { tenant } => show(tenant, context).await,
        Action::Revoke { tenant } => revoke(Revoke { tenant, session: None, epoch: None }, context).await,
    }
}

async fn show(tenant: u64, context: &Context) -> anyhow::Result<()> {
    let status = context.client_for_questions()?.tenant(tenant).await?;
    context.answer(&status, || {
        let before = match status.revoked_before {
            0 => "none".to_owned(),
            epoch => format!("those minted before {}", when(epoch)),
        };
        format!(
            "tenant    {}   says {}\nstored    {}\nfiles     {}\nrevoked   {before}, and {} one by one\n",
            status.tenant,
            status.dc,
            words(status.stored_bytes),
            status.files,
            status.revoked_sessions
        )
    })
}
