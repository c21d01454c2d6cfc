//! How the messages of clients are decoded: what they unfold to in memory is bounded by more than their length.
//!
//! An entry of a map costs six bytes on the wire and over a hundred in memory. Requests have no other repeated field,
//! and an unknown one is skipped, so a bound on the number of fields is a bound on memory.

use std::marker::PhantomData;

use bytes::Buf;
use prost::Message;
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder};
use tonic_prost::ProstEncoder;

use crate::ingest;

/// Bytes that a stream of messages begins to buffer with, and that are encoded before they are sent.
const BUFFER: usize = 8 << 10;

/// A message that may be decoded.
pub trait Bounded: Message + Default + Send + 'static {
    /// The most fields that it may have on the wire, each entry of a map counted.
    const MAX_FIELDS: usize;
}

macro_rules! bounded {
    ($max:expr; $($message:ident),+ $(,)?) => {
        $(impl Bounded for ingest::$message {
            const MAX_FIELDS: usize = $max;
        })+
    };
}

// Some more than any of them can use, for what later versions add.
bounded! { 128;
    AboutRequest, CreateRequest, SettleRequest, PutRequest, UploadRequest, StatusRequest, ListRequest, ReadRequest, TreeRequest,
    DeleteRequest,
}

// What a server says is bounded by whom one asks, and by the length of a message.
bounded! { usize::MAX;
    AboutReply, CreateReply, Receipt, UploadResponse, FileStatus, ListReply, ReadResponse, TreeReply, DeleteReply,
}

/// Protobuf by prost, with a bound on the fields of what is decoded.
#[derive(Debug)]
pub struct BoundedCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for BoundedCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for BoundedCodec<T, U>
where
    T: Message + Send + 'static,
    U: Bounded,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = BoundedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::new(BUFFER, BUFFER))
    }

    fn decoder(&mut self) -> Self::Decoder {
        BoundedDecoder(PhantomData)
    }
}

/// The decoding half of [`BoundedCodec`]. What it does not take is an invalid argument.
#[derive(Debug)]
pub struct BoundedDecoder<U>(PhantomData<U>);

impl<U: Bounded> Decoder for BoundedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // All of the message is there, and in one piece.
        if count_fields(buf.chunk(), U::MAX_FIELDS).is_none() {
            return Err(Status::invalid_argument(format!(
                "the message has more than {} fields, or is no protobuf",
                U::MAX_FIELDS
            )));
        }
        let decoded = U::decode(buf);
        decoded
            .map(Some)
            .map_err(|error| Status::invalid_argument(format!("the message is malformed: {error}")))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER, BUFFER)
    }
}

/// How many fields a message has on its first level; `None` if they are more than `max`, or it is none. Groups, which
/// proto3 does not have, are counted as what stands in them.
fn count_fields(mut message: &[u8], max: usize) -> Option<usize> {
    let mut fields = 0;
    while !message.is_empty() {
        if fields == max {
            return None;
        }
        let tag = varint(&mut message)?;
        let skipped = match tag & 7 {
            0 => varint(&mut message).map(|_| 0)?,
            1 => 8,
            2 => varint(&mut message)?,
            3 | 4 => 0,
            5 => 4,
            _ => return None,
        };
        message = message.get(usize::try_from(skipped).ok()?..)?;
        fields += 1;
    }
    Some(fields)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..70).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        // Of the tenth byte one bit counts; what more it has is for prost to refuse.
        value |= u64::from(byte & 0x7F).checked_shl(shift).unwrap_or(0);
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingest::{Begin, CreateRequest, TreeReply, UploadRequest};

    #[test]
    fn fields_are_counted_as_they_stand_on_the_wire() {
        let begin = Begin { id: "x".into(), start: 300, length: 1 << 40, values: vec![7; 64].into() };
        let upload = UploadRequest { run: u64::MAX, begin: Some(begin), data: vec![1; 70_000].into() };
        assert_eq!(count_fields(&upload.encode_to_vec(), 128), Some(3));
        let mut create = CreateRequest { size: Some(0), ..CreateRequest::default() };
        for i in 0..127 {
            create.metadata.insert(i.to_string(), String::new());
        }
        assert_eq!(count_fields(&create.encode_to_vec(), 128), Some(128));
        create.name = "one more".into();
        assert_eq!(count_fields(&create.encode_to_vec(), 128), None);
        assert_eq!(count_fields(&[], 0), Some(0));
        let tree = TreeReply { chunk_values: vec![vec![1; 32].into(); 4096], ..TreeReply::default() };
        assert_eq!(count_fields(&tree.encode_to_vec(), usize::MAX), Some(4096));
    }

    #[test]
    fn what_is_no_message_is_not_counted() {
        for bad in [
            &[0x0A][..],
            &[0x0A, 5, 1],
            &[0x08],
            &[0x0D, 1, 2, 3],
            &[0x09, 1],
            &[0x0F],
            &[0xFF; 11],
            &[0x0A, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 1],
        ] {
            assert_eq!(count_fields(bad, 128), None, "{bad:?}");
        }
    }
}
