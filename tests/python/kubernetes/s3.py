"""S3 outside of the cluster: a real Garage, behind TLS, with the bucket that the manifests name."""

import datetime
import os
import pathlib
import re
import secrets
import shutil
import sys
import time

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PATIENCE = 60
# Whom `node` knows as this.
PLACE = "s3"

CONFIG = """
metadata_dir = "{at}/meta"
data_dir = "{at}/data"
db_engine = "lmdb"
lmdb_map_size = "1G"
data_fsync = true
metadata_fsync = true
replication_factor = 1
rpc_bind_addr = "127.0.0.1:3901"
rpc_public_addr = "127.0.0.1:3901"
rpc_secret = "{rpc}"
[s3_api]
s3_region = "{region}"
api_bind_addr = "127.0.0.1:3900"
"""

# Garage does not end TLS itself.
TLS = """
import asyncio, ssl, sys

async def pipe(source, sink):
    try:
        while piece := await source.read(1 << 18):
            sink.write(piece)
            await sink.drain()
    except OSError:
        pass
    finally:
        sink.close()

async def relay(source, sink):
    from_there, there = await asyncio.open_connection("127.0.0.1", 3900)
    await asyncio.gather(pipe(source, there), pipe(from_there, sink))

async def main():
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*sys.argv[1:])
    await (await asyncio.start_server(relay, "0.0.0.0", 443, ssl=context)).serve_forever()

asyncio.run(main())
"""


def garage():
    """The program, if it is there."""
    cargo = pathlib.Path(os.environ.get("CARGO_HOME", pathlib.Path.home() / ".cargo"))
    return shutil.which("garage") or shutil.which("garage", path=str(cargo / "bin"))


def certified(name):
    """A certificate that vouches for itself, for a day, and its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number(), now,
                                   now + datetime.timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    return made.public_bytes(pem), key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


class S3:
    def __init__(self, home, config):
        """Of the bucket in this configuration; what processes have to know of it is in `home`/s3 from now on."""
        said = dict(re.findall(r'^(\w+) = "(.*)"$', config, re.MULTILINE))
        self.host, self.bucket, self.region = said["endpoint"].removeprefix("https://"), said["bucket"], said["region"]
        self.id, self.secret = f"GK{secrets.token_hex(12)}", secrets.token_hex(32)
        self.directory, known, self.processes = home / "garage", home / "s3", []
        self.identity = [known / "ca.pem", self.directory / "key.pem"]
        for directory in (self.directory, known):
            directory.mkdir()
        (known / "credentials.toml").write_text(f'key_id = "{self.id}"\nsecret = "{self.secret}"\n')
        for path, pem in zip(self.identity, certified(self.host), strict=True):
            path.write_bytes(pem)

    def start(self, node):
        """As an outsider of `node`, which it is known to by its name."""
        node.outsider(PLACE, PLACE, self.host)
        config = self.directory / "garage.toml"
        config.write_text(CONFIG.format(at=self.directory, rpc=secrets.token_hex(32), region=self.region))
        environment = {"GARAGE_DEFAULT_ACCESS_KEY": self.id, "GARAGE_DEFAULT_SECRET_KEY": self.secret,
                       "GARAGE_DEFAULT_BUCKET": self.bucket, "RUST_LOG": "garage=warn"}
        with open(self.directory / "log", "w") as log:
            for args in ([garage(), "-c", config, "server", "--single-node", "--default-bucket"],
                         [sys.executable, "-c", TLS, *self.identity]):
                self.processes.append(node.command(PLACE, args, env=environment, stdout=log, stderr=log))
        # What serves S3 listens when the bucket is there.
        listens = [sys.executable, "-c", "import socket; socket.create_connection(('127.0.0.1', 3900), timeout=1)"]
        until = time.monotonic() + PATIENCE
        while node.command(PLACE, listens).wait() != 0:
            said = (self.directory / "log").read_text()
            assert time.monotonic() < until and all(one.poll() is None for one in self.processes), f"no S3: {said}"
            time.sleep(0.1)

    def stop(self):
        for process in self.processes:
            process.kill()
            process.wait()
