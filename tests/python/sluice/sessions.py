"""Session contexts and tokens."""

import struct
import uuid
from dataclasses import dataclass

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from . import Refused

SCOPES = {1: "write", 2: "read", 4: "delete", 8: "operate"}
HEAD, TAIL = ">4sIH16sQIQQ", ">QQQB"
TOLERANCE_MS = 60_000
MAX_LIFE_MS = 300_000


@dataclass(frozen=True)
class Context:
    key: int
    issuer: int
    session: uuid.UUID
    tenant: int
    scopes: int
    rate: int
    quota: int
    quota_files: int
    revocation: int
    issued_at: int
    ends_at: int
    allowed: tuple

    def sign(self, key):
        body = struct.pack(
            HEAD, b"SLX\x02" if self.quota_files else b"SLX\x01", self.key, self.issuer, self.session.bytes,
            self.tenant, self.scopes, self.rate, self.quota,
        )
        if self.quota_files:
            body += struct.pack(">Q", self.quota_files)
        body += struct.pack(TAIL, self.revocation, self.issued_at, self.ends_at, len(self.allowed))
        body += b"".join(struct.pack(">H", dc) for dc in self.allowed)
        return body + key.sign(body)

    def scope_names(self):
        return [name for bit, name in SCOPES.items() if self.scopes & bit]


def verify_context(data, ring, me, now):
    at, extra = struct.calcsize(HEAD), 8 if data[:4] == b"SLX\x02" else 0
    fixed = at + extra + struct.calcsize(TAIL)
    if not fixed + 64 <= len(data) <= fixed + 128 + 64:
        raise Refused("malformed", "length")
    body, signature = data[:-64], data[-64:]
    magic, key, issuer, session, *head = struct.unpack_from(HEAD, body)
    if magic not in (b"SLX\x01", b"SLX\x02"):
        raise Refused("malformed", "magic or version")
    quota_files = struct.unpack_from(">Q", body, at)[0] if extra else 0
    *tail, count = struct.unpack_from(TAIL, body, at + extra)
    ring.verify(key, issuer, body, signature)
    if count > 64 or len(body) != fixed + 2 * count:
        raise Refused("malformed", "allowed datacenters")
    allowed = struct.unpack_from(f">{count}H", body, fixed)
    if any(a >= b for a, b in zip(allowed, allowed[1:])):
        raise Refused("malformed", "allowed datacenters do not rise")
    if extra and quota_files == 0:
        raise Refused("malformed", "version 2 without a quota in files")
    context = Context(key, issuer, uuid.UUID(bytes=session), *head, quota_files, *tail, allowed)
    if context.ends_at - context.issued_at > MAX_LIFE_MS:
        raise Refused("malformed", "lives too long")
    if context.issued_at > now + TOLERANCE_MS:
        raise Refused("not-yet")
    if now > context.ends_at + TOLERANCE_MS:
        raise Refused("expired")
    if allowed and me not in allowed:
        raise Refused("not-here")
    return context


def verify_token(text, public, cluster, now):
    """The claims of a token, times checked against `now` in milliseconds."""
    if len(text) > 4096:
        raise Refused("invalid", "too long")
    needed = ["iss", "sub", "tenant", "scopes", "quota", "rate", "epoch", "iat", "nbf", "exp", "jti"]
    options = {"require": needed, "verify_exp": False, "verify_nbf": False, "verify_iat": False}
    try:
        key = Ed25519PublicKey.from_public_bytes(public)
        claims = jwt.decode(text, key, algorithms=["EdDSA"], issuer=cluster, options=options)
        numbers = [claims[name] for name in ("tenant", "quota", "rate", "epoch", "iat", "nbf", "exp")]
        numbers.append(claims.get("quota_files", 0))
        uuid.UUID(claims["jti"])
    except (jwt.InvalidTokenError, ValueError) as error:
        raise Refused("invalid", str(error)) from None
    if not all(isinstance(number, int) and 0 <= number < 1 << 64 for number in numbers):
        raise Refused("invalid", "numbers")
    if len(claims.get("dcs", [])) > 64:
        raise Refused("invalid", "datacenters")
    if now // 1000 > claims["exp"] + 60:
        raise Refused("expired")
    if claims["nbf"] > now // 1000 + 60:
        raise Refused("not-yet")
    return claims
