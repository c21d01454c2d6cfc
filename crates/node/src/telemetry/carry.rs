//! Under which trace something is done: with every request that comes in, and every one that goes out for it.
//!
//! If spans are exported, a request's trace and step are those of its span. If not, they are kept beside the task, so that
//! ids are still carried on; that costs no more than the header.

use std::cell::Cell;
use std::future::Future;

use http::HeaderValue;
use opentelemetry::trace::TraceContextExt as _;
use opentelemetry::trace::{SpanContext, TraceState};
use opentelemetry::{SpanId, TraceFlags};
use sluice_proto::trace::{TraceContext, TraceId};
use tracing::instrument::Instrumented;
use tracing::{Instrument as _, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use super::export;
use crate::clock::random_bytes;

tokio::task_local! {
    /// The step that the request at hand is, where no span says it.
    static STEP: Cell<TraceContext>;
}

/// Who sent a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whence {
    /// A client: what it does not record is recorded if the sampler of this process says so.
    Client,
    /// A process of the cluster, which has decided that.
    Inside,
}

/// A request that is being served: its span, and its step of a trace. A clone is the same request.
#[derive(Clone, Debug)]
pub struct Served {
    span: Span,
    step: TraceContext,
}

/// Begins to serve a request whose header `traceparent` is this. The span should have a field `trace`, which is told here,
/// and must not have been entered.
pub fn serve(span: Span, header: Option<&HeaderValue>, whence: Whence) -> Served {
    let sent = header.and_then(|value| TraceContext::parse(value.as_bytes()));
    let recorded = export::sampler().and_then(|sampler| {
        if let Some(sent) = sent {
            let wanted = sent.is_recorded() || (whence == Whence::Client && sampler.wants(sent.id()));
            set_parent(&span, sent, wanted);
        }
        of_span(&span)
    });
    let step = recorded.unwrap_or_else(|| sent.map_or_else(begun, next));
    span.record("trace", tracing::field::display(step.id()));
    Served { span, step }
}

impl Served {
    /// The trace.
    pub fn trace(&self) -> TraceId {
        self.step.id()
    }

    /// The span.
    pub fn span(&self) -> &Span {
        &self.span
    }

    /// Does something that is part of it at once.
    pub fn within<T>(&self, work: impl FnOnce() -> T) -> T {
        STEP.sync_scope(Cell::new(self.step), || self.span.in_scope(work))
    }

    /// Serves it.
    pub fn scope<F: Future>(self, work: F) -> impl Future<Output = F::Output> {
        STEP.scope(Cell::new(self.step), work.instrument(self.span))
    }
}

/// A new trace.
fn begun() -> TraceContext {
    // All zeros is as likely as that the machine has no randomness, and then nothing works.
    TraceContext::new(random_bytes(), random_bytes(), false).unwrap_or_else(begun)
}

/// What follows from a step that was done elsewhere, if nobody here records it.
fn next(sent: TraceContext) -> TraceContext {
    TraceContext::new(sent.id().to_bytes(), random_bytes(), sent.is_recorded()).unwrap_or(sent)
}

/// The step at hand.
pub fn step() -> Option<TraceContext> {
    let recorded = export::sampler().and_then(|_| of_span(&Span::current()));
    recorded.or_else(|| STEP.try_with(Cell::get).ok())
}

/// Whether spans are exported.
pub fn is_exporting() -> bool {
    export::sampler().is_some()
}

/// The step at hand, if it is a span that is exported.
pub fn recorded() -> Option<TraceContext> {
    export::sampler()?;
    of_span(&Span::current()).filter(TraceContext::is_recorded)
}

/// What to send along with a request that is made for the one at hand: the header `traceparent`.
pub fn outgoing() -> Option<HeaderValue> {
    step().map(|step| step.header())
}

/// A task that is spawned for the request at hand, under the same trace.
pub fn carried<F: Future>(task: F) -> impl Future<Output = F::Output> {
    let (span, step) = (Span::current(), STEP.try_with(Cell::get).ok());
    async move {
        let task: Instrumented<F> = task.instrument(span);
        match step {
            Some(step) => STEP.scope(Cell::new(step), task).await,
            None => task.await,
        }
    }
}

/// Makes a span follow from a step that was done elsewhere, if spans are exported.
pub fn follow(span: &Span, parent: TraceContext) {
    if export::sampler().is_some() {
        set_parent(span, parent, parent.is_recorded());
    }
}

/// Links a span to steps of other traces, if spans are exported.
pub fn links(span: &Span, to: impl IntoIterator<Item = TraceContext>) {
    if export::sampler().is_some() {
        to.into_iter().for_each(|step| span.add_link(remote(step, step.is_recorded())));
    }
}

/// Calls a span what is known only now that it has begun, if spans are exported.
pub fn rename(span: &Span, name: impl FnOnce() -> String) {
    if export::sampler().is_some() {
        span.context().span().update_name(name());
    }
}

fn remote(step: TraceContext, is_recorded: bool) -> SpanContext {
    let flags = if is_recorded { TraceFlags::SAMPLED } else { TraceFlags::NOT_SAMPLED };
    let trace = opentelemetry::TraceId::from_bytes(step.id().to_bytes());
    SpanContext::new(trace, SpanId::from_bytes(step.span()), flags, true, TraceState::NONE)
}

fn set_parent(span: &Span, parent: TraceContext, is_recorded: bool) {
    let parent = opentelemetry::Context::new().with_remote_span_context(remote(parent, is_recorded));
    // A span that is filtered out has no place in a trace.
    let _ = span.set_parent(parent);
}

/// The step that a span is, if it is one.
fn of_span(span: &Span) -> Option<TraceContext> {
    let context = span.context();
    let of = context.span();
    let of = of.span_context();
    TraceContext::new(of.trace_id().to_bytes(), of.span_id().to_bytes(), of.is_sampled())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[tokio::test]
    async fn a_trace_goes_on_under_its_id_without_an_exporter() {
        let sent = HeaderValue::from_static(HEADER);
        let served = serve(Span::none(), Some(&sent), Whence::Client);
        assert_eq!(served.trace().to_string(), "0af7651916cd43dd8448eb211c80319c");
        let (here, there) = served
            .scope(async {
                let there = tokio::spawn(carried(async { outgoing() })).await.unwrap();
                (outgoing(), there)
            })
            .await;
        let (here, there) = (here.unwrap(), there.unwrap());
        assert_eq!(here, there);
        let step = TraceContext::parse(here.as_bytes()).unwrap();
        assert_eq!(step.id(), TraceContext::parse(HEADER.as_bytes()).unwrap().id());
        assert_ne!(here, sent, "each does a step of its own");
        assert_eq!(outgoing(), None);
    }

    #[test]
    fn what_is_no_trace_begins_a_new_one() {
        let bad = HeaderValue::from_static("00-none");
        let served = serve(Span::none(), Some(&bad), Whence::Client);
        assert_ne!(served.trace(), serve(Span::none(), None, Whence::Client).trace());
    }
}
