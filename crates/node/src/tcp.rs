//! Connections between processes that must notice when the other side is gone.

use std::io;

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
    sockopt::set_tcp_keepidle(stream, std::time::Duration::from_secs(ASK_AFTER_SECS))?;
    sockopt::set_tcp_keepintvl(stream, std::time::Duration::from_secs(ASK_EVERY_SECS))?;
    sockopt::set_tcp_keepcnt(stream, ASK_TIMES)?;
    sockopt::set_tcp_user_timeout(stream, UNACKNOWLEDGED_MS)?;
    Ok(())
}
