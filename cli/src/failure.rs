//! How a command ends that does not succeed: the words, and the exit code.

use std::io::Write;
use std::process::ExitCode;

use serde_json::json;
use sluice::datacenter::StartError;
use sluice_client::{ClientError, ExitClass};

use crate::context::Context;

/// The exit code of a process that was interrupted.
pub(crate) const INTERRUPTED: u8 = 130;

/// What a command refuses by itself, without asking a cluster.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The arguments or settings make no sense as they are.
    #[error("{message}")]
    Usage {
        /// The word in brackets.
        code: &'static str,
        /// What was expected and what came.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
    /// A signature does not hold, or bytes are not what they should be.
    #[error("{message}")]
    Integrity {
        /// The word in brackets.
        code: &'static str,
        /// What was expected and what came.
        message: String,
    },
    /// What was asked for was found out, and it is bad: the answer has said all of it.
    #[error("{message}")]
    Damaged {
        /// How bad.
        message: String,
        /// What to do.
        hint: &'static str,
    },
    /// It was begun, and goes on, and was not waited for any longer.
    #[error("{message}")]
    NotYet {
        /// The word in brackets.
        code: &'static str,
        /// What is not done yet.
        message: String,
    },
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

impl Failure {
    /// A usage error with advice.
    pub(crate) fn usage(code: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage { code, message: message.into(), hint: Some(hint.into()) }
    }
}

/// An error, taken apart for its reader.
struct Words {
    message: String,
    code: String,
    hint: Option<String>,
    trace: Option<String>,
    dc: Option<String>,
    exit: u8,
}

/// Writes the error, on standard error in words and with `--json` as one object on standard output.
pub(crate) fn report(error: &anyhow::Error, context: &Context) -> ExitCode {
    let words = words(error);
    let mut text = format!("error: {} ({})\n", words.message, words.code);
    if let Some(hint) = &words.hint {
        text.push_str(&format!("hint: {hint}\n"));
    }
    if let Some(trace) = &words.trace {
        text.push_str(&format!("trace: {trace}\n"));
    }
    let resume =
        context.resume().filter(|_| words.exit == INTERRUPTED || words.exit == ExitClass::TryLater.code());
    if let Some(resume) = &resume {
        text.push_str(&format!("resume: {resume}\n"));
    }
    // With standard error closed there is nobody left to tell.
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
    let answered =
        matches!(error.downcast_ref::<Failure>(), Some(Failure::Damaged { .. } | Failure::NotYet { .. }));
    if context.json && !answered {
        let object = json!({ "error": {
            "code": words.code, "message": words.message, "hint": words.hint, "trace": words.trace,
            "dc": words.dc, "exit": words.exit, "resume": resume,
        }});
        let _ = writeln!(std::io::stdout().lock(), "{object}");
    }
    ExitCode::from(words.exit)
}

fn words(error: &anyhow::Error) -> Words {
    if let Some(error) = error.downcast_ref::<ClientError>() {
        return Words {
            message: error.to_string(),
            code: error.code().to_owned(),
            hint: error.hint(),
            trace: error.trace().map(str::to_owned),
            dc: error.dc().map(str::to_owned),
            exit: error.exit_class().code(),
        };
    }
    if let Some(error) = error.downcast_ref::<StartError>() {
        return Words {
            message: error.to_string(),
            code: error.code().to_owned(),
            hint: error.hint().map(str::to_owned),
            trace: None,
            dc: None,
            exit: error.exit_class().code(),
        };
    }
    let (code, hint, exit) = match error.downcast_ref::<Failure>() {
        Some(Failure::Usage { code, hint, .. }) => (*code, hint.clone(), ExitClass::Usage.code()),
        Some(Failure::Integrity { code, .. }) => (*code, None, ExitClass::Integrity.code()),
        Some(Failure::Damaged { hint, .. }) => {
            ("damaged", Some((*hint).to_owned()), ExitClass::Integrity.code())
        }
        Some(Failure::NotYet { code, .. }) => {
            (*code, Some("it goes on: run it again to see it through".into()), ExitClass::TryLater.code())
        }
        Some(Failure::Interrupted) => ("interrupted", None, INTERRUPTED),
        None => ("internal", None, ExitClass::Unexpected.code()),
    };
    Words { message: format!("{error:#}"), code: code.into(), hint, trace: None, dc: None, exit }
}
