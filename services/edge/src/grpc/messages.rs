//! The messages of a call on their way in: bounded, paid for and timed by what they announce, before tonic collects
//! them. What is wrong with them is an error of the body, which tonic passes on as the call's status.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use sluice_proto::problem::{Problem, Refusal};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;

use super::Method;
use super::call::{Call, Paid};

/// A message begins with a flag (compressed or not) and its length, in four bytes.
const PREFIX: usize = 5;

/// The body of a call.
pub(super) struct Messages {
    body: Body,
    method: &'static Method,
    call: Call,
    paid: Paid,
    /// The prefix of a message, as far as it has come.
    prefix: [u8; PREFIX],
    prefix_len: usize,
    /// What is still to come of the message.
    left: u32,
    /// Messages that have begun.
    begun: u64,
    /// When the message must be there, and who says so.
    due: Option<Instant>,
    alarm: Option<Pin<Box<Sleep>>>,
    /// Ready when the datacenter stops, for streams that would not notice.
    stopped: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Messages {
    pub(super) fn new(body: Body, method: &'static Method, call: Call, paid: Paid) -> Self {
        // Nothing is lost when a description breaks off; our own streams finish what they have begun.
        let stopped = (method.is_streaming && !method.is_ours).then(|| {
            let tasks = call.app.tasks.clone();
            Box::pin(async move { tasks.draining().await }) as Pin<Box<_>>
        });
        let mut messages = Self {
            body,
            method,
            call,
            paid,
            prefix: [0; PREFIX],
            prefix_len: 0,
            left: 0,
            begun: 0,
            due: None,
            alarm: None,
            stopped,
        };
        if !method.is_streaming {
            // The one message that is to come; of a stream nobody knows when the next one does.
            messages.expect(0);
        }
        messages
    }

    /// From now on, so many bytes are waited for.
    fn expect(&mut self, len: u32) {
        self.due = Some(Instant::now() + self.call.app.settings.patience(u64::from(len)));
    }

    /// Looks at the next bytes.
    fn see(&mut self, mut bytes: &[u8]) -> Result<(), Refusal> {
        while !bytes.is_empty() {
            if self.left > 0 {
                let taken = bytes.len().min(self.left as usize);
                // At most `left`, which is a u32.
                self.left -= taken as u32;
                bytes = &bytes[taken..];
                if self.left == 0 {
                    self.ended();
                }
                continue;
            }
            if self.prefix_len == 0 {
                self.begin()?;
            }
            let taken = bytes.len().min(PREFIX - self.prefix_len);
            self.prefix[self.prefix_len..self.prefix_len + taken].copy_from_slice(&bytes[..taken]);
            self.prefix_len += taken;
            bytes = &bytes[taken..];
            if self.prefix_len == PREFIX {
                self.prefix_len = 0;
                self.announced()?;
            }
        }
        Ok(())
    }

    fn begin(&mut self) -> Result<(), Refusal> {
        if self.begun > 0 && !self.method.is_streaming {
            return Err(Refusal::new(Problem::InvalidParameter, "a second message came, the call takes one"));
        }
        self.begun += 1;
        if self.method.is_streaming {
            self.expect(0);
        }
        Ok(())
    }

    /// The whole prefix of a message is there.
    fn announced(&mut self) -> Result<(), Refusal> {
        let [flag, len @ ..] = self.prefix;
        let len = u32::from_be_bytes(len);
        if flag != 0 {
            return Err(compressed());
        }
        if len > self.method.max_message {
            let max = self.method.max_message;
            return Err(Refusal::new(
                Problem::TooLarge,
                format!("a message of {len} bytes came, {} takes {max} at most", self.method.name),
            )
            .hint("send many chunks with Upload, in pieces"));
        }
        if !self.method.is_streaming {
            self.paid.take(&self.call.app, u64::from(len))?;
        }
        self.left = len;
        if len == 0 {
            self.ended();
        } else {
            self.expect(len);
        }
        Ok(())
    }

    /// A whole message is there. The end of a call with one message is still to come.
    fn ended(&mut self) {
        if self.method.is_streaming {
            self.due = None;
        }
    }

    /// What the end of the body means.
    fn end(&self) -> Result<(), Refusal> {
        if self.left > 0 || self.prefix_len > 0 {
            Err(Refusal::new(Problem::Truncated, format!("the message ended {} bytes early", self.left)))
        } else if self.begun == 0 && !self.method.is_streaming {
            Err(Refusal::new(Problem::Truncated, "the call ended before its message"))
        } else {
            Ok(())
        }
    }

    /// Whether the datacenter stops, and nobody else would end this.
    fn is_stopped(&mut self, cx: &mut Context<'_>) -> bool {
        self.stopped.as_mut().is_some_and(|stopped| stopped.as_mut().poll(cx).is_ready())
    }

    /// Whether it has taken too long.
    fn is_late(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(due) = self.due else { return false };
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(sleep_until(due)));
        if alarm.deadline() != due {
            alarm.as_mut().reset(due);
        }
        alarm.as_mut().poll(cx).is_ready()
    }
}

/// Nothing that unfolds is taken.
pub(super) fn compressed() -> Refusal {
    Refusal::new(Problem::Encoding, "a compressed message came, expected identity")
        .hint("turn compression off for this channel")
}

impl HttpBody for Messages {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let refusal = match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => match frame.data_ref().map_or(Ok(()), |data| this.see(data)) {
                Ok(()) => return Poll::Ready(Some(Ok(frame))),
                Err(refusal) => refusal,
            },
            Poll::Ready(Some(Err(_))) => Refusal::new(Problem::Truncated, "the call broke off"),
            Poll::Ready(None) => match this.end() {
                Ok(()) => return Poll::Ready(None),
                Err(refusal) => refusal,
            },
            Poll::Pending if this.is_late(cx) => {
                this.call.app.parts.metrics.count_shed("slow-body");
                Refusal::new(Problem::Timeout, "the message took too long to arrive")
            }
            Poll::Pending if this.is_stopped(cx) => {
                Refusal::new(Problem::Stopping, "the datacenter is stopping")
            }
            Poll::Pending => return Poll::Pending,
        };
        Poll::Ready(Some(Err(this.call.status(&refusal))))
    }

    fn is_end_stream(&self) -> bool {
        // Its end is to be judged like everything else.
        false
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
