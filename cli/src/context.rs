//! What every command is given: how to answer, the settings, and the client they make.

use std::collections::BTreeSet;
use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use serde::Serialize;
use sluice_client::{Client, ClientConfig, Event, SharedObserver};
use sluice_node::telemetry;

use crate::settings::{Flags, Settings};

/// How long a question is asked again while no datacenter answers.
const QUESTION_PATIENCE: Duration = Duration::from_secs(10);

/// The surroundings of one command.
pub(crate) struct Context {
    /// Whether the answer is one JSON object.
    pub(crate) json: bool,
    flags: Flags,
    /// The command that carries on, once there is something to carry on with.
    resume: Mutex<Option<String>>,
}

impl Context {
    /// The surroundings that these flags make.
    pub(crate) fn new(json: bool, flags: Flags) -> Self {
        Self { json, flags, resume: Mutex::new(None) }
    }

    /// The settings, from flags, environment and files.
    pub(crate) fn settings(&self) -> anyhow::Result<Settings> {
        Settings::load(&self.flags)
    }

    /// The client that the settings make; `change` may override some of its configuration.
    pub(crate) fn client(&self, change: impl FnOnce(&mut ClientConfig)) -> anyhow::Result<Client> {
        let mut config = self.settings()?.client_config()?;
        config.trace = telemetry::step();
        change(&mut config);
        Ok(Client::new(config)?.observed_by(complaints()))
    }

    /// A client for questions whose answer someone waits for: less patient, unless told otherwise.
    pub(crate) fn client_for_questions(&self) -> anyhow::Result<Client> {
        let told = self.settings()?.says_retry_for();
        self.client(|config| {
            if !told {
                config.retry.retry_for = QUESTION_PATIENCE;
            }
        })
    }

    /// Notes the command that carries on if this one is interrupted.
    pub(crate) fn set_resume(&self, mut command: String) {
        for (flag, value) in self.flags.given() {
            command.push_str(&format!(" {flag} {}", quoted(&value)));
        }
        *self.resume.lock().unwrap_or_else(PoisonError::into_inner) = Some(command);
    }

    /// The command that carries on.
    pub(crate) fn resume(&self) -> Option<String> {
        self.resume.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes the result to standard output: one JSON object, or else the words.
    pub(crate) fn answer(
        &self,
        object: &impl Serialize,
        words: impl FnOnce() -> String,
    ) -> anyhow::Result<()> {
        let mut text =
            if self.json { serde_json::to_string(object).context("cannot write JSON")? } else { words() };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        let mut stdout = std::io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            // Whoever reads has read enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            result => result.context("cannot write to standard output"),
        }
    }

    /// Writes a remark to standard error.
    pub(crate) fn remark(&self, text: &str) {
        // With standard error closed there is nobody left to tell.
        let _ = writeln!(std::io::stderr().lock(), "{text}");
    }
}

/// Says on standard error, once for each datacenter, that it does not answer.
fn complaints() -> SharedObserver {
    let said = Mutex::new(BTreeSet::new());
    Arc::new(move |event: &Event<'_>| {
        if let Event::UrlDown { url, error } = event
            && said.lock().unwrap_or_else(PoisonError::into_inner).insert(*url)
        {
            // With standard error closed there is nobody left to tell.
            let _ = writeln!(std::io::stderr().lock(), "{error}; trying again");
        }
    })
}

/// Whether someone can answer a question.
pub(crate) fn is_interactive() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// A word as a shell would have to be given it.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(quoted("/a/b-c.iso"), "/a/b-c.iso");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
