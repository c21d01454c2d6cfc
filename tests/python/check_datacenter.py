#!/usr/bin/env python3
"""A datacenter in Python and one of Sluice, `dc-a`, work together: as the client and as the peer that
docs/protocol.md describes. Prints the port on which it can be reached, reads where dc-a is (one line of JSON: keys,
peer, url, admin, token), prints what it saw, and fails at the first thing that should be otherwise."""

import http.client
import json
import os
import random
import ssl
import sys
import time
import traceback
import urllib.parse
import uuid
from dataclasses import replace

import grpc
from blake3 import blake3

from datacenter import Datacenter, Material, in_chunks, pb, pb_grpc
from sluice import Refused, command as c, hashing, names, sessions, tree
from sluice.names import Record, digest

A, B = 1, 2
MIB = 1 << 20
PATIENCE = 60


def noise(seed, length):
    return blake3(f"sluice datacenters {seed}".encode()).digest(length=length)


def check(what, got, expected=True):
    if got != expected:
        raise AssertionError(f"{what}: got {got!r}, expected {expected!r}")


class Door:
    """dc-a over HTTP."""

    def __init__(self, at, material):
        url = urllib.parse.urlsplit(at["url"])
        tls = ssl.create_default_context(cadata=material.ca.decode())
        self.connect = lambda: http.client.HTTPSConnection(url.hostname, url.port, context=tls, timeout=PATIENCE)
        self.connection = self.connect()
        self.token, self.admin = at["token"], at["admin"]

    def ask(self, method, path, body=None, headers=None, token=None):
        headers = {"Authorization": f"Bearer {token or self.token}", **(headers or {})}
        self.connection.request(method, f"/v1{path}", body, headers)
        answer = self.connection.getresponse()
        data = answer.read()
        if answer.will_close:
            self.connection.close()
        return answer.status, data, answer.headers

    def json(self, method, path, body=None, expected=200):
        headers = {"Content-Type": "application/json"} if body else {}
        status, data, _ = self.ask(method, path, json.dumps(body) if body else None, headers)
        check(f"{method} {path}: {data[:300]}", status, expected)
        return json.loads(data) if data else None

    def create(self, size, **more):
        id = uuid.UUID(int=random.getrandbits(128), version=4)
        self.json("POST", "/files", {"id": str(id), "size": size, "name": "a file", **more}, 201)
        return id

    def put(self, id, first, data, expected=200, announce=True):
        values = ",".join(hashing.chunk_value(first + i, part).hex() for i, part in enumerate(in_chunks(data)))
        headers = {"Chunk-Value": values} if announce else {}
        status, body, _ = self.ask("PUT", f"/files/{id}/chunks/{first}", data, headers)
        check(f"chunks {first}: {body[:300]}", status, expected)
        receipt = json.loads(body)
        check("values of a receipt", ",".join(receipt["values"]), values)
        return receipt

    def wait(self, id, state):
        end = time.monotonic() + PATIENCE
        while True:
            wanted = "assembled" if state == "assembled" else "complete"
            status = self.json("GET", f"/files/{id}?wait={wanted}&timeout=5")
            if status["state"] == state:
                return status
            if time.monotonic() > end:
                raise AssertionError(f"{id} is {status}, and not {state}")

    def problem(self, what, method, path, status, code, body=None, headers=None, token=None):
        got, data, _ = self.ask(method, path, body, headers, token)
        said = json.loads(data)
        check(what, (got, said["type"].rsplit("/", 1)[-1]), (status, code))
        check(f"{what}: a hint of what was expected", bool(said["detail"]))

    def metric(self, **labels):
        url = urllib.parse.urlsplit(self.admin)
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=PATIENCE)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        name = labels.pop("name", "sluice_commands_total")
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [line for line in lines if line.startswith(name) and all(label in line for label in wanted)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def runs(chunks, taken=()):
    """The chunks that are not taken, cut into runs at random and shuffled."""
    out, at = [], 0
    while at < chunks:
        fits = [n for n in (1, 2, 4, 8) if at % n == 0 and at + n <= chunks and not set(range(at, at + n)) & set(taken)]
        if fits:
            out.append((at, random.choice(fits)))
            at += out[-1][1]
        else:
            at += 1
    random.shuffle(out)
    return out


class Session:
    def __init__(self, dc, door, at):
        self.dc, self.door, self.at = dc, door, at
        self.tenant = sessions.verify_token(door.token, dc.m.token_public, dc.m.cluster, c.now_ms())["tenant"]

    def file_id(self, id):
        return names.file_id(self.tenant, id)

    def read_back(self, id, data):
        """Content, ranges and proofs, through dc-a."""
        door, chunks = self.door, tree.chunks_of(len(data))
        root = blake3(data).hexdigest()
        status, body, headers = door.ask("GET", f"/files/{id}/content")
        check("content", (status, blake3(body).hexdigest()), (200, root))
        check("ETag", headers["ETag"].strip('"'), root)
        for _ in range(4):
            first = random.randrange(len(data))
            last = min(len(data) - 1, first + random.randrange(2 * MIB))
            status, body, _ = door.ask("GET", f"/files/{id}/content", headers={"Range": f"bytes={first}-{last}"})
            check(f"bytes {first} to {last}", (status, body == data[first : last + 1]), (206, True))
        parts = in_chunks(data)
        some = random.sample(range(chunks), min(chunks, 5))
        for place in [(i, 0) for i in some] + list(tree.top_children(chunks) or ()):
            node = door.json("GET", f"/files/{id}/tree?start={place[0]}&level={place[1]}")
            values = [bytes.fromhex(value) for value in node["chunk_values"]]
            for i, value in zip(range(place[0], tree.end_of(place, chunks)), values):
                check(f"value of chunk {i}", value, hashing.chunk_value(i, parts[i]))
            check("root of a tree", node["root"], root)
            if chunks == 1:
                check("a proof of the only chunk", node["proof"], [])
                continue
            steps = [(step["start"], step["level"]) for step in node["proof"]]
            check("places of a proof", steps, tree.proof_places(place, chunks))
            beside = [bytes.fromhex(step["value"]) for step in node["proof"]]
            value = tree.merged(place, values, chunks)
            check("proof", tree.climb(place, value, beside, chunks).hex(), root)

    # What is done together

    def only_a_client(self):
        data = noise(1, 5 * MIB + 77)
        id = self.door.create(len(data))
        sent = runs(6)
        for first, count in sent:
            part = data[first * MIB : (first + count) * MIB]
            check("new chunks", self.door.put(id, first, part)["new_chunks"], count)
            check("again is as once", self.door.put(id, first, part)["new_chunks"], 0)
        status = self.door.wait(id, "assembled")
        check("root", status["root"], blake3(data).hexdigest())
        self.read_back(id, data)
        file = self.file_id(id)
        self.dc.wait("ASSEMBLED", lambda: self.dc.state(file) == "assembled")
        check("root that the peer was told", self.dc.files[file].ledger.root.hex(), status["root"])
        return f"{len(sent)} shuffled runs, read back with proofs, and the peer was told"

    def together_at_a(self):
        dc, data = self.dc, noise(2, 13 * MIB + 77)
        id = self.door.create(len(data))
        file, parts = self.file_id(id), in_chunks(data)
        dc.wait("META", lambda: dc.state(file) == "receiving")
        # Ours: a whole subtree, two single chunks, and one that dc-a has as well.
        ours = [0, 1, 2, 3, 9, 13]
        both = [2]
        for first, count in runs(14, set(ours) - set(both)):
            self.door.put(id, first, data[first * MIB : (first + count) * MIB])
        for i in random.sample(ours, len(ours)):
            dc.store(file, i, parts[i])
        with dc.lock:
            dc.say_spans(file)
        status = self.door.wait(id, "assembled")
        check("root", status["root"], blake3(data).hexdigest())
        dc.wait("ASSEMBLED", lambda: dc.state(file) == "assembled")
        dc.settled()
        asked = [said for said in dc.heard if said.file == file and said.kind == c.WANT_SPANS]
        check("dc-a compared what both have", bool(asked))
        dc.free(file)
        dc.settled()
        self.read_back(id, data)
        holders = {holder["dc"]: holder["chunks"] for holder in self.door.json("GET", f"/files/{id}")["holders"]}
        check("holders in the end", holders, {"dc-a": 14})
        return f"dc-a pulled {len(ours) - len(both)} chunks from Python, which freed them when that was confirmed"

    def together_here(self):
        dc, data = self.dc, noise(3, 11 * MIB + 1)
        id = self.door.create(len(data), home="dc-b")
        file, parts = self.file_id(id), in_chunks(data)
        dc.wait("META", lambda: dc.state(file) == "receiving")
        theirs = [0, 1, 4, 5, 6, 7, 11]
        for i in set(range(12)) - set(theirs):
            dc.store(file, i, parts[i])
        for i in random.sample(theirs, len(theirs)):
            self.door.put(id, i, parts[i])
        dc.wait("completion here", lambda: dc.files[file].published)
        status = self.door.wait(id, "assembled")
        check("root", status["root"], blake3(data).hexdigest())
        check("home", status["home"], "dc-b")
        # dc-a asks with a nonce before it frees its copy, and retracts it.
        gone = lambda: dc.files[file].ledger.holders.get(A) and not dc.files[file].ledger.holders[A].spans
        dc.wait("dc-a to free its copy", gone)
        check("CONFIRM", any(said.kind == c.CONFIRM and said.file == file for said in dc.heard))
        self.read_back(id, data)
        return f"Python was home, pulled {len(theirs)} chunks, and serves what dc-a gives out"

    def edges(self):
        dc = self.dc
        for size, home in ((0, "dc-a"), (1, "dc-a"), (MIB, "dc-a"), (0, "dc-b"), (1000, "dc-b"), (MIB + 1, "dc-b")):
            data = noise(size + 4, size)
            id = self.door.create(size, home=home, expected_root=blake3(data).hexdigest())
            file = self.file_id(id)
            dc.wait("META", lambda: dc.state(file) != "unheard")
            for i, part in enumerate(in_chunks(data)):
                # Always the other datacenter than the home.
                if home == "dc-a":
                    dc.store(file, i, part)
                else:
                    self.door.put(id, i, part)
            with dc.lock:
                dc.say_spans(file)
            status = self.door.wait(id, "assembled")
            check(f"root of {size} bytes", status["root"], blake3(data).hexdigest())
            if size:
                self.read_back(id, data)
        return "one chunk, a short last chunk and none, at both homes"

    def heard_of_late(self):
        """A chunk comes to dc-a before its metadata, which only Python knows."""
        dc, data = self.dc, noise(9, 3 * MIB)
        record = Record(self.tenant, uuid.uuid4(), len(data), 0, None, "late", "", {"k": "ü"})
        id, file = record.client_id, names.file_id(self.tenant, record.client_id)
        check("provisional", self.door.put(id, 1, data[MIB : 2 * MIB], expected=202)["provisional"])
        dc.wait("META_REQUEST", lambda: any(s.kind == c.META_REQUEST and s.file == file for s in dc.heard))
        dc.create(record, B)
        parts = in_chunks(data)
        for i in (0, 2):
            dc.store(file, i, parts[i])
        dc.wait("completion here", lambda: dc.files[file].published)
        self.door.wait(id, "assembled")
        check("user metadata", self.door.json("GET", f"/files/{id}")["metadata"], {"k": "ü"})
        self.read_back(id, data)
        return "UNKNOWN at first, then META, and the record in bulk"

    def conflict(self):
        dc, data = self.dc, noise(10, 4 * MIB)
        id = self.door.create(len(data))
        file, parts = self.file_id(id), in_chunks(data)
        dc.wait("META", lambda: dc.state(file) == "receiving")
        for i in range(4):
            if i != 1:
                self.door.put(id, i, parts[i])
        # The contradiction first: once a root is known it stands, and what contradicts it is rejected.
        for i in (2, 1):
            dc.store(file, i, noise(11, MIB))
            with dc.lock:
                dc.say_spans(file)
            dc.settled()
        dc.wait("CONFLICT", lambda: dc.state(file) == "conflict")
        start, level, root, home = dc.files[file].ledger.conflict
        check("what is contradicted", (start, level, root, home), (2, 0, bytes(32), A))
        check("state", self.door.wait(id, "conflict")["state"], "conflict")
        self.door.problem("content of a conflict", "GET", f"/files/{id}/content", 409, "conflict")
        check("DELETE", self.door.ask("DELETE", f"/files/{id}")[0], 204)
        dc.wait("DROP", lambda: dc.state(file) == "dropped")
        check("why", dc.files[file].ledger.drop, (2, self.tenant))
        return "other bytes for one chunk: CONFLICT names it, DELETE ends it"

    def a_lie(self):
        """Bytes that do not hash to what was said are not taken, and asked for again."""
        dc, data = self.dc, noise(12, 2 * MIB)
        id = self.door.create(len(data))
        file, parts = self.file_id(id), in_chunks(data)
        dc.wait("META", lambda: dc.state(file) == "receiving")
        self.door.put(id, 0, parts[0])
        before = self.door.metric(name="sluice_integrity_failures_total")
        asked = []

        def spoil(of, index, chunk):
            if of != file:
                return chunk
            asked.append(index)
            return chunk if len(asked) > 1 else bytes([chunk[0] ^ 1]) + chunk[1:]

        dc.spoil = spoil
        dc.store(file, 1, parts[1])
        with dc.lock:
            dc.say_spans(file)
        noticed = lambda: self.door.metric(name="sluice_integrity_failures_total") > before
        self.eventually("the lie to be noticed", noticed)
        # The root stands, and nobody has the chunk (yet).
        state = lambda: self.door.json("GET", f"/files/{id}")
        self.eventually("the chunk to be missing", lambda: (state()["state"], state()["missing"]) == ("receiving", [[1, 2]]))
        with dc.lock:
            dc.say_spans(file)
        check("root", self.door.wait(id, "assembled")["root"], blake3(data).hexdigest())
        dc.spoil = lambda file, index, chunk: chunk
        self.read_back(id, data)
        return "noticed, not published, asked for again"

    def whole(self):
        """Small files, each in one request: heard of as assembled elsewhere."""
        ids = [uuid.UUID(int=random.getrandbits(128), version=4) for _ in range(40)]
        for n, id in enumerate(ids):
            said = {"File-Metadata": json.dumps({"id": str(id)}), "Content-Type": "application/octet-stream"}
            status, body, _ = self.door.ask("POST", "/files", noise(100 + n, 77 * n), said)
            check(f"a file in one request: {body[:300]}", status, 201)
        for id in ids:
            file = self.file_id(id)
            self.dc.wait("ASSEMBLED", lambda: self.dc.state(file) == "assembled")
        return f"{len(ids)} in one request each, and heard of here"

    def compared(self):
        """After all that, both know the same, and can tell by 32 bytes."""
        dc = self.dc
        dc.settled()
        echoes = lambda: [s.digest for s in dc.heard if s.kind == c.WANT_FILES]
        equal = lambda: dc.set_digest()[0] in echoes()[-3:]

        def ask():
            # A digest that no set has: dc-a tells its own.
            dc.say(c.WANT_FILES, bytes(16), digest=noise(13, 32))
            time.sleep(0.2)
            return equal()

        files = len(dc.set_digest()[1])
        if files > 32:
            # It splits instead: every part must agree.
            dc.say(c.WANT_FILES, bytes(16), digest=noise(13, 32))
            split = lambda: {s.file: s for s in dc.heard if s.kind == c.WANT_FILES and s.aux == 4}
            dc.wait("16 parts", lambda: len(split()) == 16)
            agree = lambda: all(dc.set_digest(at, 4)[0] == said.digest for at, said in split().items())

            def again():
                dc.say(c.WANT_FILES, bytes(16), digest=noise(13, 32))
                time.sleep(0.2)
                return agree()

            self.eventually("equal digests", again)
            return f"16 digests of {files} files are equal"
        self.eventually("equal digests", ask)
        return f"the digest of {files} files is equal"

    # What is refused

    def wrong_commands(self):
        dc, file = self.dc, self.file_id(uuid.uuid4())
        key = dc.m.keys["command"]
        other_cluster = names.Key("command", names.cluster_tag("another"), B, key.number, self.seed("command"))
        as_context = names.Key("context", dc.m.tag, B, key.number, self.seed("command"))
        good = c.Command(
            c.HAVE, file, aux=3, a=8, b=dc.floor, digest=noise(14, 32), source=B, to=A, key=key.number,
            sequence=dc.incarnation << 32 | 1 << 30, slot=names.slot(file), sent_at=c.now_ms(),
        )
        wrong = {
            "kind": [replace(good, kind=17), replace(good, kind=0)],
            "reserved": [replace(good, home=1), replace(good, kind=c.CONFIRM, aux=0), replace(good, kind=c.UNKNOWN)],
            "field": [replace(good, kind=c.CONFIRM, aux=0, a=0, b=0, digest=c.NOTHING)],
            "span-level": [replace(good, aux=36)],
            "span-alignment": [replace(good, a=9)],
            "span-range": [replace(good, a=tree.MAX_CHUNKS), replace(good, a=(1 << 64) - 1)],
            "file-size": [replace(good, kind=c.ROOT, aux=0, a=tree.MAX_FILE_LEN + 1, b=0)],
            "slot": [replace(good, slot=4096)],
            "slot-of-file": [replace(good, slot=good.slot ^ 1)],
            "destination": [replace(good, to=7)],
            "sender": [replace(good, source=A), replace(good, source=c.EVERY)],
            "key-unknown": [replace(good, key=key.number ^ 1)],
            "key-owner": [replace(good, key=dc.m.ids["command"][A])],
        }
        data = {name: [said.sign(key) for said in all] for name, all in wrong.items()}
        signed = good.sign(key)
        data["signature"] = [
            signed[:-1] + bytes([signed[-1] ^ 1]), signed[:60] + b"\0\0" + signed[62:],
            good.sign(other_cluster), good.sign(as_context),
        ]
        changed = lambda at, byte: (lambda body: body + key.sign(body))(signed[:at] + bytes([byte]) + signed[at + 1 : 96])
        data["magic"], data["version"] = [changed(0, 0)], [changed(3, 2)]
        data["length"] = [signed[:-1], signed + signed[:1]]
        before = {name: self.door.metric(kind="none", outcome=name) for name in data}
        heard = len(dc.acknowledged)
        for name, all in data.items():
            for one in all:
                dc.send(one)
        for name, all in data.items():
            more = lambda: self.door.metric(kind="none", outcome=name) - before[name]
            self.eventually(f"{name} to be counted", lambda: more() == len(all))
        check("nothing wrong was acknowledged", len(dc.acknowledged), heard)
        check("nothing of it was kept", self.door.ask("GET", f"/files/{uuid.UUID(bytes=file)}")[0], 404)
        # The connection still works.
        dc.say(c.META_REQUEST, file)
        dc.wait("UNKNOWN", lambda: any(said.kind == c.UNKNOWN and said.file == file for said in dc.heard))
        return f"{sum(map(len, data.values()))} wrong ones, {len(data)} names"

    def seed(self, purpose):
        return dict(command=self.dc.m.keys["command"], context=self.dc.m.keys["context"])[
            purpose
        ].secret.private_bytes_raw()

    def wrong_calls(self):
        dc, file = self.dc, self.file_id(uuid.uuid4())
        stub, code = dc.bulk, grpc.StatusCode

        def refused(what, expected, problem, call):
            try:
                got = call()
                list(got) if hasattr(got, "__iter__") else got
            except grpc.RpcError as error:
                check(what, error.code(), expected)
                named = dict(error.trailing_metadata() or ()).get("sluice-problem")
                check(f"{what}: problem", named, problem)
            else:
                raise AssertionError(f"{what} was taken")

        greet = lambda **hello: stub.Link(iter([pb.LinkFrame(hello=pb.Hello(**hello))]), timeout=PATIENCE)
        wordless = lambda: stub.Link(iter([pb.LinkFrame(commands=bytes(160))]), timeout=PATIENCE)
        bad = code.INVALID_ARGUMENT, "invalid-parameter"
        missing = code.NOT_FOUND, "not-found"
        refused("no hello", *bad, wordless)
        refused("another's hello", code.PERMISSION_DENIED, "forbidden", lambda: greet(dc=A, incarnation=9))
        refused("a nobody's hello", code.PERMISSION_DENIED, "forbidden", lambda: greet(dc=70_000, incarnation=9))
        older = lambda: greet(dc=B, incarnation=dc.incarnation - 1)
        refused("an older incarnation", code.FAILED_PRECONDITION, "precondition", older)
        record = lambda file: stub.Record(pb.RecordRequest(file=file), timeout=PATIENCE)
        refused("a file id of 15 bytes", *bad, lambda: record(file[:15]))
        refused("a file that is not there", *missing, lambda: record(file))
        chunks = lambda **what: stub.Chunks(pb.ChunksRequest(file=file, **what), timeout=PATIENCE)
        refused("no chunks", *bad, lambda: chunks(start=0, count=0))
        refused("too many chunks", *bad, lambda: chunks(start=0, count=4097))
        refused("chunks past the end", *bad, lambda: chunks(start=tree.MAX_CHUNKS, count=1))
        refused("numbers that overflow", *bad, lambda: chunks(start=(1 << 64) - 1, count=2))
        refused("chunks that are not there", *missing, lambda: chunks(start=0, count=1))
        id = self.door.create(3 * MIB)
        values = lambda start, level: stub.Values(
            pb.ValuesRequest(file=self.file_id(id), start=start, level=level, under_start=start, under_level=level),
            timeout=PATIENCE,
        )
        refused("a misaligned place", *bad, lambda: values(1, 1))
        refused("the top", *bad, lambda: values(0, 2))
        refused("values that are not there", *missing, lambda: values(0, 1))

        now = c.now_ms()
        context = sessions.Context(
            dc.m.keys["context"].number, B, uuid.uuid4(), self.tenant, 7, 0, 0, 0, 0, now, now + 60_000, ()
        )
        key = dc.m.keys["context"]
        status = lambda data: stub.Status(pb.StatusRequest(context=data, id=id.bytes), timeout=PATIENCE)
        locate = lambda data: stub.Locate(pb.LocateRequest(context=data, id=id.bytes), timeout=PATIENCE)
        good = context.sign(key)
        check("status", json.loads(status(good).status)["state"], "receiving")
        stranger = replace(context, tenant=self.tenant + 1).sign(key)
        check("a file of another tenant", status(stranger).HasField("status"), False)
        refused("locate before it is complete", code.FAILED_PRECONDITION, "incomplete", lambda: locate(good))
        other = names.Key("context", names.cluster_tag("another"), B, key.number, self.seed("context"))
        unknown = replace(context, key=context.key ^ 1).sign(key)
        theirs = replace(context, key=dc.m.ids["context"][A]).sign(key)
        invalid, over = (code.UNAUTHENTICATED, "invalid-token"), (code.UNAUTHENTICATED, "expired-token")
        for what, data, expected in [
            ("a flipped bit", good[:30] + bytes([good[30] ^ 1]) + good[31:], invalid),
            ("of another cluster", context.sign(other), invalid),
            ("nothing", b"", invalid),
            ("too long", good + bytes(400), invalid),
            ("signed by another than it says", theirs, invalid),
            ("of the future", replace(context, issued_at=now + 100_000, ends_at=now + 200_000).sign(key), invalid),
            ("too long a life", replace(context, ends_at=now + 300_001).sign(key), invalid),
            ("datacenters that do not rise", replace(context, allowed=(A, A)).sign(key), invalid),
            ("over", replace(context, issued_at=now - 400_000, ends_at=now - 100_000).sign(key), over),
            ("a key that is not known yet", unknown, (code.UNAVAILABLE, "unavailable")),
            ("not here", replace(context, allowed=(B,)).sign(key), (code.PERMISSION_DENIED, "forbidden")),
            ("without the scope", replace(context, scopes=1).sign(key), (code.PERMISSION_DENIED, "forbidden")),
        ]:
            refused(f"a context, {what}", *expected, lambda: locate(data))
        return "links, bulk and contexts, each with its status"

    def wrong_requests(self):
        door, data = self.door, noise(15, 3 * MIB + 5)
        id = door.create(len(data))
        at = f"/files/{id}/chunks"
        octets = {"Content-Type": "application/octet-stream"}
        value = {"Chunk-Value": "00" * 32}
        for what, index, body, code in [
            ("no bytes", 0, b"", "chunk-length"),
            ("a byte short", 0, data[: MIB - 1], "chunk-length"),
            ("three chunks", 0, data[: 3 * MIB], "chunk-alignment"),
            ("not a multiple", 1, data[MIB : 3 * MIB], "chunk-alignment"),
            ("past the end", 4, b"x", "chunk-index"),
            ("past every end", tree.MAX_CHUNKS, b"x", "chunk-index"),
            ("a long last chunk", 3, data[:6], "chunk-length"),
        ]:
            door.problem(what, "PUT", f"{at}/{index}", 400, code, body, octets)
        door.problem("another value", "PUT", f"{at}/0", 422, "chunk-value", data[:MIB], value)
        check("nothing was kept", door.json("GET", f"/files/{id}")["missing_chunks"], 4)
        door.put(id, 0, data[:MIB])
        door.problem("other bytes", "PUT", f"{at}/0", 409, "chunk-conflict", data[1 : MIB + 1])
        door.problem("content before its time", "GET", f"/files/{id}/content", 409, "incomplete")
        door.problem("no such file", "GET", f"/files/{uuid.uuid4()}", 404, "not-found")
        door.problem("no id", "GET", "/files/nobody", 400, "invalid-id")
        head, body, signature = door.token.split(".")
        for token in (f"{head}.{body}.{signature[:-4]}AAAA", "x.y.z"):
            door.problem("a forged token", "GET", f"/files/{id}", 401, "invalid-token", token=token)
        other = json.dumps({"id": str(id), "size": 7})
        json_body = {"Content-Type": "application/json"}
        door.problem("other metadata", "POST", "/files", 409, "metadata-conflict", other, json_body)
        return "over HTTP, each with its problem"

    def eventually(self, what, ready):
        end = time.monotonic() + PATIENCE
        while not ready():
            if time.monotonic() > end:
                raise AssertionError(f"{what} did not come; refused here: {self.dc.refused}")
            time.sleep(0.05)


def main():
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(1 << 32)
    random.seed(seed)
    print(f"seed {seed}", file=sys.stderr)
    material = Material(sys.argv[1], B)
    dc = Datacenter(material, A, incarnation=3)
    print(json.dumps({"port": dc.port}), flush=True)
    at = json.loads(sys.stdin.readline())
    door = Door(at, material)
    dc.dial(at["peer"])
    session = Session(dc, door, at)
    dc.wait("the link back", lambda: any(said.kind == c.WANT_FILES for said in dc.heard))
    together = ["only_a_client", "together_at_a", "together_here", "edges", "heard_of_late", "conflict", "a_lie", "whole", "compared"]
    for name in together:
        print(f"{name.replace('_', ' '):16} {getattr(session, name)()}", flush=True)
    dc.settled()
    check("what dc-a refused of what was right", door.metric(kind="none"), 0)
    check("what was refused here", dc.refused, [])
    for name in ["wrong_commands", "wrong_calls", "wrong_requests"]:
        print(f"{name.replace('_', ' '):16} {getattr(session, name)()}", flush=True)
    check("what was refused here", dc.refused, [])
    again(session, material, at)
    print("passed", flush=True)


def again(session, material, at):
    """The datacenter is lost and starts anew, as another incarnation, with nothing: it is told all that is known."""
    before = {id for id, file in session.dc.files.items() if file.ledger.state() in ("assembled", "dropped")}
    session.dc.stop()
    dc = Datacenter(material, A, incarnation=4)
    # dc-a dials an address that it was given: only this direction comes back.
    hello = dc.dial(at["peer"])
    check("incarnation that dc-a has seen", hello.seen, 3)
    dc.say(c.WANT_FILES, bytes(16), digest=noise(16, 32))
    dc.stop()
    print(f"{'again':16} a new incarnation is greeted; {len(before)} files outlive the old one")


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        # Threads of gRPC would keep the process alive.
        traceback.print_exc()
        os._exit(1)
