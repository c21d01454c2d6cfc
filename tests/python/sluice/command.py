"""Commands: 160 bytes, signed."""

import struct
import time
from dataclasses import dataclass

from . import Refused
from .names import UNKNOWN_SIZE, digest, slot
from .tree import MAX_FILE_LEN, check_place

BODY = ">3sBBBHHHI16sQQ32sQH6s"
NOTHING = bytes(32)
EVERY = 0xFFFF
NOTHING_HELD = 255

META_REQUEST, META, UNKNOWN, HAVE, WANT_SPANS, WANT_FILES, ROOT, ASSEMBLED = range(1, 9)
CONFIRM, DROP, REVOKE, LOAD, DRAIN, SESSION_MOVE, ACK, CONFLICT = range(9, 17)

NAMES = dict(
    enumerate(
        "META_REQUEST META UNKNOWN HAVE WANT_SPANS WANT_FILES ROOT ASSEMBLED CONFIRM DROP REVOKE LOAD DRAIN "
        "SESSION_MOVE ACK CONFLICT".split(),
        start=1,
    )
)

# The fields that each kind uses; all others must be zero.
FIELDS = {
    META_REQUEST: (), META: ("aux", "home", "a", "b", "digest"), UNKNOWN: (),
    HAVE: ("aux", "a", "b", "digest"), WANT_SPANS: ("aux", "a"), WANT_FILES: ("aux", "digest"),
    ROOT: ("aux", "home", "a", "digest"), ASSEMBLED: ("aux", "home", "a", "b", "digest"), CONFIRM: ("b",),
    DROP: ("aux", "b"), REVOKE: ("a", "b"), LOAD: ("a", "b"), DRAIN: ("aux", "a", "b"),
    SESSION_MOVE: ("aux", "a", "b"), ACK: ("a", "digest"), CONFLICT: ("aux", "home", "a", "digest"),
}
ABOUT_A_FILE = {META_REQUEST, META, UNKNOWN, HAVE, WANT_SPANS, ROOT, ASSEMBLED, CONFIRM, DROP, CONFLICT}
FACTS = {META, HAVE, ROOT, ASSEMBLED, DROP, CONFLICT}


@dataclass(frozen=True)
class Command:
    kind: int
    file: bytes
    aux: int = 0
    home: int = 0
    a: int = 0
    b: int = 0
    digest: bytes = NOTHING
    source: int = 0
    to: int = 0
    key: int = 0
    sequence: int = 0
    slot: int = 0
    sent_at: int = 0

    @property
    def name(self):
        return NAMES[self.kind]

    def body(self):
        return struct.pack(
            BODY, b"SLC", 1, self.kind, self.aux, self.source, self.to, self.home, self.key, self.file, self.a,
            self.b, self.digest, self.sequence, self.slot, self.sent_at.to_bytes(6, "big"),
        )

    def sign(self, key):
        body = self.body()
        return body + key.sign(body)


def decode(data):
    """Reads 160 bytes without asking whose they are."""
    if len(data) != 160:
        raise Refused("length", f"{len(data)}")
    (magic, version, kind, aux, source, to, home, key, file, a, b, said, sequence, number, sent) = struct.unpack(
        BODY, data[:96]
    )
    if magic != b"SLC":
        raise Refused("magic")
    if version != 1:
        raise Refused("version", f"{version}")
    if kind not in NAMES:
        raise Refused("kind", f"{kind}")
    fields = {"aux": aux, "home": home, "a": a, "b": b, "digest": int.from_bytes(said, "big")}
    used = ("aux", "b") if kind == HAVE and aux == NOTHING_HELD else FIELDS[kind]
    for name, value in fields.items():
        if value and name not in used:
            raise Refused("reserved", name)
    _check_fields(kind, aux, home, a, b, file)
    if number >= 4096:
        raise Refused("slot", f"{number}")
    if kind in ABOUT_A_FILE and number != slot(file):
        raise Refused("slot-of-file", f"{number}")
    return Command(kind, file, aux, home, a, b, said, source, to, key, sequence, number, int.from_bytes(sent, "big"))


def _check_fields(kind, aux, home, a, b, file):
    if kind in (META, ROOT, ASSEMBLED, CONFLICT) and home == EVERY:
        raise Refused("field", "home")
    if kind in (META, ROOT, ASSEMBLED) and a > MAX_FILE_LEN and not (kind == META and a == UNKNOWN_SIZE):
        raise Refused("file-size", f"{a}")
    if kind in (WANT_SPANS, CONFLICT) or (kind == HAVE and aux != NOTHING_HELD):
        check_place(a, aux)
    if kind == WANT_FILES:
        if aux > 48:
            raise Refused("field", "aux")
        if int.from_bytes(file, "big") << aux & (1 << 128) - 1:
            raise Refused("reserved", "FileId after the prefix")
    if kind == CONFIRM and b == 0:
        raise Refused("field", "b")
    if kind in (DROP, DRAIN) and aux not in (1, 2, 3) and not (kind == DRAIN and (aux, a, b) == (0, 0, 0)):
        raise Refused("field", "aux")
    if kind == LOAD and b > 0xFFFF:
        raise Refused("field", "b")
    if kind == DRAIN and (b >= 1 << 17 or b & 0xFFFF == EVERY):
        raise Refused("field", "b")


def verify(data, ring, me):
    """Reads 160 bytes and verifies form, destination, sender, key and signature; the command and its digest."""
    command = decode(data)
    if command.to not in (me, EVERY):
        raise Refused("destination", f"{command.to}")
    if command.source in (me, EVERY):
        raise Refused("sender", f"{command.source}")
    ring.verify(command.key, command.source, data[:96], data[96:])
    return command, digest(data)


def now_ms():
    return time.time_ns() // 1_000_000
