//! Settings: flags over `SLUICE_*` over `$XDG_CONFIG_HOME/sluice/config.toml` over `/etc/sluice/config.toml`.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use etcetera::BaseStrategy;
use figment::Figment;
use figment::providers::{Env, Format, Serialized, Toml};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sluice_client::{ClientConfig, Token};
use sluice_redis::RedisConfig;

use crate::failure::Failure;

const SYSTEM_FILE: &str = "/etc/sluice/config.toml";

/// Flags that every command takes.
#[derive(Clone, Debug, Default, Args, Serialize)]
#[command(next_help_heading = "Cluster")]
pub(crate) struct Flags {
    /// Where a datacenter's edge answers; several separated by commas [SLUICE_URL]
    #[arg(long, global = true, value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,

    /// File that holds the bearer token [SLUICE_TOKEN_FILE]
    #[arg(long, global = true, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    token_file: Option<PathBuf>,

    /// File of the certificates to trust, in PEM [SLUICE_CA]
    #[arg(long, global = true, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    ca: Option<PathBuf>,

    /// How long to go on while no datacenter answers [SLUICE_RETRY_FOR]
    #[arg(long, global = true, value_name = "TIME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_for: Option<String>,
}

impl Flags {
    /// Those that were given, and what they say.
    pub(crate) fn given(&self) -> Vec<(&'static str, String)> {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let Self { url, token_file, ca, retry_for } = self;
        let flags = [
            ("--url", url.clone()),
            ("--token-file", path(token_file)),
            ("--ca", path(ca)),
            ("--retry-for", retry_for.clone()),
        ];
        flags.into_iter().filter_map(|(flag, value)| value.map(|value| (flag, value))).collect()
    }
}

/// What a file of settings may say; every key may be absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Values {
    url: Option<Urls>,
    token_file: Option<PathBuf>,
    ca: Option<PathBuf>,
    retry_for: Option<String>,
    jobs: Option<Jobs>,
}

/// Requests in flight at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "NumberOrText")]
pub(crate) enum Jobs {
    /// As many as make it faster.
    Auto,
    /// So many.
    Fixed(usize),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrText {
    Number(usize),
    Text(String),
}

impl TryFrom<NumberOrText> for Jobs {
    type Error = String;

    fn try_from(value: NumberOrText) -> Result<Self, String> {
        match value {
            NumberOrText::Number(number) => Ok(Self::Fixed(number)),
            NumberOrText::Text(text) => text.parse(),
        }
    }
}

impl FromStr for Jobs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            _ => text.parse().map(Self::Fixed).map_err(|_| "expected auto or a number".into()),
        }
    }
}

impl fmt::Display for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(number) => number.fmt(f),
        }
    }
}

impl Jobs {
    /// Tells a client.
    pub(crate) fn apply(self, config: &mut ClientConfig) {
        match self {
            Self::Auto => config.adaptive = true,
            Self::Fixed(number) => (config.jobs, config.adaptive) = (number, false),
        }
    }
}

/// One URL, several separated by commas, or a list.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
enum Urls {
    Text(String),
    List(Vec<String>),
}

impl Urls {
    fn into_list(self) -> Vec<String> {
        let texts = match self {
            Self::Text(text) => text.split(',').map(str::to_owned).collect(),
            Self::List(list) => list,
        };
        texts.into_iter().map(|url| url.trim().to_owned()).filter(|url| !url.is_empty()).collect()
    }
}

/// One setting, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Shown {
    /// Its name.
    pub(crate) key: &'static str,
    /// What it is; absent if nothing says.
    pub(crate) value: Option<String>,
    /// Who says so.
    pub(crate) from: String,
}

/// The settings of one process.
#[derive(Debug)]
pub(crate) struct Settings {
    values: Values,
    figment: Figment,
}

impl Settings {
    /// Reads them all.
    pub(crate) fn load(flags: &Flags) -> anyhow::Result<Self> {
        let mut figment = Figment::new();
        for path in files()? {
            if check(&path)? {
                figment = figment.merge(Toml::file_exact(path));
            }
        }
        let figment = figment
            .merge(Env::prefixed("SLUICE_").only(KEYS))
            .merge(Serialized::from(flags, figment::Profile::Default));
        let values = figment.extract::<Values>().map_err(|error| {
            Failure::usage(
                "configuration",
                error.to_string(),
                "`sluice config show` says what comes from where",
            )
        })?;
        Ok(Self { values, figment })
    }

    /// What a client needs of them; reads the token and the CA.
    pub(crate) fn client_config(&self) -> anyhow::Result<ClientConfig> {
        let need = |what: &str, flag: &str, variable: &str| {
            Failure::usage(
                "configuration",
                format!("{what} is not configured"),
                format!("give {flag}, set {variable}, or write it to the configuration file"),
            )
        };
        let urls = self.values.url.clone().map(Urls::into_list).unwrap_or_default();
        if urls.is_empty() {
            return Err(need("the URL of the cluster", "--url", "SLUICE_URL").into());
        }
        let token_file = self
            .values
            .token_file
            .as_deref()
            .ok_or_else(|| need("the file of the token", "--token-file", "SLUICE_TOKEN_FILE"))?;
        let ca = self.values.ca.as_deref().ok_or_else(|| need("the CA to trust", "--ca", "SLUICE_CA"))?;
        let token = Token::new(&String::from_utf8_lossy(&read(token_file, "token-file")?));
        let mut config = ClientConfig::new(urls, token, read(ca, "ca")?);
        if let Some(text) = &self.values.retry_for {
            config.retry.retry_for = duration("retry_for", text)?;
        }
        if let Some(jobs) = self.values.jobs {
            jobs.apply(&mut config);
        }
        Ok(config)
    }

    /// Whether someone said how long to go on.
    pub(crate) fn says_retry_for(&self) -> bool {
        self.values.retry_for.is_some()
    }

    /// Every setting, and where it came from.
    pub(crate) fn shown(&self) -> Vec<Shown> {
        let Values { url, token_file, ca, retry_for, jobs } = self.values.clone();
        let path = |path: Option<PathBuf>| path.map(|path| path.display().to_string());
        let values = [
            ("url", url.map(|urls| urls.into_list().join(",")), None),
            ("token_file", path(token_file), None),
            ("ca", path(ca), None),
            ("retry_for", retry_for, Some("5min")),
            ("jobs", jobs.map(|jobs| jobs.to_string()), Some("auto")),
        ];
        values
            .into_iter()
            .map(|(key, value, default)| match (value, default) {
                (Some(value), _) => Shown { key, value: Some(value), from: self.source(key) },
                (None, Some(default)) => {
                    Shown { key, value: Some(default.to_owned()), from: "default".to_owned() }
                }
                (None, None) => Shown { key, value: None, from: "not set".to_owned() },
            })
            .collect()
    }

    fn source(&self, key: &str) -> String {
        let Some(metadata) = self.figment.find_metadata(key) else { return "default".into() };
        match &metadata.source {
            Some(figment::Source::File(path)) => path.display().to_string(),
            Some(_) if metadata.name.contains("environment") => format!("SLUICE_{}", key.to_uppercase()),
            None if metadata.name.contains("environment") => format!("SLUICE_{}", key.to_uppercase()),
            Some(_) | None => format!("--{}", key.replace('_', "-")),
        }
    }
}

const KEYS: &[&str] = &["url", "token_file", "ca", "retry_for", "jobs"];

/// Checks a file of settings; false if there is none.
pub(crate) fn check(path: &Path) -> anyhow::Result<bool> {
    Ok(parse::<Values>(path, &KEYS.join(", "))?.is_some())
}

/// What a file says, unless there is none; names file and line of what is wrong, and then the `keys` that there are.
pub(crate) fn parse<T: DeserializeOwned>(path: &Path, keys: &str) -> anyhow::Result<Option<T>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    toml::from_str(&text).map(Some).map_err(|error| {
        let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        let message = format!("{}:{line}: {}", path.display(), error.message().replace('\n', ": "));
        Failure::usage("configuration", message, format!("the keys are {keys}")).into()
    })
}

/// The files of settings, the weaker first.
pub(crate) fn files() -> anyhow::Result<Vec<PathBuf>> {
    let dirs = etcetera::base_strategy::Xdg::new().context("there is no home directory")?;
    Ok(vec![PathBuf::from(SYSTEM_FILE), dirs.config_dir().join("sluice/config.toml")])
}

/// Where unfinished uploads are noted.
pub(crate) fn state_dir() -> anyhow::Result<PathBuf> {
    let dirs = etcetera::base_strategy::Xdg::new().context("there is no home directory")?;
    let state = dirs.state_dir().unwrap_or_else(|| dirs.data_dir());
    Ok(state.join("sluice"))
}

/// A length of time such as `7d` or `90s`.
pub(crate) fn duration(name: &str, text: &str) -> anyhow::Result<Duration> {
    humantime::parse_duration(text).map_err(|error| {
        let message = format!("{name} is {text:?}, expected a length of time: {error}");
        Failure::usage("duration", message, "such as 90s, 15min or 7d").into()
    })
}

/// The least memory for bodies that a process can be given, in bytes: two requests of the longest that there are.
const MIN_MEMORY: u64 = 16 << 20;

/// Whether `memory` has room for what comes.
pub(crate) fn check_memory(memory: Option<u64>) -> anyhow::Result<()> {
    match memory.filter(|memory| *memory < MIN_MEMORY) {
        Some(memory) => {
            let message = format!("memory is {memory}, expected at least {MIN_MEMORY} bytes");
            let hint = "a request may be 8 MiB long: such as memory = \"256MiB\"";
            Err(Failure::usage("configuration", message, hint).into())
        }
        None => Ok(()),
    }
}

/// Where Redis is, and how it lets us in, as a file describes it.
pub(crate) fn redis(
    url: Option<&str>,
    password: Option<&Path>,
    ca: Option<&Path>,
) -> anyhow::Result<Option<RedisConfig>> {
    let Some(url) = url else {
        if password.is_some() || ca.is_some() {
            let message = "redis_password or redis_ca is there, and redis is not";
            return Err(Failure::usage("configuration", message, "add redis = \"redis://host:port\"").into());
        }
        return Ok(None);
    };
    let config = RedisConfig::new(url, password, ca).map_err(|error| {
        let hint = "redis = \"redis://host:port\", redis_password = \"FILE\"; with rediss also redis_ca";
        Failure::usage("configuration", format!("redis: {error}"), hint)
    })?;
    Ok(Some(config))
}

fn read(path: &Path, what: &str) -> anyhow::Result<Vec<u8>> {
    fs::read(path).map_err(|error| {
        let message = format!("cannot read {} ({what}): {error}", path.display());
        Failure::usage("configuration", message, "`sluice config show` says where the path comes from").into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_are_named_with_file_and_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        assert!(!check(&path).unwrap());
        fs::write(&path, "url = [\"https://a\", \"https://b\"]\njobs = 3\n").unwrap();
        assert!(check(&path).unwrap());
        fs::write(&path, "jobs = 3\n\nurls = \"https://a\"\n").unwrap();
        let error = check(&path).unwrap_err().to_string();
        assert!(error.contains("config.toml:3: unknown field `urls`"), "{error}");
        fs::write(&path, "jobs = \"auto\"\n").unwrap();
        assert!(check(&path).unwrap());
        fs::write(&path, "jobs = \"many\"\n").unwrap();
        assert!(check(&path).unwrap_err().to_string().contains("config.toml:1:"));
    }

    #[test]
    fn urls_come_as_text_or_list() {
        assert_eq!(Urls::Text("https://a, https://b,".into()).into_list(), ["https://a", "https://b"]);
        assert_eq!(Urls::List(vec![" https://a".into()]).into_list(), ["https://a"]);
    }
}
