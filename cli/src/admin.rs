//! `sluice admin`: what only who runs a cluster does.

mod drain;
mod key;
mod tenant;
mod token;

use crate::context::Context;

/// What to do.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Action {
    /// Keys and certificates of a cluster.
    #[command(subcommand)]
    Key(key::Action),
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

/// Does it.
pub(crate) async fn run(action: Action, context: &Context) -> anyhow::Result<()> {
    match action {
        Action::Drain(args) => drain::run(args, context).await,
        Action::Undrain(args) => drain::undrain(args, context).await,
        Action::Key(action) => key::run(action, context),
        Action::Token(action) => token::run(action, context).await,
        Action::Tenant(action) => tenant::run(action, context).await,
    }
}
