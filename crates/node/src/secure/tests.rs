//! Each side that drives rustls itself, against one of tokio-rustls, and against each other.

use super::*;
use crate::clock::SystemClock;
use crate::material::ClusterMaterial;
use crate::role::Role;
use crate::tls;
use futures_util::FutureExt;
use sluice_engine::ids::DcId;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

const HERE: DcId = DcId::new(1);

/// What both sides go by, and what the server is called.
fn sides() -> (Arc<ClientConfig>, ServerName<'static>, Arc<ServerConfig>) {
    tls::install_provider();
    let material = ClusterMaterial::generate("test", &[(HERE, "dc-a")]).unwrap();
    let client = Arc::new(tls::edge_client(&material.cas(), &[b"h2"]).unwrap());
    let server = tls::edge_server(&material, SystemClock::shared()).unwrap();
    (client, tls::edge_name(&material).unwrap(), server)
}

/// A client of tokio-rustls and a server that have shaken hands over a pipe that holds so many bytes.
async fn pair(pipe: usize) -> (TlsStream<DuplexStream>, Secure<DuplexStream>) {
    let (client, name, server) = sides();
    let (here, there) = duplex(pipe);
    let (client, server) = tokio::join!(
        TlsConnector::from(client).connect(name, there),
        Secure::accept(here, server, Readers::default())
    );
    (client.unwrap(), server.unwrap())
}

/// Sends one way, then the other, and ends.
async fn ask(mut client: impl AsyncRead + AsyncWrite + Unpin, sent: &[u8]) {
    client.write_all(sent).await.unwrap();
    client.flush().await.unwrap();
    let mut back = vec![0; sent.len()];
    client.read_exact(&mut back).await.unwrap();
    assert!(back == sent);
    client.shutdown().await.unwrap();
    assert_eq!(client.read(&mut back).await.unwrap(), 0, "it says goodbye, too");
}

async fn answer(mut server: impl AsyncRead + AsyncWrite + Unpin, len: usize) {
    let mut got = vec![0; len];
    server.read_exact(&mut got).await.unwrap();
    server.write_all(&got).await.unwrap();
    server.flush().await.unwrap();
    assert_eq!(server.read(&mut got).await.unwrap(), 0);
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_client_talks_with_any_server() {
    tls::install_provider();
    let material = ClusterMaterial::generate("test", &[(HERE, "dc-a")]).unwrap();
    let client = tls::role_client(&material, HERE, Role::Edge).unwrap();
    let server = tls::role_server(&material, HERE, Role::Worker).unwrap();
    let name = tls::role_name(&material, HERE, Role::Worker).unwrap();
    let sent = noise(300_001);
    for pipe in [7, 64 << 10, 1 << 20] {
        for theirs in [false, true] {
            let (here, there) = duplex(pipe);
            let connect = SecureClient::connect(there, client.clone(), name.clone(), Readers::default());
            if theirs {
                let (client, server) = tokio::join!(connect, TlsAcceptor::from(server.clone()).accept(here));
                tokio::join!(ask(client.unwrap(), &sent), answer(server.unwrap(), sent.len()));
            } else {
                let accept = Secure::accept(here, server.clone(), Readers::default());
                let (client, server) = tokio::join!(connect, accept);
                let (client, server) = (client.unwrap(), server.unwrap());
                assert_eq!(client.alpn_protocol(), Some(&b"http/1.1"[..]));
                let both = [client.peer_certificates(), server.peer_certificates()];
                let both = both.map(|shown| tls::peer_role(&material, shown).unwrap());
                assert_eq!(both, [(HERE, Role::Worker), (HERE, Role::Edge)]);
                tokio::join!(ask(client, &sent), answer(server, sent.len()));
            }
        }
    }
}

/// A client and a server of tokio-rustls that have shaken hands.
async fn client_pair() -> (SecureClient<DuplexStream>, tokio_rustls::server::TlsStream<DuplexStream>) {
    let (client, name, server) = sides();
    let (here, there) = duplex(1 << 20);
    let (client, server) = tokio::join!(
        SecureClient::connect(there, client, name, Readers::default()),
        TlsAcceptor::from(server).accept(here)
    );
    (client.unwrap(), server.unwrap())
}

#[tokio::test]
async fn a_client_takes_other_keys_when_the_server_changes_them() {
    let (mut client, mut server) = client_pair().await;
    for round in 0..3 {
        server.get_mut().1.refresh_traffic_keys().unwrap();
        let (sent, mut got) = (noise(50_000 + round), vec![0; 50_000 + round]);
        server.write_all(&sent).await.unwrap();
        client.read_exact(&mut got).await.unwrap();
        client.write_all(&got).await.unwrap();
        client.flush().await.unwrap();
        server.read_exact(&mut got).await.unwrap();
        assert!(got == sent);
    }
}

#[tokio::test]
async fn a_client_takes_an_end_that_was_not_announced_for_an_error() {
    let (mut client, mut server) = client_pair().await;
    server.write_all(b"half").await.unwrap();
    server.flush().await.unwrap();
    drop(server);
    let mut got = Vec::new();
    let error = client.read_to_end(&mut got).await.unwrap_err();
    assert_eq!((got.as_slice(), error.kind()), (&b"half"[..], io::ErrorKind::UnexpectedEof));
}

#[tokio::test]
async fn what_came_is_read_though_nothing_can_be_sent_any_more() {
    let (mut client, mut server) = client_pair().await;
    server.write_all(b"refused").await.unwrap();
    server.flush().await.unwrap();
    // More than the pipe holds, so that some of it waits; and nobody takes it.
    let sent = noise(2 << 20);
    assert!(client.write_all(&sent).now_or_never().is_none());
    drop(server);
    let mut got = [0; 7];
    client.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"refused");
    assert!(client.write_all(&sent).await.is_err());
}

#[tokio::test]
async fn a_server_of_another_name_is_told_why_it_is_left() {
    let (client, _, server) = sides();
    let (here, there) = duplex(1 << 20);
    let name = "another.example".try_into().unwrap();
    let (client, server) = tokio::join!(
        SecureClient::connect(there, client, name, Readers::default()),
        Secure::accept(here, server, Readers::default())
    );
    assert_eq!(client.err().unwrap().kind(), io::ErrorKind::InvalidData);
    let told = server.err().unwrap();
    assert!(told.to_string().contains("BadCertificate"), "{told}");
}

fn noise(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 251) as u8).collect()
}

#[test]
fn what_every_connection_keeps_is_small() {
    // A size class of the allocator.
    assert!(size_of::<Secure<tokio::net::TcpStream>>() <= 1280);
}

fn holds_nothing(server: &Secure<DuplexStream>) -> bool {
    server.incoming.capacity() + server.plain.capacity() + server.outgoing.held() == 0
        && server.may_read_ahead.is_none()
}

#[tokio::test]
async fn bytes_go_both_ways_whole_whatever_the_pipe_holds() {
    for pipe in [7, 1000, 64 << 10, 1 << 20] {
        let (mut client, mut server) = pair(pipe).await;
        assert_eq!(server.alpn_protocol(), Some(&b"h2"[..]));
        let sent = noise(300_001);
        let talk = async {
            client.write_all(&sent).await.unwrap();
            client.flush().await.unwrap();
            let mut back = vec![0; sent.len()];
            client.read_exact(&mut back).await.unwrap();
            assert!(back == sent);
            client.shutdown().await.unwrap();
            assert_eq!(client.read(&mut back).await.unwrap(), 0, "it says goodbye, too");
        };
        let echo = async {
            assert!(server.has_more().await.unwrap());
            let mut got = vec![0; sent.len()];
            // First with less room than a record has, then with more.
            let (small, large) = got.split_at_mut(1000);
            server.read_exact(small).await.unwrap();
            server.read_exact(large).await.unwrap();
            assert!(got == sent);
            let (head, rest) = got.split_at(100);
            let pieces = [io::IoSlice::new(head), io::IoSlice::new(&[]), io::IoSlice::new(&rest[..500])];
            assert_eq!(server.write_vectored(&pieces).await.unwrap(), 600);
            server.write_all(&got[600..]).await.unwrap();
            server.flush().await.unwrap();
            assert_eq!(server.read(&mut got).await.unwrap(), 0);
            assert!(!server.has_more().await.unwrap());
            server.shutdown().await.unwrap();
        };
        tokio::join!(talk, echo);
    }
}

#[tokio::test]
async fn who_says_nothing_costs_no_buffer_and_who_is_fast_reads_ahead() {
    let (mut client, mut server) = pair(1 << 20).await;
    let mut room = vec![0; 64 << 10];
    for round in 0..2 {
        let idle = server.has_more().now_or_never();
        assert!(idle.is_none() && holds_nothing(&server), "{round}");
        client.write_all(&noise(256 << 10)).await.unwrap();
        let mut sizes = Vec::new();
        while sizes.iter().sum::<usize>() < 256 << 10 {
            sizes.push(server.read(&mut room).await.unwrap());
            // Whatever it holds is bounded.
            assert!(server.incoming.capacity() <= 2 * AHEAD && server.plain.len() <= AHEAD);
        }
        assert!(sizes.contains(&room.len()), "one read takes several records: {sizes:?}");
    }
    let readers = server.readers.clone();
    assert_eq!(readers.0.available_permits(), READERS - 1);
    drop(server);
    assert_eq!(readers.0.available_permits(), READERS);
}

#[tokio::test]
async fn without_a_permit_a_record_is_read_at_once() {
    let (mut client, mut server) = pair(1 << 20).await;
    server.readers.0.close();
    client.write_all(&noise(100_000)).await.unwrap();
    let mut got = vec![0; 100_000];
    server.read_exact(&mut got).await.unwrap();
    assert!(got == noise(100_000));
    assert!(server.incoming.capacity() <= 2 * RECORD && server.may_read_ahead.is_none());
}

#[tokio::test]
async fn an_end_that_was_not_announced_is_an_error() {
    let (mut client, mut server) = pair(1 << 20).await;
    client.write_all(b"half").await.unwrap();
    client.flush().await.unwrap();
    drop(client);
    let mut got = Vec::new();
    let error = server.read_to_end(&mut got).await.unwrap_err();
    assert_eq!((got.as_slice(), error.kind()), (&b"half"[..], io::ErrorKind::UnexpectedEof));
}

#[tokio::test]
async fn a_changed_byte_ends_the_connection_and_the_client_is_told_why() {
    let (client, mut server) = pair(1 << 20).await;
    let (mut pipe, mut session) = client.into_inner();
    let mut record = Vec::new();
    io::Write::write_all(&mut session.writer(), b"sealed").unwrap();
    session.write_tls(&mut record).unwrap();
    *record.last_mut().unwrap() ^= 1;
    pipe.write_all(&record).await.unwrap();
    for _ in 0..2 {
        let error = server.read(&mut [0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    }
    assert!(server.write_all(b"more").await.is_err());
    drop(server);
    let mut answer = Vec::new();
    pipe.read_to_end(&mut answer).await.unwrap();
    session.read_tls(&mut &answer[..]).unwrap();
    let told = session.process_new_packets().unwrap_err();
    assert_eq!(told, Error::AlertReceived(rustls::AlertDescription::BadRecordMac));
}

#[tokio::test]
async fn keys_are_changed_when_the_client_asks() {
    let (mut client, mut server) = pair(1 << 20).await;
    for round in 0..3 {
        client.get_mut().1.refresh_traffic_keys().unwrap();
        let (sent, mut got) = (noise(50_000 + round), vec![0; 50_000 + round]);
        client.write_all(&sent).await.unwrap();
        server.read_exact(&mut got).await.unwrap();
        server.write_all(&got).await.unwrap();
        server.flush().await.unwrap();
        client.read_exact(&mut got).await.unwrap();
        assert!(got == sent);
    }
}

#[tokio::test]
async fn a_hello_without_end_is_refused() {
    tls::install_provider();
    let material = ClusterMaterial::generate("test", &[(HERE, "dc-a")]).unwrap();
    let config = tls::edge_server(&material, SystemClock::shared()).unwrap();
    let (here, mut there) = duplex(1 << 20);
    // A handshake message of 16 MiB, in records of 16 KiB.
    let mut record = vec![0; RECORD - 256];
    record[..9].copy_from_slice(&[22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff]);
    there.write_all(&record).await.unwrap();
    record[5..9].fill(0);
    for _ in 0..8 {
        there.write_all(&record).await.unwrap();
    }
    let error = Secure::accept(here, config, Readers::default()).await.err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
}
