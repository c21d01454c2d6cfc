//! Ports that services listen on.
//!
//! A listener is owned by the task that accepts from it, and closed with it.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// How long nothing is accepted after the system refused to: out of descriptors, most likely, and others may give some
/// back. Accepting at once again would spin.
const PAUSE: Duration = Duration::from_millis(100);

/// Opens a port (0: any free one), also one that was just closed, and one that a socket reserves which never listens.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// The next connection, however long it takes. `port` names the port in the log.
pub async fn accept(listener: &TcpListener, port: &str) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::warn!(%error, port, "a connection could not be accepted");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}
