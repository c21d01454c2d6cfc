//! How far it is, on standard error: a bar on a terminal, otherwise a line every 10 seconds.
//!
//! The ticker that prints the lines is a task of its own; it ends when the [`Progress`] is dropped.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use sluice_client::{Event, Observer, SharedObserver};
use tokio::task::JoinHandle;

const LINE_EVERY: Duration = Duration::from_secs(10);

const SIZED: &str =
    "{wide_bar} {percent:>3} %  {bytes} of {total_bytes}  {binary_bytes_per_sec}  {eta}  {msg}";
const ENDLESS: &str = "{spinner} {bytes}  {binary_bytes_per_sec}  {elapsed}  {msg}";

/// The progress of one transfer.
pub(crate) struct Progress {
    shown: Arc<Shown>,
    ticker: Option<JoinHandle<()>>,
}

struct Shown {
    verb: &'static str,
    bar: Option<ProgressBar>,
    begun: Instant,
    bytes: AtomicU64,
    done: AtomicU64,
    /// Bytes that really travelled: what was there already says nothing of the rate.
    moved: AtomicU64,
    /// How many had when the last line was printed: a line tells the rate since then, so that a stall shows.
    told: AtomicU64,
    /// When something went wrong last and was said, in ms after the beginning; 0: never.
    complained_ms: AtomicU64,
}

impl Progress {
    /// Begins to show progress; `verb` is `sent` or `read`.
    pub(crate) fn start(verb: &'static str) -> Self {
        Self::with_style(verb, SIZED)
    }

    /// The same for what has no end yet.
    pub(crate) fn start_stream(verb: &'static str) -> Self {
        Self::with_style(verb, ENDLESS)
    }

    fn with_style(verb: &'static str, template: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template(template);
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        let shown = Arc::new(Shown {
            verb,
            bar,
            begun: Instant::now(),
            bytes: AtomicU64::new(0),
            done: AtomicU64::new(0),
            moved: AtomicU64::new(0),
            told: AtomicU64::new(0),
            complained_ms: AtomicU64::new(0),
        });
        let ticker = shown.bar.is_none().then(|| {
            let shown = shown.clone();
            tokio::spawn(async move {
                loop {
                    tokio::time::sleep(LINE_EVERY).await;
                    shown.say(&shown.line());
                }
            })
        });
        Self { shown, ticker }
    }

    /// Does something that writes to the terminal, with the bar out of the way.
    pub(crate) fn suspend<T>(&self, act: impl FnOnce() -> T) -> T {
        match &self.shown.bar {
            Some(bar) => bar.suspend(act),
            None => act(),
        }
    }

    /// What a transfer is to be watched by.
    pub(crate) fn observer(&self) -> SharedObserver {
        self.shown.clone()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(ticker) = &self.ticker {
            ticker.abort();
        }
        if let Some(bar) = &self.shown.bar {
            bar.finish_and_clear();
        }
    }
}

impl Observer for Shown {
    fn observe(&self, event: &Event<'_>) {
        match event {
            Event::Planned { bytes, .. } => {
                self.bytes.store(*bytes, Ordering::Relaxed);
                if let Some(bar) = &self.bar {
                    bar.set_length(*bytes);
                }
            }
            Event::Acknowledged { bytes, .. } | Event::Fetched { bytes, .. } => {
                self.moved.fetch_add(*bytes, Ordering::Relaxed);
                self.advance(*bytes);
            }
            Event::Skipped { bytes, .. } => self.advance(*bytes),
            Event::UrlDown { error, .. } => self.complain(&format!("{error}; going on")),
            Event::Damaged { error, .. } => self.complain(&format!("{error}; asking another")),
            Event::Resending { chunks } => self.say(&format!("{chunks} chunks were lost and are sent again")),
            Event::Waiting { state } => {
                if let Some(bar) = &self.bar {
                    bar.set_message(state.name());
                }
            }
            Event::Created { .. } | Event::UrlUp { .. } => {}
        }
    }
}

impl Shown {
    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
    }

    /// Says what went wrong, but not again and again: a datacenter that pushes back does so many times a second.
    fn complain(&self, text: &str) {
        let now = self.begun.elapsed().as_millis() as u64 + 1;
        let last = self.complained_ms.load(Ordering::Relaxed);
        if last == 0 || now.saturating_sub(last) >= LINE_EVERY.as_millis() as u64 {
            self.complained_ms.store(now, Ordering::Relaxed);
            self.say(text);
        }
    }

    /// The line that is due every [`LINE_EVERY`].
    fn line(&self) -> String {
        let (done, all) = (self.done.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed));
        let percent = done.saturating_mul(100).checked_div(all).unwrap_or(0).min(100);
        let moved = self.moved.load(Ordering::Relaxed);
        let rate = moved.saturating_sub(self.told.swap(moved, Ordering::Relaxed)) / LINE_EVERY.as_secs();
        if all == 0 {
            return format!("{} {}, {}/s", self.verb, HumanBytes(done), HumanBytes(rate));
        }
        let (done, all, rate) = (HumanBytes(done), HumanBytes(all), HumanBytes(rate));
        format!("{} {done} of {all} ({percent} %), {rate}/s", self.verb)
    }

    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            // With standard error closed there is nobody left to tell.
            None => {
                let _ = writeln!(std::io::stderr().lock(), "{text}");
            }
        }
    }
}
