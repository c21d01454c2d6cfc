//! Where in a trace something stands, as it goes from one to another: W3C Trace Context, `traceparent`.
//!
//! Version 00 is `00-<32 hex>-<16 hex>-<2 hex>`: trace, span, flags (bit 0: whether it is recorded). Between datacenters the
//! same goes in 25 bytes: trace (16), span (8), flags (1).

use std::fmt;

use http::HeaderValue;

/// Name of the header that carries a [`TraceContext`].
pub const TRACEPARENT: &str = "traceparent";

/// Names a trace: 16 bytes, not all zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceId([u8; 16]);

impl TraceId {
    /// The bytes.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A step of a trace: what follows from it has it for a parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    id: TraceId,
    span: [u8; 8],
    is_recorded: bool,
}

impl TraceContext {
    /// Length of [`to_bytes`](Self::to_bytes).
    pub const LEN: usize = 25;

    /// A step; `None` if the name of the trace or of the step is all zero.
    pub fn new(trace: [u8; 16], span: [u8; 8], is_recorded: bool) -> Option<Self> {
        (trace != [0; 16] && span != [0; 8]).then_some(Self { id: TraceId(trace), span, is_recorded })
    }

    /// The trace.
    pub fn id(&self) -> TraceId {
        self.id
    }

    /// The step.
    pub fn span(&self) -> [u8; 8] {
        self.span
    }

    /// Whether whoever did this step records it.
    pub fn is_recorded(&self) -> bool {
        self.is_recorded
    }

    /// Reads a header. A later version may say more after what is known.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (head, rest) = text.split_at_checked(55)?;
        let lower_hex = |b: &u8| b.is_ascii_digit() || (b'a'..=b'f').contains(b);
        let well_formed = head[2] == b'-'
            && head[35] == b'-'
            && head[52] == b'-'
            && [&head[..2], &head[3..35], &head[36..52], &head[53..]]
                .iter()
                .all(|part| part.iter().all(lower_hex));
        let version = &head[..2];
        let ends = rest.is_empty() || (version != b"00" && rest[0] == b'-');
        if !well_formed || version == b"ff" || !ends {
            return None;
        }
        let (mut id, mut span, mut flags) = ([0; 16], [0; 8], [0; 1]);
        hex::decode_to_slice(&head[3..35], &mut id).ok()?;
        hex::decode_to_slice(&head[36..52], &mut span).ok()?;
        hex::decode_to_slice(&head[53..], &mut flags).ok()?;
        Self::new(id, span, flags[0] & 1 == 1)
    }

    /// The header.
    pub fn header(&self) -> HeaderValue {
        // Digits and hyphens are what a header may hold.
        HeaderValue::try_from(self.to_string()).unwrap_or_else(|_| HeaderValue::from_static(""))
    }

    /// As it goes between datacenters.
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..16].copy_from_slice(&self.id.0);
        out[16..24].copy_from_slice(&self.span);
        out[24] = u8::from(self.is_recorded);
        out
    }

    /// Reads [`to_bytes`](Self::to_bytes).
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::LEN] = bytes.try_into().ok()?;
        let (id, span) = (bytes.first_chunk()?, bytes[16..].first_chunk()?);
        Self::new(*id, *span, bytes[24] & 1 == 1)
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{}-{}-{:02x}", self.id, hex::encode(self.span), u8::from(self.is_recorded))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_step_is_said_as_it_was_read() {
        let step = TraceContext::parse(HEADER.as_bytes()).unwrap();
        assert_eq!(step.to_string(), HEADER);
        assert_eq!(step.header(), HEADER);
        assert!(step.is_recorded());
        assert_eq!(step.id().to_string(), "0af7651916cd43dd8448eb211c80319c");
        let bytes = "0af7651916cd43dd8448eb211c80319cb7ad6b716920333101";
        assert_eq!(hex::encode(step.to_bytes()), bytes);
        assert_eq!(TraceContext::from_bytes(&step.to_bytes()), Some(step));
        assert_eq!(TraceContext::from_bytes(&step.to_bytes()[1..]), None);
        assert_eq!(TraceContext::from_bytes(&[0; TraceContext::LEN]), None);
        assert!(TraceContext::parse(format!("01{}-more", &HEADER[2..]).as_bytes()).is_some());
    }

    #[test]
    fn what_is_no_step_is_not_taken_for_one() {
        for bad in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        ] {
            assert_eq!(TraceContext::parse(bad.as_bytes()), None, "{bad}");
        }
    }
}
