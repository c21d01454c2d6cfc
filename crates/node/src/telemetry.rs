//! Logs and traces.
//!
//! [`init`] is called once by the binary. Lines go to stderr as they come (`lines.rs`); spans go to a collector over OTLP, if
//! `OTEL_*` names one (`export.rs`), and [`Telemetry::finish`] sends the last of them. Under which trace something is done is
//! carried with it whether or not anyone collects spans (`carry.rs`), so that one id is in answers, errors and logs of
//! every process and datacenter that a request touches.

mod carry;
mod export;
mod lines;

use std::io::IsTerminal;

use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, reload};

pub use self::carry::{
    Served, Whence, carried, follow, is_exporting, links, outgoing, recorded, rename, serve, step,
};
pub use self::export::ExportError;

/// Why logging does not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter makes no sense.
    #[error("log level {0:?} is not understood, expected one like info or sluice_edge=debug,warn")]
    Level(String),
    /// What the environment says of traces cannot be followed.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// Somebody else did it before.
    #[error("logging was started twice")]
    Twice,
}

/// Whether `level` says what to log.
pub fn check(level: &str) -> Result<(), TelemetryError> {
    EnvFilter::try_new(level).map(|_| ()).map_err(|_| TelemetryError::Level(level.to_owned()))
}

/// What is logged, for as long as the process runs.
#[derive(Clone, Debug)]
pub struct LogLevel(reload::Handle<EnvFilter, Registry>);

impl LogLevel {
    /// Logs this from now on, unless `RUST_LOG` says what.
    pub fn set(&self, level: &str) -> Result<(), TelemetryError> {
        // An error means that nobody logs any more.
        let _ = self.0.reload(filter(level)?);
        Ok(())
    }
}

fn filter(level: &str) -> Result<EnvFilter, TelemetryError> {
    let level = std::env::var(EnvFilter::DEFAULT_ENV).unwrap_or_else(|_| level.to_owned());
    EnvFilter::try_new(&level).map_err(|_| TelemetryError::Level(level))
}

/// Logs and traces of this process, once they have begun.
#[derive(Debug)]
pub struct Telemetry {
    level: LogLevel,
}

/// Traces of a process that does not log.
#[derive(Debug)]
pub struct Traces(());

impl Traces {
    /// Sends the last spans, for a bounded while.
    pub async fn finish(self) {
        export::finish().await;
    }
}

/// Starts exporting spans, if the environment says so, and nothing else. Must be called on a runtime.
pub fn init_traces(role: &str) -> Result<Option<Traces>, TelemetryError> {
    let Some(spans) = export::layer(role, None)? else { return Ok(None) };
    let begun = tracing_subscriber::registry().with(spans).try_init();
    begun.map(|()| Some(Traces(()))).map_err(|_| TelemetryError::Twice)
}

impl Telemetry {
    /// What is logged.
    pub fn level(&self) -> LogLevel {
        self.level.clone()
    }

    /// Sends the last spans, for a bounded while.
    pub async fn finish(self) {
        export::finish().await;
    }
}

/// Starts logging to stderr, for people on a terminal, as JSON off one; and exporting spans, if the environment says so.
/// `RUST_LOG` is stronger than `level`. Lines name `dc`, if the process belongs to one datacenter; its spans name `role`.
/// Must be called on a runtime.
pub fn init(level: &str, role: &str, dc: Option<&str>) -> Result<Telemetry, TelemetryError> {
    let (filter, handle) = reload::Layer::new(filter(level)?);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = if std::io::stderr().is_terminal() {
        lines.with_target(false).with_filter(filter).boxed()
    } else {
        lines
            .fmt_fields(lines::Fields::default())
            .event_format(lines::Lines::new(dc))
            .with_filter(filter)
            .boxed()
    };
    let registry = tracing_subscriber::registry().with(lines);
    // A layer that is not there costs nothing; one that is there and idle would.
    let begun = match export::layer(role, dc)? {
        Some(spans) => registry.with(spans).try_init(),
        None => registry.try_init(),
    };
    begun.map(|()| Telemetry { level: LogLevel(handle) }).map_err(|_| TelemetryError::Twice)
}
