//! A line of the log as one JSON object: time, level, words, and all that is known of what went on, in one level. What
//! surrounding spans know (`trace`, `dc`, `tenant`, `file`) is in every line inside them.

use std::fmt;

use serde_json::{Map, Value};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::{JsonFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

/// How fields of spans are kept until a line wants them.
pub(super) type Fields = JsonFields;

/// Formats lines.
pub(super) struct Lines {
    dc: Option<String>,
}

impl Lines {
    /// Lines of a process of this datacenter, if it belongs to one.
    pub(super) fn new(dc: Option<&str>) -> Self {
        Self { dc: dc.map(str::to_owned) }
    }
}

/// The fields that are written in `text`.
fn fields(text: &str) -> Map<String, Value> {
    serde_json::from_str(text).unwrap_or_default()
}

impl<S> FormatEvent<S, Fields> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, Fields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = Map::new();
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let metadata = event.metadata();
        line.insert("timestamp".into(), time.into());
        line.insert("level".into(), metadata.level().as_str().into());
        line.insert("target".into(), metadata.target().into());
        line.extend(self.dc.clone().map(|dc| ("dc".to_owned(), dc.into())));
        for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(known) = span.extensions().get::<FormattedFields<Fields>>() {
                line.extend(fields(known).into_iter().filter(|(name, _)| !name.starts_with("otel.")));
            }
        }
        let mut own = String::new();
        context.field_format().format_fields(Writer::new(&mut own), event)?;
        line.extend(fields(&own));
        writeln!(writer, "{}", Value::Object(line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::{Arc, Mutex};
    use tracing_subscriber::layer::SubscriberExt as _;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_says_what_its_spans_know() {
        let written = Written::default();
        let out = written.clone();
        let layer = tracing_subscriber::fmt::layer()
            .fmt_fields(Fields::default())
            .event_format(Lines::new(Some("dc-a")))
            .with_writer(move || out.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let span = tracing::error_span!(
                "request",
                trace = "4f",
                file = tracing::field::Empty,
                otel.kind = "server"
            );
            let _in = span.enter();
            span.record("file", "0193");
            let _deeper = tracing::error_span!("store", tenant = 7).entered();
            tracing::error!(error = %"no \"room\"", "a request failed");
        });
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        let mut line: Map<String, Value> = serde_json::from_str(&text).unwrap();
        assert!(text.ends_with("}\n") && line.remove("timestamp").is_some());
        let expected = serde_json::json!({
            "level": "ERROR", "target": module_path!(), "dc": "dc-a", "trace": "4f", "file": "0193", "tenant": 7,
            "error": "no \"room\"", "message": "a request failed",
        });
        assert_eq!(Value::Object(line), expected);
    }
}
