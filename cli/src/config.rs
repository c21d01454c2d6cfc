//! `sluice config`: where settings come from, and whether a file of them is sound.

use std::path::PathBuf;

use serde_json::json;

use crate::context::Context;
use crate::dc::file::DcFile;
use crate::failure::Failure;
use crate::reload::ConfigFile as _;
use crate::role::file::RoleFile;
use crate::settings;

const EXAMPLES: &str = "\
Settings are taken from flags, then SLUICE_*, then $XDG_CONFIG_HOME/sluice/config.toml, then
/etc/sluice/config.toml. A file looks like this:
  url = [\"https://dc-a.example:8443\", \"https://dc-b.example:8443\"]
  token_file = \"/home/me/.sluice/token\"
  ca = \"/home/me/.sluice/ca.pem\"
  retry_for = \"5min\"
  jobs = \"auto\"";

/// What to do with settings.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Action {
    /// Check a file of settings, of a datacenter, or of one of its processes; names file and line of what is wrong.
    #[command(after_help = EXAMPLES)]
    Check {
        /// The file.
        file: PathBuf,
    },
    /// Every setting, and where it came from.
    #[command(after_help = EXAMPLES)]
    Show,
}

/// Does it.
pub(crate) fn run(action: Action, context: &Context) -> anyhow::Result<()> {
    match action {
        Action::Check { file } => {
            let table = settings::parse::<toml::Table>(&file, "")?;
            let has = |key| table.as_ref().is_some_and(|table| table.contains_key(key));
            if has("role") {
                RoleFile::read(&file)?.check()?;
            } else if has("dc") {
                DcFile::read(&file)?.check()?;
            } else if !settings::check(&file)? {
                let message = format!("{} does not exist", file.display());
                return Err(Failure::usage("configuration", message, "give the path of a file").into());
            }
            context.answer(&json!({ "file": file, "ok": true }), || format!("{}: ok", file.display()))
        }
        Action::Show => {
            let shown = context.settings()?.shown();
            context.answer(&json!({ "settings": shown }), || {
                let line = |setting: &settings::Shown| {
                    let value = setting.value.as_deref().unwrap_or("-");
                    format!("{:<11} {value}   ({})\n", setting.key, setting.from)
                };
                shown.iter().map(line).collect()
            })
        }
    }
}
