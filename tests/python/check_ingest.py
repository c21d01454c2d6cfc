#!/usr/bin/env python3
"""A client made from ingest.proto alone: sends files to a running cluster through gRPC, chunk by chunk and over streams
with credit, shuffled and spread over its datacenters, reads them back, and asks for what must be refused.

    check_ingest.py --ca FILE --token FILE [--seed N] URL URL...

Prints the id and the root of what it sent; fails at the first difference."""

import argparse
import importlib
import itertools
import queue
import random
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from blake3 import blake3
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from grpc_tools import protoc

from sluice import hashing

CHUNK = 1 << 20
PIECE = 64 << 10
PATIENCE = 60
PROTO = Path(__file__).parents[2] / "proto"


def generated():
    """The modules that protoc makes of ingest.proto."""
    with tempfile.TemporaryDirectory() as made:
        arguments = ["protoc", f"-I{PROTO}", f"--python_out={made}", f"--grpc_python_out={made}"]
        if protoc.main([*arguments, "sluice/v1/ingest.proto"]) != 0:
            sys.exit("protoc does not take ingest.proto")
        # `sluice` is a package here, too: look for the modules in what was made.
        import sluice

        sluice.__path__.append(f"{made}/sluice")
        names = ("sluice.v1.ingest_pb2", "sluice.v1.ingest_pb2_grpc")
        return [importlib.import_module(name) for name in names]


pb, service = generated()


def expect(what, got, expected):
    if got != expected:
        sys.exit(f"{what}: got {got!r}, expected {expected!r}")


class Refused(Exception):
    """What a call ended with, out of the details of its status."""

    def __init__(self, error):
        self.status = error.code()
        self.metadata = dict(error.trailing_metadata())
        self.info = self.request = self.retry = None
        for detail in rpc_status.from_call(error).details:
            for kind, name in (("ErrorInfo", "info"), ("RequestInfo", "request"), ("RetryInfo", "retry")):
                message = getattr(error_details_pb2, kind)()
                if detail.Unpack(message):
                    setattr(self, name, message)
        super().__init__(f"{error.details()} [{self.status}]")


def expect_refused(what, status, code, call):
    try:
        got = call()
    except grpc.RpcError as error:
        refused = Refused(error)
        expect(what, (refused.status, refused.info.reason), (status, code))
        expect(f"{what}, domain", refused.info.domain, "sluice")
        expect(f"{what}, metadata", refused.metadata["sluice-problem"], code)
        expect(f"{what}, trace", len(refused.request.request_id), 32)
        return refused
    sys.exit(f"{what}: taken as {got!r}, expected {code}")


class Datacenter:
    """One datacenter, through one connection."""

    def __init__(self, url, ca, token):
        encrypted = grpc.ssl_channel_credentials(ca)
        # Adds the metadata "authorization: Bearer <token>" to every call.
        authorized = grpc.access_token_call_credentials(token)
        self.channel = grpc.secure_channel(
            url.removeprefix("https://"), grpc.composite_channel_credentials(encrypted, authorized)
        )
        self.ingest = service.IngestStub(self.channel)
        self.name = self.ingest.About(pb.AboutRequest(), timeout=PATIENCE).dc

    def put(self, name, data, chunk):
        piece = data[chunk * CHUNK : (chunk + 1) * CHUNK]
        value = hashing.chunk_value(chunk, piece)
        request = pb.PutRequest(id=name, index=chunk, data=piece, value=value)
        receipt = self.ingest.Put(request, timeout=PATIENCE)
        expect(f"receipt of chunk {chunk}", (receipt.dc, receipt.values), (self.name, value))

    def upload(self, runs):
        """Sends runs (id, first chunk, bytes) over one stream: of each no more than is granted. Returns what became of
        each, by its number in the list."""
        requests = queue.SimpleQueue()
        answers = self.ingest.Upload(iter(requests.get, None), timeout=PATIENCE)
        terms = next(answers).terms
        waiting = list(enumerate(runs, start=1))
        rest, credit, outcomes = {}, {}, {}

        def send(number):
            while rest[number] and credit[number] >= min(PIECE, len(rest[number])):
                piece, rest[number] = rest[number][:PIECE], rest[number][PIECE:]
                credit[number] -= len(piece)
                requests.put(pb.UploadRequest(run=number, data=bytes(piece)))

        def begin():
            while waiting and len(rest) < terms.runs:
                number, (name, start, data) = waiting.pop(0)
                head = pb.Begin(id=name, start=start, length=len(data))
                requests.put(pb.UploadRequest(run=number, begin=head))
                rest[number], credit[number] = memoryview(data), terms.credit
                send(number)
            if not rest:
                # Half-closes the stream, which then ends.
                requests.put(None)

        begin()
        for answer in answers:
            kind = answer.WhichOneof("answer")
            message = getattr(answer, kind)
            if kind == "grant":
                # A grant may cross the answer to its run.
                if message.run in rest:
                    credit[message.run] += message.bytes
                    send(message.run)
                continue
            outcomes[message.run] = message.receipt if kind == "stored" else message.problem
            del rest[message.run], credit[message.run]
            begin()
        return outcomes

    def status(self, name, wait_for=pb.STATE_UNSPECIFIED):
        return self.ingest.Status(pb.StatusRequest(id=name, wait_for=wait_for, timeout_secs=30), timeout=PATIENCE)

    def read(self, name, offset=0, length=None):
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return self.read_once(name, offset, length)
            except grpc.RpcError as error:
                # Chunks may be on their way to the home just now: the answer is to try again.
                if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def read_once(self, name, offset, length):
        answers = self.ingest.Read(pb.ReadRequest(id=name, offset=offset, length=length), timeout=PATIENCE)
        opened = next(answers).opened
        data = b"".join(answer.data for answer in answers)
        expect("bytes that were read", len(data), opened.length)
        return data


def create(dc, size, name=None):
    name = name or str(uuid.uuid4())
    reply = dc.ingest.Create(pb.CreateRequest(id=name, size=size, name="a.bin"), timeout=PATIENCE)
    expect("a new file", (reply.created, reply.status.id, reply.status.size), (True, name, size))
    return name


def check_same(dcs, name, data):
    """Every datacenter has the same file, all of it."""
    root = blake3(data).digest()
    for dc in dcs:
        status = dc.status(name, pb.STATE_COMPLETE)
        if status.state not in (pb.STATE_COMPLETE, pb.STATE_ASSEMBLED):
            sys.exit(f"{dc.name} does not find it complete: {status}")
        expect(f"root at {dc.name}", status.root, root)
        expect(f"bytes through {dc.name}", dc.read(name) == data, True)
    return root.hex()


def check_whole(dcs, name, data):
    """Every datacenter has the same file, which is longer than a chunk, and any part of it."""
    root = check_same(dcs, name, data)
    for dc in dcs:
        offset = len(data) // 3
        expect("a range", dc.read(name, offset, CHUNK + 1) == data[offset : offset + CHUNK + 1], True)
        expect("the end", dc.read(name, len(data) - 2, 100), data[-2:])
    tree = dcs[0].ingest.Tree(pb.TreeRequest(id=name, start=0, level=1), timeout=PATIENCE)
    values = [hashing.chunk_value(i, data[i * CHUNK : (i + 1) * CHUNK]) for i in range(2)]
    expect("the tree", list(tree.chunk_values), values)
    expect("its node", tree.value, hashing.merge(*values))
    return root


def check_puts(dcs, rng):
    """Chunks one by one, shuffled, each to any datacenter."""
    data = rng.randbytes(5 * CHUNK + 77)
    name = create(dcs[0], len(data))
    chunks = list(range(6))
    rng.shuffle(chunks)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda chunk: dcs[chunk % len(dcs)].put(name, data, chunk), chunks))
    print("put", name, check_whole(dcs, name, data))
    return name, data


def check_small(dcs, rng):
    """Small files, each with one call, the same again at another datacenter."""
    for size in (0, 1, 70_000, CHUNK):
        data, name = rng.randbytes(size), str(uuid.uuid4())
        request = pb.CreateRequest(id=name, name="small.bin", body=data)
        for number, dc in enumerate((dcs[0], dcs[-1])):
            reply = dc.ingest.Create(request, timeout=PATIENCE)
            expect(f"{size} bytes with one call", reply.status.root, blake3(data).digest())
            if number == 0:
                expect("a new file", (reply.created, reply.status.state), (True, pb.STATE_ASSEMBLED))
        print("create", name, check_same(dcs, name, data))


def check_streams(dcs, rng):
    """Runs of 1, 2, 4 and 8 chunks of two files, shuffled, over one stream to each datacenter at once."""
    files = []
    for size in (29 * CHUNK + 12345, 3 * CHUNK):
        data = rng.randbytes(size)
        files.append((create(dcs[-1], size), data))
    runs = []
    for name, data in files:
        start = 0
        while start * CHUNK < len(data):
            left = -(-len(data) // CHUNK) - start
            lengths = [count for count in (1, 2, 4, 8) if start % count == 0 and count <= left]
            count = rng.choice(lengths)
            runs.append((name, start, data[start * CHUNK : (start + count) * CHUNK]))
            start += count
    rng.shuffle(runs)
    parts = [runs[i :: len(dcs)] for i in range(len(dcs))]
    with ThreadPoolExecutor(len(dcs)) as pool:
        outcomes = list(pool.map(lambda dc, part: dc.upload(part), dcs, parts))
    for dc, part, outcome in zip(dcs, parts, outcomes):
        for number, (_, start, data) in enumerate(part, start=1):
            receipt = outcome[number]
            first = hashing.chunk_value(start, data[:CHUNK])
            expect(f"receipt of run {number}", (receipt.dc, receipt.values[:32]), (dc.name, first))
            expect(f"chunks of run {number}", len(receipt.values) // 32, -(-len(data) // CHUNK))
    for name, data in files:
        print("upload", name, check_whole(dcs, name, data))


def check_refusals(dcs, name, data):
    one, other = dcs[0], dcs[-1]
    status = grpc.StatusCode
    put = lambda **fields: lambda: one.ingest.Put(pb.PutRequest(**{"id": name, **fields}), timeout=PATIENCE)
    flipped = bytes([data[0] ^ 1]) + data[1:CHUNK]
    stands = expect_refused("other bytes", status.ALREADY_EXISTS, "chunk-conflict", put(index=0, data=flipped))
    expect("no time to come back", (stands.retry, "grpc-retry-pushback-ms" in stands.metadata), (None, False))
    expect_refused("a chunk too many", status.OUT_OF_RANGE, "chunk-index", put(index=6, data=flipped))
    expect_refused("a short chunk", status.INVALID_ARGUMENT, "chunk-length", put(index=0, data=flipped[1:]))
    expect_refused("no id", status.INVALID_ARGUMENT, "invalid-id", put(id="x", index=0, data=flipped))
    stranger = pb.StatusRequest(id=str(uuid.uuid4()))
    expect_refused("no file", status.NOT_FOUND, "not-found", lambda: other.ingest.Status(stranger, timeout=PATIENCE))
    compressed = lambda: one.ingest.About(pb.AboutRequest(), compression=grpc.Compression.Gzip, timeout=PATIENCE)
    expect_refused("compression", status.UNIMPLEMENTED, "encoding", compressed)

    # A run that is refused ends no other.
    chunk = lambda i: data[i * CHUNK : (i + 1) * CHUNK]
    outcomes = one.upload([(name, 0, flipped), ("x", 0, chunk(0)), (name, 1, chunk(1)), (name, 5, chunk(4))])
    codes = [getattr(outcomes[number], "code", "stored") for number in range(1, 5)]
    expect("runs that are wrong", codes, ["chunk-conflict", "invalid-id", "stored", "chunk-length"])

    def greedy():
        begin = pb.UploadRequest(run=1, begin=pb.Begin(id=str(uuid.uuid4()), start=0, length=8 * CHUNK))
        # All at once, whatever the terms are, and never an end.
        flood = (pb.UploadRequest(run=1, data=bytes(128 << 10)) for _ in itertools.count())
        for _ in one.ingest.Upload(itertools.chain([begin], flood), timeout=PATIENCE):
            pass

    expect_refused("more than is granted", status.FAILED_PRECONDITION, "credit-exceeded", greedy)


def check_lists(dcs, names):
    listed, after = [], ""
    while True:
        page = dcs[0].ingest.List(pb.ListRequest(limit=1, after=after), timeout=PATIENCE)
        listed += [file.id for file in page.files]
        after = page.next
        if not after:
            break
    expect("the list, page by page", set(names) <= set(listed) and listed == sorted(listed), True)


def check_health(dc):
    # HealthCheckResponse { status: SERVING }, as it stands on the wire.
    check = dc.channel.unary_unary("/grpc.health.v1.Health/Check")
    expect("health", check(b"", timeout=PATIENCE), b"\x08\x01")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ca", type=Path, required=True)
    parser.add_argument("--token", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("urls", nargs="+")
    arguments = parser.parse_args()
    print("seed", arguments.seed)
    rng = random.Random(arguments.seed)
    ca, token = arguments.ca.read_bytes(), arguments.token.read_text().strip()
    dcs = [Datacenter(url, ca, token) for url in arguments.urls]
    name, data = check_puts(dcs, rng)
    check_small(dcs, rng)
    check_streams(dcs, rng)
    check_refusals(dcs, name, data)
    check_lists(dcs, [name])
    check_health(dcs[0])
    for _ in range(2):
        dcs[-1].ingest.Delete(pb.DeleteRequest(id=name), timeout=PATIENCE)
    gone = lambda: dcs[-1].status(name)
    expect_refused("a file that was deleted", grpc.StatusCode.NOT_FOUND, "dropped", gone)
    address = arguments.urls[0].removeprefix("https://")
    nobody = service.IngestStub(grpc.secure_channel(address, grpc.ssl_channel_credentials(ca)))
    about = lambda: nobody.About(pb.AboutRequest(), timeout=PATIENCE)
    expect_refused("no token", grpc.StatusCode.UNAUTHENTICATED, "unauthenticated", about)
    print("passed")


if __name__ == "__main__":
    main()
