//! Connections between processes that must notice when the other side is gone.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::TcpStream;

/// A side that says nothing is asked whether it is there after so many seconds, so often, so many times.
const ASK_AFTER_SECS: u64 = 15;
const ASK_EVERY_SECS: u64 = 5;
const ASK_TIMES: u32 = 3;

/// What was sent and is not acknowledged for so many milliseconds ends the connection.
const UNACKNOWLEDGED_MS: u32 = 30_000;

/// Sends at once, and ends the connection half a minute after its other side has vanished, whether something was being sent
/// or awaited.
pub fn watch_over(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(ASK_AFTER_SECS))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(ASK_EVERY_SECS))?;
    sockopt::set_tcp_keepcnt(stream, ASK_TIMES)?;
    sockopt::set_tcp_user_timeout(stream, UNACKNOWLEDGED_MS)?;
    Ok(())
}

/// Connects to one of the processes at `names`: `host:port`, several separated by commas, each of which may have many
/// addresses. They are asked in turn, from the `first`th on, until one has greeted within `patience`: one that hangs takes
/// connections and says nothing. Names are resolved anew, since processes come and go.
///
/// What went wrong with the last of them, if none has greeted.
pub async fn reach<T, F>(
    names: &str,
    first: usize,
    patience: Duration,
    greet: impl Fn(TcpStream) -> F + Send,
) -> io::Result<T>
where
    F: Future<Output = io::Result<T>> + Send,
{
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for name in names.split(',') {
        match tokio::net::lookup_host(name.trim()).await {
            Ok(found) => addresses.extend(found),
            // The others may have one.
            Err(error) => last = error,
        }
    }
    for at in 0..addresses.len() {
        let address = addresses[(first % addresses.len() + at) % addresses.len()];
        let greeted = async { greet(TcpStream::connect(address).await?).await };
        match tokio::time::timeout(patience, greeted).await {
            Ok(Ok(greeted)) => return Ok(greeted),
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
        tracing::debug!(%address, error = %last, "no connection");
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn whoever_hangs_or_is_gone_is_passed_over() {
        let (hung, well) = (TcpListener::bind("127.0.0.1:0").await, TcpListener::bind("127.0.0.1:0").await);
        let (hung, well) = (hung.unwrap(), well.unwrap());
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let names = format!(
            "{gone}, nowhere.invalid:1,{},{}",
            hung.local_addr().unwrap(),
            well.local_addr().unwrap()
        );
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = well.accept().await {
                let _ = stream.write_all(b"!").await;
            }
        });
        let greet = |mut stream: TcpStream| async move { stream.read_u8().await };
        for first in [0, 1, 2, 3, usize::MAX] {
            assert_eq!(reach(&names, first, Duration::from_millis(200), greet).await.unwrap(), b'!');
        }
        let nobody =
            reach(&hung.local_addr().unwrap().to_string(), 0, Duration::from_millis(20), greet).await;
        assert_eq!(nobody.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(reach("nowhere.invalid:1", 0, Duration::from_secs(1), greet).await.is_err());
    }
}
