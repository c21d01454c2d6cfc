//! Either side of a TLS connection: rustls does what is TLS, and this moves the bytes.
//!
//! rustls's own buffers, which tokio-rustls uses, take a record from the socket in pieces, and give one record at a
//! time. Here one read of the socket brings several records, and one read by HTTP takes them all. A connection on
//! which nothing is under way has no buffers; one that is fast reads `AHEAD` bytes at once, if it is one of the
//! `READERS` that may: a courtesy and no lock, since without it one reads a record at a time.
//!
//! A [`Secure`] is owned by its connection's task, and ends with it. What it holds is bounded: `AHEAD` bytes of
//! ciphertext or of what was decrypted and not taken, and one write of `WRITE` bytes that was taken and not sent.

mod outgoing;

use std::future::poll_fn;
use std::io;
use std::ops::DerefMut;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, EncryptError, InsufficientSizeError,
    UnbufferedConnectionCommon, UnbufferedStatus, WriteTraffic,
};
use rustls::{ClientConfig, Error, HandshakeKind, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::io::poll_read_buf;

use self::outgoing::Outgoing;

/// The longest record there is on the wire (RFC 8446, section 5.2): five bytes, then what is sealed.
const RECORD: usize = 5 + (16 << 10) + 256;

/// What is read at first, and from whoever sends little.
const FIRST: usize = 4 << 10;

/// The most that is read ahead, and the longest message of a handshake.
const AHEAD: usize = 4 * RECORD;

/// Connections that may read ahead of a record at once.
const READERS: usize = 64;

/// The most that is sealed at once.
const WRITE: usize = 64 << 10;

/// What a record costs beside its bytes, with some to spare.
const SEAL: usize = 64;

/// Pieces of an answer that are no more together go into one record.
const JOINED: usize = 4 << 10;

/// Who may read ahead.
#[derive(Clone, Debug)]
pub struct Readers(Arc<Semaphore>);

impl Default for Readers {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(READERS)))
    }
}

/// The side of a connection that rustls is.
pub trait Side: DerefMut<Target = UnbufferedConnectionCommon<Self::Data>> {
    /// What rustls knows of this side alone.
    type Data;

    /// The next thing to be done, with what came or without.
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
}

/// A client's TLS connection, after its handshake.
pub type SecureClient<IO> = Secure<IO, UnbufferedClientConnection>;

/// A TLS connection, after its handshake: a server's, if nothing else is said.
pub struct Secure<IO, T = UnbufferedServerConnection> {
    io: IO,
    tls: T,
    /// Ciphertext that was not decrypted yet.
    incoming: BytesMut,
    /// How much to read at once: rises while it is filled, and falls while it is not.
    want: usize,
    /// Whether the last read took all it had room for, so that more is likely to be there.
    more: bool,
    readers: Readers,
    may_read_ahead: Option<OwnedSemaphorePermit>,
    /// What was decrypted and found no room.
    plain: BytesMut,
    /// What was sealed and is to be sent.
    outgoing: Outgoing,
    /// The other side said that it sends no more.
    ended: bool,
    said_goodbye: bool,
    /// Why there is nothing more to be done.
    failed: Option<Box<Error>>,
}

/// What a step is taken for.
enum For<'a, 'b> {
    /// To have what comes.
    Reading(&'a mut ReadBuf<'b>),
    /// To send this.
    Writing(&'a [u8]),
    /// To say that nothing more is sent.
    Closing,
}

/// What came of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Something; there may be more to do.
    On,
    /// What was to be sent is sealed.
    Sealed,
    /// Nothing, before more comes from the other side.
    Blocked,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Secure<IO> {
    /// Shakes hands with a client.
    pub async fn accept(io: IO, config: Arc<ServerConfig>, readers: Readers) -> io::Result<Self> {
        Self::greet(io, UnbufferedServerConnection::new(config), readers).await
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> SecureClient<IO> {
    /// Shakes hands with a server that must have this name.
    pub async fn connect(
        io: IO,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        readers: Readers,
    ) -> io::Result<Self> {
        let mut this = Self::greet(io, UnbufferedClientConnection::new(config, name), readers).await?;
        // The server waits for the last of it, whoever reads or writes here next.
        poll_fn(|cx| this.poll_send(cx)).await?;
        Ok(this)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin, T: Side> Secure<IO, T> {
    async fn greet(io: IO, tls: Result<T, Error>, readers: Readers) -> io::Result<Self> {
        let mut this = Self {
            io,
            tls: tls.map_err(io::Error::other)?,
            incoming: BytesMut::new(),
            want: FIRST,
            more: false,
            readers,
            may_read_ahead: None,
            plain: BytesMut::new(),
            outgoing: Outgoing::default(),
            ended: false,
            said_goodbye: false,
            failed: None,
        };
        poll_fn(|cx| this.poll_handshake(cx)).await?;
        Ok(this)
    }

    /// What was agreed to be spoken.
    pub fn alpn_protocol(&self) -> Option<&[u8]> {
        self.tls.alpn_protocol()
    }

    /// Whether an earlier session was resumed.
    pub fn is_resumed(&self) -> bool {
        self.tls.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// The certificates that the other side showed, if any, and TLS has verified.
    pub fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        self.tls.peer_certificates()
    }

    /// Waits for a first byte; false if none will come.
    pub async fn has_more(&mut self) -> io::Result<bool> {
        poll_fn(|cx| {
            while self.plain.is_empty() {
                if self.ended {
                    return Poll::Ready(Ok(false));
                }
                let step =
                    self.step(For::Reading(&mut ReadBuf::new(&mut []))).map_err(|e| self.fail(cx, e))?;
                if step == Step::Blocked && ready!(self.poll_receive(cx))? == 0 {
                    return Poll::Ready(Ok(false));
                }
            }
            Poll::Ready(Ok(true))
        })
        .await
    }

    fn poll_handshake(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let out = &mut ReadBuf::new(&mut []);
            while self.step(For::Reading(out)).map_err(|error| self.fail(cx, error))? != Step::Blocked {}
            // What does not go now goes with what comes next.
            let _ = self.poll_send(cx)?;
            if !self.tls.is_handshaking() {
                return Poll::Ready(Ok(()));
            }
            if self.ended || ready!(self.poll_receive(cx))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    /// One step of the protocol: with what came, or to what is sent.
    fn step(&mut self, goal: For<'_, '_>) -> Result<Step, Error> {
        if let Some(error) = &self.failed {
            return Err(Error::clone(error));
        }
        let UnbufferedStatus { mut discard, state } = self.tls.process(&mut self.incoming);
        let step = match state {
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                let mut none = ReadBuf::new(&mut []);
                let out = if let For::Reading(out) = goal { out } else { &mut none };
                loop {
                    match traffic.next_record() {
                        Some(Ok(record)) => {
                            discard += record.discard;
                            let (fits, rest) =
                                record.payload.split_at(out.remaining().min(record.payload.len()));
                            out.put_slice(fits);
                            self.plain.extend_from_slice(rest);
                        }
                        Some(Err(error)) => break Err(error),
                        None => break Ok(Step::On),
                    }
                }
            }
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                encode(&mut data, &mut self.outgoing);
                Ok(Step::On)
            }
            Ok(ConnectionState::TransmitTlsData(data)) => {
                // It is in line, before anything that is sealed from now on.
                data.done();
                Ok(Step::On)
            }
            Ok(ConnectionState::WriteTraffic(mut traffic)) => match goal {
                For::Reading(_) => Ok(Step::Blocked),
                For::Writing(bytes) => seal(&mut traffic, bytes, &mut self.outgoing).map(|()| Step::Sealed),
                For::Closing => {
                    // What has no room is encoded by the next step.
                    let len = traffic.queue_close_notify(self.outgoing.room(SEAL)).unwrap_or_default();
                    self.outgoing.add(len);
                    self.said_goodbye = true;
                    Ok(Step::Sealed)
                }
            },
            Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => {
                let known = std::mem::replace(&mut self.ended, true);
                Ok(if known { Step::Blocked } else { Step::On })
            }
            Ok(ConnectionState::BlockedHandshake) => Ok(Step::Blocked),
            // Early data is never offered.
            Ok(other) => Err(Error::General(format!("{other:?} was not expected"))),
            Err(error) => Err(error),
        };
        self.incoming.advance(discard);
        step
    }

    /// Notes why there is nothing more to be done, and tries to tell the other side.
    fn fail(&mut self, cx: &mut Context<'_>, error: Error) -> io::Error {
        if self.failed.is_none() {
            self.failed = Some(Box::new(error.clone()));
            // What is to be said comes before what came, which must not be looked at again.
            while self.tls.wants_write()
                && let Ok(ConnectionState::EncodeTlsData(mut alert)) =
                    self.tls.process(&mut self.incoming).state
            {
                encode(&mut alert, &mut self.outgoing);
            }
            let _ = self.poll_send(cx);
        }
        io::Error::new(io::ErrorKind::InvalidData, error)
    }

    /// Hands out what found no room before, then what can be decrypted, as long as there is room.
    fn hand_out(&mut self, out: &mut ReadBuf<'_>) -> Result<(), Error> {
        if !self.plain.is_empty() {
            let len = self.plain.len().min(out.remaining());
            out.put_slice(&self.plain[..len]);
            self.plain.advance(len);
            if self.plain.is_empty() {
                self.plain = BytesMut::new();
            }
        }
        while out.remaining() > 0 && !self.ended && self.step(For::Reading(out))? != Step::Blocked {}
        Ok(())
    }

    /// Reads from the socket; 0 at its end.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let held = self.incoming.len();
        if held >= AHEAD {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "a TLS message is too long")));
        }
        if self.want > RECORD && self.may_read_ahead.is_none() {
            self.may_read_ahead = self.readers.0.clone().try_acquire_owned().ok();
            if self.may_read_ahead.is_none() {
                self.want = RECORD;
            }
        }
        self.incoming.reserve(self.want.saturating_sub(held).max(FIRST));
        let room = self.incoming.capacity() - held;
        let read = poll_read_buf(Pin::new(&mut self.io), cx, &mut self.incoming);
        self.more = matches!(read, Poll::Ready(Ok(len)) if len == room);
        match read {
            Poll::Ready(Ok(_)) if self.more => self.want = (4 * self.want).min(AHEAD),
            Poll::Ready(Ok(len)) if len < self.want / 4 => self.want = (self.want / 2).max(FIRST),
            Poll::Ready(_) => {}
            Poll::Pending if self.incoming.is_empty() => {
                self.incoming = BytesMut::new();
                self.may_read_ahead = None;
            }
            Poll::Pending => {}
        }
        read
    }

    /// Seals `bytes` behind what waits to be sent.
    fn seal(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> io::Result<()> {
        loop {
            match self.step(For::Writing(bytes)).map_err(|error| self.fail(cx, error))? {
                Step::Sealed => return Ok(()),
                Step::Blocked => return Err(io::ErrorKind::BrokenPipe.into()),
                Step::On => {}
            }
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.outgoing.poll_send(cx, Pin::new(&mut self.io))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin, T: Side + Unpin> AsyncRead for Secure<IO, T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = out.filled().len();
        loop {
            let handed = this.hand_out(out).map_err(|error| this.fail(cx, error));
            let some = out.filled().len() > before;
            // Whoever got something hears of the failure the next time.
            if !some {
                handed?;
            }
            if !this.outgoing.is_empty() {
                // What rustls answers by itself, or what a write left. If it does not go now, it goes with the next; if it
                // cannot go, whoever writes hears of it, and what came counts still.
                let _ = this.poll_send(cx);
            }
            if out.remaining() == 0 || this.ended || this.failed.is_some() || (some && !this.more) {
                return Poll::Ready(Ok(()));
            }
            match this.poll_receive(cx) {
                Poll::Ready(Ok(0)) if !some => {
                    // An end that was not announced may have been made by somebody else.
                    return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                }
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(())),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) if !some => return Poll::Ready(Err(error)),
                Poll::Pending if !some => return Poll::Pending,
                Poll::Ready(Err(_)) | Poll::Pending => return Poll::Ready(Ok(())),
            }
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin, T: Side + Unpin> AsyncWrite for Secure<IO, T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        let total: usize = pieces.iter().map(|piece| piece.len()).sum();
        let mut taken = 0;
        if pieces.len() > 1 && total <= JOINED {
            this.seal(cx, &pieces.iter().flat_map(|piece| &piece[..]).copied().collect::<Vec<u8>>())?;
            taken = total;
        } else {
            for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
                let len = piece.len().min(WRITE - taken);
                this.seal(cx, &piece[..len])?;
                taken += len;
                if taken == WRITE {
                    break;
                }
            }
        }
        // What does not go now goes before the next.
        let _ = this.poll_send(cx)?;
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while !this.said_goodbye && this.failed.is_none() {
            match this.step(For::Closing).map_err(|error| this.fail(cx, error)) {
                Ok(Step::On | Step::Sealed) => {}
                // To whom nothing can be said nothing needs to be.
                Ok(Step::Blocked) | Err(_) => break,
            }
        }
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

/// Encodes what rustls has to say behind what waits to be sent.
fn encode<Data>(data: &mut EncodeTlsData<'_, Data>, outgoing: &mut Outgoing) {
    // Without room it says how much it needs.
    if let Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) = data.encode(&mut [])
    {
        let len = data.encode(outgoing.room(required_size)).unwrap_or_default();
        outgoing.add(len);
    }
}

/// Seals `bytes` behind what waits to be sent.
fn seal<Data>(
    traffic: &mut WriteTraffic<'_, Data>,
    bytes: &[u8],
    outgoing: &mut Outgoing,
) -> Result<(), Error> {
    let mut room = bytes.len() + (bytes.len() / (16 << 10) + 1) * SEAL;
    loop {
        match traffic.encrypt(bytes, outgoing.room(room)) {
            Ok(len) => {
                outgoing.add(len);
                return Ok(());
            }
            Err(EncryptError::InsufficientSize(InsufficientSizeError { required_size }))
                if required_size > room =>
            {
                room = required_size;
            }
            Err(error) => return Err(Error::General(error.to_string())),
        }
    }
}

#[cfg(test)]
mod tests;
