//! Ports that are kept for a datacenter, whether it is running or not.
//!
//! A reserved port is a socket that is bound and never listens. Services that listen there with `SO_REUSEADDR` may
//! bind beside it, while the system gives the port to nobody who asks for any; clients that connect meanwhile are
//! refused at once. The reservation ends when it is dropped.

use std::io;
use std::net::SocketAddr;

use tokio::net::TcpSocket;

/// One port of this machine.
#[derive(Debug)]
pub struct ReservedPort {
    address: SocketAddr,
    #[allow(dead_code, reason = "held for its drop")]
    socket: TcpSocket,
}

impl ReservedPort {
    /// Reserves the port of `address`, or any free one for port 0. `AddrInUse` if somebody listens there.
    pub fn reserve(address: SocketAddr) -> io::Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // Without it no service could bind beside the reservation. A port of 0 is chosen by bind, before sharing
        // could matter: the system never picks one that is bound.
        socket.set_reuseaddr(address.port() != 0)?;
        socket.bind(address)?;
        socket.set_reuseaddr(true)?;
        Ok(Self { address: socket.local_addr()?, socket })
    }

    /// The address, with the port that was found.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// The three ports of a datacenter.
#[derive(Debug)]
pub struct ReservedPorts {
    /// Where clients come in.
    pub edge: ReservedPort,
    /// Where other datacenters come in.
    pub peer: ReservedPort,
    /// Where probes and scrapers ask.
    pub admin: ReservedPort,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    fn any() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 0))
    }

    #[test]
    fn a_reserved_port_is_refused_until_its_service_listens_and_between_its_lives() {
        let reserved = ReservedPort::reserve(any()).unwrap();
        assert_ne!(reserved.address().port(), 0);
        for _ in 0..3 {
            let refused = TcpStream::connect(reserved.address()).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
            let service = TcpListener::bind(reserved.address()).unwrap();
            let _client = TcpStream::connect(reserved.address()).unwrap();
            let _accepted = service.accept().unwrap();
        }
    }

    #[test]
    fn a_port_where_somebody_listens_is_not_reserved() {
        let service = TcpListener::bind(any()).unwrap();
        let busy = ReservedPort::reserve(service.local_addr().unwrap()).unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::AddrInUse);
    }
}
