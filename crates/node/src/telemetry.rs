//! Logs and trace ids.
//!
//! [`init`] is called once by the binary. Traces are carried as W3C trace context (`traceparent`), so that one id
//! follows a request inwards and across datacenters; an exporter (OTLP) is one more layer in [`init`]. Nothing has to
//! be stopped: lines are written as they come.

use std::fmt;
use std::io::IsTerminal;

use http::HeaderValue;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::clock::random_bytes;

/// Name of the header that carries a [`TraceContext`].
pub const TRACEPARENT: &str = "traceparent";

/// Why logging does not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter makes no sense.
    #[error("log level {0:?} is not understood, expected one like info or sluice_edge=debug,warn")]
    Level(String),
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

/// Starts logging to stderr: for people on a terminal, as JSON off one. `RUST_LOG` is stronger than `level`.
pub fn init(level: &str) -> Result<LogLevel, TelemetryError> {
    let (filter, handle) = reload::Layer::new(filter(level)?);
    let registry = tracing_subscriber::registry().with(filter);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let result = if std::io::stderr().is_terminal() {
        registry.with(lines.with_target(false)).try_init()
    } else {
        registry.with(lines.json().flatten_event(true)).try_init()
    };
    result.map(|()| LogLevel(handle)).map_err(|_| TelemetryError::Twice)
}

/// Names a trace: 16 bytes, not all zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceId([u8; 16]);

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where in a trace a request stands (W3C Trace Context, `traceparent`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace.
    pub id: TraceId,
    span: [u8; 8],
    sampled: bool,
}

impl TraceContext {
    /// A new trace.
    pub fn new() -> Self {
        // All zeros is as likely as a collision.
        Self { id: TraceId(random_bytes()), span: random_bytes(), sampled: false }
    }

    /// The next step of the trace in this header, or of a new one if there is none that counts.
    pub fn of_request(header: Option<&HeaderValue>) -> Self {
        header.and_then(|value| Self::parse(value.as_bytes())).map_or_else(Self::new, Self::child)
    }

    /// The next step of the same trace.
    #[must_use]
    pub fn child(self) -> Self {
        Self { span: random_bytes(), ..self }
    }

    /// Reads `00-<32 hex>-<16 hex>-<2 hex>`; a later version may say more after that.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (head, rest) = text.split_at_checked(55)?;
        let lower_hex = |b: &u8| b.is_ascii_digit() || (b'a'..=b'f').contains(b);
        let well_formed = head[2] == b'-'
            && head[35] == b'-'
            && head[52] == b'-'
            && [&head[..2], &head[3..35], &head[36..52], &head[53..]]
                .iter()
                .all(|part| part.iter().all(lower_hex));
        let version = &head[..2];
        let ends = rest.is_empty() || (version != b"00" && rest[0] == b'-');
        if !well_formed || version == b"ff" || !ends {
            return None;
        }
        let (mut id, mut span, mut flags) = ([0; 16], [0; 8], [0; 1]);
        hex::decode_to_slice(&head[3..35], &mut id).ok()?;
        hex::decode_to_slice(&head[36..52], &mut span).ok()?;
        hex::decode_to_slice(&head[53..], &mut flags).ok()?;
        (id != [0; 16] && span != [0; 8]).then_some(Self {
            id: TraceId(id),
            span,
            sampled: flags[0] & 1 == 1,
        })
    }
}

impl Default for TraceContext {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{}-{}-{:02x}", self.id, hex::encode(self.span), u8::from(self.sampled))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_trace_goes_on_under_its_id() {
        let parent = TraceContext::parse(HEADER.as_bytes()).unwrap();
        assert_eq!(parent.to_string(), HEADER);
        let header = HeaderValue::from_static(HEADER);
        let child = TraceContext::of_request(Some(&header));
        assert_eq!(child.id, parent.id);
        assert_ne!(child, parent);
        assert!(TraceContext::parse(child.to_string().as_bytes()).is_some());
    }

    #[test]
    fn what_is_no_trace_begins_a_new_one() {
        for bad in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        ] {
            assert_eq!(TraceContext::parse(bad.as_bytes()), None, "{bad}");
        }
        assert_ne!(TraceContext::of_request(None).id, TraceContext::of_request(None).id);
        assert!(TraceContext::parse(format!("01{}-more", &HEADER[2..]).as_bytes()).is_some());
    }
}
