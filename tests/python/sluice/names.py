"""Names of files and clusters, metadata records, keys."""

import struct
import unicodedata
import uuid

from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from . import Refused
from .tree import MAX_FILE_LEN

UNKNOWN_SIZE = (1 << 64) - 1


def digest(data):
    return blake3(data).digest()


def file_id(tenant, client_id):
    data = struct.pack(">Q", tenant) + client_id.bytes
    key = bytearray(blake3(data, derive_key_context="sluice 2026-11 file id v1").digest()[:16])
    key[6] = key[6] & 0x0F | 0x80
    key[8] = key[8] & 0x3F | 0x80
    return bytes(key)


def slot(file):
    return file[0] << 4 | file[1] >> 4


def cluster_tag(name):
    return blake3(name.encode(), derive_key_context="sluice 2026-11 cluster tag v1").digest()


class Key:
    """A secret key of one datacenter for one purpose."""

    def __init__(self, purpose, tag, dc, number, seed):
        self.prefix, self.dc, self.number = prefix(purpose, tag), dc, number
        self.secret = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self.secret.public_key().public_bytes_raw()

    def sign(self, body):
        return self.secret.sign(self.prefix + body)


class KeyRing:
    """The public keys for one purpose: number to datacenter and key."""

    def __init__(self, purpose, tag, keys):
        self.prefix, self.keys = prefix(purpose, tag), keys

    def verify(self, number, dc, body, signature):
        if number not in self.keys:
            raise Refused("key-unknown", f"{number}")
        owner, public = self.keys[number]
        if owner != dc:
            raise Refused("key-owner", f"{owner}, not {dc}")
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(signature, self.prefix + body)
        except InvalidSignature:
            raise Refused("signature") from None


def prefix(purpose, tag):
    return f"sluice/{purpose}/v1\0".encode() + tag


class Record:
    """A metadata record."""

    FIXED = ">4sQ16sQQB32s"

    def __init__(self, tenant, client_id, size, expiry_secs, expected_root, name, content_type, user):
        self.tenant, self.client_id, self.size, self.expiry_secs = tenant, client_id, size, expiry_secs
        self.expected_root, self.name, self.content_type, self.user = expected_root, name, content_type, user

    def to_bytes(self):
        size = UNKNOWN_SIZE if self.size is None else self.size
        root = self.expected_root or bytes(32)
        out = struct.pack(
            self.FIXED, b"SLM\x01", self.tenant, self.client_id.bytes, size, self.expiry_secs,
            self.expected_root is not None, root,
        )
        texts = [self.name, self.content_type]
        out += b"".join(map(_text, texts)) + struct.pack(">H", len(self.user))
        for key, value in sorted((key.encode(), value.encode()) for key, value in self.user.items()):
            out += struct.pack(">H", len(key)) + key + struct.pack(">H", len(value)) + value
        return out

    @classmethod
    def from_bytes(cls, data):
        if len(data) > 16_384:
            raise Refused("record-length", f"{len(data)}")
        fixed = struct.calcsize(cls.FIXED)
        if len(data) < fixed:
            raise Refused("malformed", "cut short")
        magic, tenant, client_id, size, expiry, has_root, root = struct.unpack_from(cls.FIXED, data)
        if magic != b"SLM\x01":
            raise Refused("malformed", "magic or version")
        if has_root > 1 or (has_root == 0 and root != bytes(32)):
            raise Refused("malformed", "expected root")
        reader = _Reader(data, fixed)
        name, content_type = reader.text(), reader.text()
        entries = [(reader.text(), reader.text()) for _ in range(reader.number())]
        if reader.at != len(data):
            raise Refused("malformed", "followed by something")
        keys = [key.encode() for key, _ in entries]
        rising = all(a < b for a, b in zip(keys, keys[1:]))
        if not rising:
            raise Refused("malformed", "keys")
        if size != UNKNOWN_SIZE and size > MAX_FILE_LEN:
            raise Refused("file-size", f"{size}")
        if expiry > 10 * 365 * 86_400:
            raise Refused("expiry", f"{expiry}")
        _check_text(name, 1024)
        if len(content_type.encode()) > 255:
            raise Refused("text-length", "content type")
        if not all(" " <= c <= "~" for c in content_type):
            raise Refused("text", "content type")
        if len(entries) > 64:
            raise Refused("entries", f"{len(entries)}")
        for key, value in entries:
            _check_text(key, 128)
            if not key:
                raise Refused("text", "empty key")
            _check_text(value, 2048)
        return cls(
            tenant, uuid.UUID(bytes=client_id), None if size == UNKNOWN_SIZE else size, expiry,
            root if has_root else None, name, content_type, dict(entries),
        )


def _text(text):
    data = text.encode()
    return struct.pack(">H", len(data)) + data


def _check_text(text, limit):
    if len(text.encode()) > limit:
        raise Refused("text-length")
    if any(unicodedata.category(c) == "Cc" for c in text):
        raise Refused("text", "control character")


class _Reader:
    def __init__(self, data, at):
        self.data, self.at = data, at

    def take(self, length):
        if self.at + length > len(self.data):
            raise Refused("malformed", "cut short")
        self.at += length
        return self.data[self.at - length : self.at]

    def number(self):
        return struct.unpack(">H", self.take(2))[0]

    def text(self):
        try:
            return self.take(self.number()).decode("utf-8", "strict")
        except UnicodeDecodeError:
            raise Refused("malformed", "no UTF-8") from None
