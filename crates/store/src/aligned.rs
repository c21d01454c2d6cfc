//! A buffer whose bytes a disk can take as they are.

use bytes::{Buf, Bytes, BytesMut};

/// What the address of bytes, their length and their place in a file are multiples of when they go to the disk
/// without a copy in the page cache: a page, which is also the largest block that filesystems have.
pub const ALIGN: usize = 4 << 10;

/// Gathers bytes at an address that is a multiple of [`ALIGN`]. What it gives out is used again once nobody has it.
#[derive(Debug, Default)]
pub struct AlignedBuffer(BytesMut);

impl AlignedBuffer {
    /// A buffer without room.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes room for `len` bytes in one piece. Only an empty buffer is aligned by it.
    pub fn reserve(&mut self, len: usize) {
        if !self.0.is_empty() {
            self.0.reserve(len);
            return;
        }
        self.0.reserve(len + ALIGN);
        let before = self.0.as_ptr().align_offset(ALIGN);
        self.0.resize(before, 0);
        self.0.advance(before);
    }

    /// Adds bytes behind those that are there.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Gives out the bytes that were gathered.
    pub fn take(&mut self) -> Bytes {
        self.0.split().freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_aligned_and_their_room_is_used_again() {
        let mut buffer = AlignedBuffer::new();
        let mut places = Vec::new();
        for len in [1 << 20, 7, 1 << 20, 3 * ALIGN + 1] {
            buffer.reserve(len);
            buffer.extend(&vec![len as u8; len]);
            let bytes = buffer.take();
            assert_eq!((bytes.as_ptr().align_offset(ALIGN), bytes.len()), (0, len));
            assert!(bytes.iter().all(|byte| *byte == len as u8));
            assert!(buffer.is_empty());
            places.push(bytes.as_ptr());
        }
        places.dedup();
        assert_eq!(places.len(), 1, "one allocation serves all");
    }

    #[test]
    fn what_is_given_out_is_not_touched() {
        let mut buffer = AlignedBuffer::new();
        buffer.reserve(10);
        buffer.extend(&[1; 10]);
        let first = buffer.take();
        buffer.reserve(10);
        buffer.extend(&[2; 10]);
        assert_eq!((&first[..], &buffer.take()[..]), (&[1; 10][..], &[2; 10][..]));
    }
}
