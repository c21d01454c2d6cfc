//! A body on its way into the store: exactly as long as declared, and not slower than it may be.
//!
//! Runs inside the caller's request and ends with it; nothing has to be stopped.

use std::time::Duration;

use futures_util::StreamExt;
use sluice_proto::calls::ByteStream;
use sluice_proto::problem::{Problem, Refusal};
use sluice_store::RunWriter;
use tokio::time::{Instant, timeout};

use crate::turn::Gather;
use crate::{refusal, turn};

/// How fast a body must arrive. Only time spent waiting for the client counts, not the store's.
#[derive(Clone, Debug)]
pub struct Pace {
    /// The longest pause between two pieces.
    pub idle: Duration,
    /// Time that every body is given, however short.
    pub grace: Duration,
    /// Bytes a second that are expected on top of that.
    pub rate: u64,
}

impl Default for Pace {
    /// 10 s without a byte, or less than 16 KiB a second after 15 s: a chunk takes 80 s at the most.
    fn default() -> Self {
        Self { idle: Duration::from_secs(10), grace: Duration::from_secs(15), rate: 16 << 10 }
    }
}

impl Pace {
    /// How long a client that has sent `received` bytes, and was waited for `waited`, may still take for the next.
    fn allowance(&self, received: u64, waited: Duration) -> Duration {
        let earned = Duration::from_millis(received.saturating_mul(1000) / self.rate.max(1));
        (self.grace + earned).saturating_sub(waited).min(self.idle)
    }
}

/// Passes a body of `len` bytes on to a writer.
pub(crate) async fn copy(
    mut body: ByteStream,
    len: u64,
    pace: &Pace,
    mut gather: Gather<'_>,
    writer: &mut dyn RunWriter,
) -> Result<(), Refusal> {
    let mut received = 0;
    let mut waited = Duration::ZERO;
    loop {
        let asked = Instant::now();
        let allowance = pace.allowance(received, waited);
        let patience = if gather.has_turn() { turn::PAUSE.min(allowance) } else { allowance };
        let Ok(piece) = timeout(patience, body.next()).await else {
            waited += asked.elapsed();
            if patience < allowance {
                gather.yield_turn(writer).await?;
                continue;
            }
            return Err(Refusal::new(
                Problem::Timeout,
                format!("{received} of {len} bytes came in time, then too few"),
            )
            .hint("send the chunk again, fewer at once"));
        };
        waited += asked.elapsed();
        match piece {
            Some(Ok(bytes)) => {
                received += bytes.len() as u64;
                if received > len {
                    return Err(refusal::too_long(len));
                }
                gather.take(bytes, writer).await?;
            }
            Some(Err(refusal)) => return Err(refusal),
            None if received < len => {
                return Err(Refusal::new(
                    Problem::Truncated,
                    format!("the body ended after {received} bytes, expected {len}"),
                )
                .hint("send the chunk again"));
            }
            None => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_body_earns_time_by_its_bytes_only() {
        let pace = Pace { idle: Duration::from_secs(10), grace: Duration::from_secs(15), rate: 1000 };
        let secs = Duration::from_secs;
        assert_eq!(pace.allowance(0, secs(0)), secs(10));
        assert_eq!(pace.allowance(0, secs(12)), secs(3));
        assert_eq!(pace.allowance(1000, secs(12)), secs(4));
        assert_eq!(pace.allowance(15, secs(15)), Duration::from_millis(15));
        assert_eq!(pace.allowance(0, secs(16)), secs(0));
    }
}
