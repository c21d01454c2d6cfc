"""A whole peer datacenter in memory, from docs/protocol.md: it greets, states and takes facts, holds chunks and gives
them out, and as a home completes, pulls, verifies and confirms."""

import importlib
import json
import queue
import random
import sys
import tempfile
import threading
import time
import uuid
from concurrent import futures
from pathlib import Path

import grpc
from blake3 import blake3

from sluice import Refused, command as c, names, sessions, tree
from sluice.hashing import CHUNK_LEN, chunk_value
from sluice.ledger import Ledger, set_digest
from sluice.names import Key, KeyRing, Record, cluster_tag, digest

PROTO = Path(__file__).parents[2] / "proto"
RESTATE_S = 1.0
CALL_S = 30
PIECE = 200_000  # Not a part of a chunk, on purpose: pieces need not end with one.


def load_proto():
    """The classes of peer.proto, made by protoc here and now."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory(prefix="sluice-proto-") as out:
        arguments = [f"-I{PROTO}", f"--python_out={out}", f"--grpc_python_out={out}", "sluice/peer/v1/peer.proto"]
        if protoc.main(["protoc", *arguments]) != 0:
            raise RuntimeError("peer.proto does not compile")
        # `sluice` is a package here, too: the generated one becomes part of it.
        sys.modules["sluice"].__path__.append(f"{out}/sluice")
        return [importlib.import_module(f"sluice.peer.v1.{name}") for name in ("peer_pb2", "peer_pb2_grpc")]


pb, pb_grpc = load_proto()


class Material:
    """What one datacenter has of a cluster's keys."""

    def __init__(self, directory, me):
        directory = Path(directory)
        index = json.loads((directory / "cluster.json").read_text())
        self.cluster, self.me = index["cluster"], me
        self.tag = cluster_tag(self.cluster)
        self.dcs = {dc["number"]: dc["name"] for dc in index["dcs"]}
        self.ids, self.rings, self.keys = {}, {}, {}
        own = directory / f"dc-{me}"
        for purpose in ("command", "context"):
            keys = {dc["number"]: (dc[purpose]["id"], bytes.fromhex(dc[purpose]["public"])) for dc in index["dcs"]}
            ring = {number: (dc, public) for dc, (number, public) in keys.items()}
            self.rings[purpose] = KeyRing(purpose, self.tag, ring)
            seed = bytes.fromhex((own / f"{purpose}.key").read_text().strip())
            self.keys[purpose] = Key(purpose, self.tag, me, keys[me][0], seed)
            self.ids[purpose] = {dc: number for dc, (number, _) in keys.items()}
        self.token_public = bytes.fromhex(index["token_public"])
        self.ca = (directory / "ca.pem").read_bytes()
        self.chain, self.secret = (own / "peer.pem").read_bytes(), (own / "peer-key.pem").read_bytes()

    def peer_name(self, dc):
        return f"dc-{dc}.peer.{self.cluster}.sluice"

    def server_credentials(self):
        return grpc.ssl_server_credentials([(self.secret, self.chain)], self.ca, require_client_auth=True)

    def channel(self, dc, address):
        """A connection of its own: mutual TLS, and the name of that datacenter."""
        credentials = grpc.ssl_channel_credentials(self.ca, self.secret, self.chain)
        options = [
            ("grpc.ssl_target_name_override", self.peer_name(dc)),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ]
        return grpc.secure_channel(address, credentials, options)


class File:
    """What is here of one file."""

    def __init__(self):
        self.ledger, self.record, self.published = Ledger(), None, False
        self.chunks, self.values = {}, {}
        self.own_epoch = None


class Datacenter(pb_grpc.PeerServicer):
    def __init__(self, material, peer, incarnation):
        self.m, self.me, self.peer, self.incarnation = material, material.me, peer, incarnation
        self.seen = 0
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.files = {}
        self.spoken = 0
        self.floor = incarnation << 32
        self.generations = {}
        self.flights = {}  # sequence: (digest, command, when)
        self.acknowledged = []
        self.heard = []  # commands in order of arrival
        self.refused = []  # what came and was not acceptable
        self.spoil = lambda file, index, data: data  # lets a test lie
        self.asked_in_vain = set()
        self.link = None
        self.running, self.last_error = True, None
        self.outbox = queue.Queue()
        self.work = queue.Queue()
        options = [
            ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.so_reuseport", 0),
        ]
        self.server = grpc.server(futures.ThreadPoolExecutor(32), options=options)
        pb_grpc.add_PeerServicer_to_server(self, self.server)
        self.port = self.server.add_secure_port("127.0.0.1:0", material.server_credentials())
        self.server.start()

    # Links

    def dial(self, address):
        """Greets the peer; its Hello."""
        channel = self.m.channel(self.peer, address)
        self.bulk = pb_grpc.PeerStub(self.m.channel(self.peer, address))
        hello = pb.Hello(dc=self.me, incarnation=self.incarnation, seen=self.seen)
        self.outbox = outbox = queue.Queue()
        outbox.put(pb.LinkFrame(hello=hello))
        self.link = pb_grpc.PeerStub(channel).Link(iter(outbox.get, None))
        answer = next(self.link).hello
        self.seen = max(self.seen, answer.incarnation)
        threads = (self._resend, self._work)
        for thread in threads:
            threading.Thread(target=thread, daemon=True).start()
        with self.lock:
            self.compare()
        return answer

    def stop(self):
        self.running = False
        self.outbox.put(None)
        self.work.put(None)
        if self.link is not None:
            self.link.cancel()
        self.server.stop(None)

    def Link(self, frames, context):
        hello = next(frames).hello
        if hello.dc != self.peer:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "the certificate is another datacenter's")
        seen = self.seen
        self.seen = max(seen, hello.incarnation)
        yield pb.LinkFrame(hello=pb.Hello(dc=self.me, incarnation=self.incarnation, seen=seen))
        if hello.incarnation < seen:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "a newer incarnation has spoken")
        for frame in frames:
            data = frame.commands
            if not data or len(data) % 160 or len(data) > 64 * 160:
                self.refused.append(("frame", len(data)))
                continue
            for at in range(0, len(data), 160):
                with self.lock:
                    self._take(data[at : at + 160])
                    self.changed.notify_all()

    # Speaking

    def say(self, kind, file, count_on_it=True, **fields):
        """Signs a command and sends it; facts are said again until they are acknowledged."""
        with self.lock:
            self.spoken += 1
            sequence = self.incarnation << 32 | self.spoken
            said = c.Command(
                kind, file, source=self.me, to=self.peer, key=self.m.keys["command"].number, sequence=sequence,
                slot=names.slot(file), sent_at=c.now_ms(), **fields,
            )
            data = said.sign(self.m.keys["command"])
            is_answer = kind == c.ASSEMBLED and said.b != 0
            if kind in c.FACTS and count_on_it and not is_answer:
                self.flights[sequence] = (digest(data), said, time.monotonic())
            self.send(data)
            return sequence

    def send(self, data):
        self.outbox.put(pb.LinkFrame(commands=data))

    def _resend(self):
        while self.running:
            time.sleep(RESTATE_S / 4)
            with self.lock:
                late = [s for s, (_, _, at) in self.flights.items() if time.monotonic() - at > RESTATE_S]
                for sequence in late:
                    _, said, _ = self.flights.pop(sequence)
                    fields = {name: getattr(said, name) for name in ("aux", "home", "a", "b", "digest")}
                    self.say(said.kind, said.file, **fields)

    def say_facts(self, id):
        """All that is known of a file, apart from spans."""
        ledger = self.files[id].ledger
        if ledger.drop:
            reason, tenant = ledger.drop
            self.say(c.DROP, id, aux=reason, b=tenant)
            return
        if ledger.claim is None:
            return
        epoch, home = ledger.claim
        for record, tenant in ledger.metas:
            for size in ledger.sizes or [names.UNKNOWN_SIZE]:
                self.say(c.META, id, aux=epoch, home=home, a=size, b=tenant, digest=record)
        for root, size in ledger.roots:
            self.say(c.ROOT, id, aux=epoch, home=home, a=size, digest=root)
        if self.me in ledger.assembled:
            self._say_assembled(id, 0)
        if ledger.assembled_at(self.peer):
            fields = {"aux": ledger.assembled[self.peer], "home": self.peer, "a": ledger.size}
            self.say(c.ASSEMBLED, id, digest=ledger.root, **fields)
        if ledger.conflict:
            start, level, root, found_by = ledger.conflict
            self.say(c.CONFLICT, id, aux=level, home=found_by, a=start, digest=root)

    def say_spans(self, id):
        """All that is held here, to the home."""
        ledger = self.files[id].ledger
        if ledger.size is None or ledger.claim is None or ledger.claim[1] != self.peer:
            return
        holding = ledger.holders.get(self.me)
        if holding is None or not holding.spans:
            generation = holding.generation if holding else self.floor
            self.say(c.HAVE, id, aux=c.NOTHING_HELD, b=generation)
            return
        for (start, level), value in sorted(holding.spans.items()):
            self.say(c.HAVE, id, aux=level, a=start, b=holding.generation, digest=value)

    def _say_assembled(self, id, nonce):
        ledger = self.files[id].ledger
        fields = {"aux": ledger.assembled[self.me], "home": self.me, "a": ledger.size, "digest": ledger.root}
        self.say(c.ASSEMBLED, id, b=nonce, **fields)

    def compare(self, prefix=bytes(16), bits=0):
        self.say(c.WANT_FILES, prefix, aux=bits, digest=self.set_digest(prefix, bits)[0])

    def set_digest(self, prefix=bytes(16), bits=0):
        with self.lock:
            return set_digest({id: file.ledger for id, file in self.files.items()}, self.me, self.peer, prefix, bits)

    # Listening

    def _take(self, data):
        try:
            said, of_it = c.verify(data, self.m.rings["command"], self.me)
        except Refused as refused:
            self.refused.append((refused.code, data.hex()))
            return
        self.seen = max(self.seen, said.sequence >> 32)
        self.heard.append(said)
        if said.kind == c.ACK:
            self._acknowledged(said)
        elif said.kind == c.META_REQUEST:
            self._asked(said.file)
        elif said.kind == c.WANT_SPANS:
            self._asked_for_spans(said)
        elif said.kind == c.WANT_FILES:
            self._compare(said)
        elif said.kind == c.CONFIRM:
            self._confirm(said)
        elif said.kind in c.FACTS:
            self._fact(said, of_it)

    def _acknowledged(self, said):
        flight = self.flights.pop(said.a, None)
        if flight is None:
            return  # Said again since; the first has arrived after all.
        if flight[0] != said.digest:
            self.refused.append(("ack", said.a))
        self.acknowledged.append(said.a)

    def _asked(self, id):
        if id in self.files and self.files[id].ledger.state() != "unheard":
            self.say_facts(id)
            self.say_spans(id)
        else:
            self.asked_in_vain.add(id)
            self.say(c.UNKNOWN, id)

    def _asked_for_spans(self, said):
        file = self.files.get(said.file)
        holding = file and file.ledger.holders.get(self.me)
        if not holding or not holding.spans:
            generation = holding.generation if holding else self.floor
            self.say(c.HAVE, said.file, aux=c.NOTHING_HELD, b=generation)
            return
        chunks = tree.chunks_of(file.ledger.size)
        place = (said.a, said.aux)
        for child in tree.children(place, chunks) or (place,):
            for start, level in self._held_under(file, child, chunks):
                value = self._value(file, (start, level), chunks)
                self.say(c.HAVE, said.file, aux=level, a=start, b=holding.generation, digest=value)

    def _held_under(self, file, place, chunks):
        if all(i in file.values for i in range(place[0], tree.end_of(place, chunks))):
            return [place]
        below = tree.children(place, chunks) or ()
        return [held for child in below for held in self._held_under(file, child, chunks)]

    def _value(self, file, place, chunks):
        return tree.merged(place, [file.values[i] for i in range(place[0], tree.end_of(place, chunks))], chunks)

    def _compare(self, said):
        mine, files = self.set_digest(said.file, said.aux)
        if mine == said.digest:
            return
        if len(files) > 8 and said.aux + 4 <= 48:
            bits = said.aux + 4
            for part in range(16):
                prefix = int.from_bytes(said.file, "big") | part << 128 - bits
                self.compare(prefix.to_bytes(16, "big"), bits)
            return
        for id in files:
            self.say_facts(id)
            self.say_spans(id)

    def _confirm(self, said):
        file = self.files.get(said.file)
        if file and file.published and self._root(file) == file.ledger.root:
            self._say_assembled(said.file, said.b)

    def _fact(self, said, of_it):
        file = self.files.get(said.file) or File()
        if said.kind == c.ASSEMBLED and said.home == self.me and not self._reminded(said, file):
            return
        before = file.ledger.state(), file.ledger.claim
        if not file.ledger.take(said):
            return
        self.files[said.file] = file
        if not (said.kind == c.ASSEMBLED and said.b):
            self.say(c.ACK, bytes(16), a=said.sequence, digest=of_it)
        if file.ledger.drop:
            file.chunks.clear(), file.values.clear()
            file.published = False
        if before[0] == "unheard" and said.file in self.asked_in_vain:
            self.asked_in_vain.discard(said.file)
        self.work.put(said.file)

    def _reminded(self, said, file):
        """The peer believes that the file is assembled here; whether that may be acknowledged."""
        ledger, claim = file.ledger, (said.aux, said.home)
        if ledger.drop:
            return True
        if ledger.claim is None or ledger.claim < claim or not ledger.metas:
            return False
        if ledger.claim == claim and not file.published:
            record, tenant = ledger.metas[0]
            size = names.UNKNOWN_SIZE if ledger.size is None else ledger.size
            self._own(said.file, c.META, aux=said.aux + 1, home=self.me, a=size, b=tenant, digest=record)
        return True

    # What takes time

    def _work(self):
        while (id := self.work.get()) is not None:
            try:
                self._advance(id)
            except grpc.RpcError as error:
                if self.running:
                    time.sleep(0.05)
                    self.work.put(id)
                    self.last_error = error
            with self.lock:
                self.changed.notify_all()

    def _advance(self, id):
        file = self.files[id]
        ledger = file.ledger
        if ledger.claim is None or ledger.drop:
            return
        if file.record is None and (ledger.claim[1] == self.me or file.chunks):
            data = self.bulk.Record(pb.RecordRequest(file=id), timeout=CALL_S).record
            record = Record.from_bytes(data)
            if digest(data) not in [known for known, _ in ledger.metas]:
                raise AssertionError("another record than META said")
            if names.file_id(record.tenant, record.client_id) != id:
                raise AssertionError("the record of another file")
            file.record = data
        if ledger.claim[1] == self.me and ledger.size is not None and not file.published:
            self._complete(id, file)

    def _complete(self, id, file):
        """Home duties: say ROOT when all is there and agrees, pull, publish."""
        ledger, chunks = file.ledger, tree.chunks_of(file.ledger.size)
        with self.lock:
            holders = {dc: dict(holding.spans) for dc, holding in ledger.holders.items()}
        covered = {
            i for spans in holders.values() for place in spans for i in range(place[0], tree.end_of(place, chunks))
        }
        if len(covered) < chunks or ledger.state() not in ("receiving", "complete"):
            return
        missing = [i for i in range(chunks) if i not in file.values]
        for place, value in sorted(holders.get(self.peer, {}).items()):
            self._pull(id, file, place, value, missing, chunks)
        root = self._root(file)
        expected = Record.from_bytes(file.record).expected_root
        with self.lock:
            if expected not in (None, root):
                self._own(id, c.CONFLICT, aux=0, home=self.me, digest=root)
                return
            self._own(id, c.ROOT, home=self.me, aux=ledger.claim[0], a=ledger.size, digest=root)
            file.published = True
            self._own(id, c.ASSEMBLED, home=self.me, aux=ledger.claim[0], a=ledger.size, digest=root)

    def _own(self, id, kind, **fields):
        """A fact of our own: taken here, and said."""
        self.files[id].ledger.take(c.Command(kind, id, source=self.me, **fields))
        self.say(kind, id, **fields)

    def _pull(self, id, file, place, value, missing, chunks):
        """Values first, checked against what was said; then the bytes, checked against the values."""
        wanted = [i for i in missing if place[0] <= i < tree.end_of(place, chunks)]
        if not wanted:
            return
        request = pb.ValuesRequest(
            file=id, start=place[0], level=place[1], under_start=place[0], under_level=place[1]
        )
        reply = self.bulk.Values(request, timeout=CALL_S)
        values = [reply.values[i : i + 32] for i in range(0, len(reply.values), 32)]
        if reply.beside or tree.merged(place, values, chunks) != value:
            raise AssertionError("values that do not merge to what was said")
        for first in wanted:
            request = pb.ChunksRequest(file=id, start=first, count=1)
            data = b"".join(piece.data for piece in self.bulk.Chunks(request, timeout=CALL_S))
            if chunk_value(first, data) != values[first - place[0]]:
                raise AssertionError("bytes that do not hash to their value")
            with self.lock:
                self.store(id, first, data)

    def _root(self, file):
        """The root of what is here, from its bytes: hashed again, every one."""
        chunks = tree.chunks_of(file.ledger.size)
        if any(i not in file.chunks for i in range(chunks)):
            return None
        return blake3(b"".join(file.chunks[i] for i in range(chunks))).digest()

    # What tests do with it

    def store(self, id, index, data):
        """Takes a chunk, as if a client had sent it here."""
        with self.lock:
            file = self.files.setdefault(id, File())
            value = chunk_value(index, data)
            file.chunks[index], file.values[index] = data, value
            if file.ledger.size is not None:
                generation = self.generations.setdefault(id, self.floor)
                have = c.Command(c.HAVE, id, a=index, b=generation, digest=value, source=self.me)
                file.ledger.take(have)
                self.work.put(id)

    def create(self, record, home):
        """Takes a file's metadata, as if a client had sent it here."""
        with self.lock:
            data = record.to_bytes()
            id = names.file_id(record.tenant, record.client_id)
            file = self.files.setdefault(id, File())
            file.record = data
            size = names.UNKNOWN_SIZE if record.size is None else record.size
            self._own(id, c.META, home=home, a=size, b=record.tenant, digest=digest(data))
            return id

    def free(self, id):
        """Frees what is here once the peer has confirmed that it holds all of it; the nonce it was asked with."""
        nonce = random.getrandbits(64) | 1
        self.say(c.CONFIRM, id, b=nonce)
        root = self.files[id].ledger.root
        good = lambda said: said.kind == c.ASSEMBLED and said.b == nonce and said.digest == root
        self.wait("the confirmation", lambda: any(good(said) for said in self.heard if said.file == id))
        with self.lock:
            file = self.files[id]
            file.chunks.clear(), file.values.clear()
            self.generations[id] = file.ledger.holders[self.me].generation + 1
            fields = {"aux": c.NOTHING_HELD, "b": self.generations[id]}
            file.ledger.take(c.Command(c.HAVE, id, source=self.me, **fields))
            self.say(c.HAVE, id, **fields)
        return nonce

    def wait(self, what, ready, patience=60):
        with self.changed:
            if not self.changed.wait_for(ready, patience):
                heard = [f"{said.name} {said.file.hex()[:8]}" for said in self.heard[-20:]]
                raise AssertionError(f"{what} did not come; refused: {self.refused}, heard last: {heard}, last error: {self.last_error}")

    def settled(self):
        """Waits until every fact said was acknowledged."""
        self.wait("every acknowledgement", lambda: not self.flights)

    def state(self, id):
        with self.lock:
            return self.files[id].ledger.state() if id in self.files else "unheard"

    # Bulk, for the peer

    def Record(self, request, context):
        file = self.files.get(request.file)
        if file is None or file.record is None:
            refuse(context, grpc.StatusCode.NOT_FOUND, "not-found")
        return pb.RecordReply(record=file.record)

    def Values(self, request, context):
        with self.lock:
            file = self.files.get(request.file)
            if file is None or file.ledger.size is None:
                refuse(context, grpc.StatusCode.NOT_FOUND, "not-found")
            chunks = tree.chunks_of(file.ledger.size)
            place, under = (request.start, request.level), (request.under_start, request.under_level)
            try:
                way = [beside for _, beside in reversed(tree.check_way(place, chunks))]
                above = [node for node, _ in tree.check_way(place, chunks)]
                beside = way[: above[::-1].index(under)] if place != under else []
                values = [file.values[i] for i in range(place[0], tree.end_of(place, chunks))]
                beside = [self._value(file, node, chunks) for node in beside]
            except (Refused, ValueError):
                refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "invalid-parameter")
            except KeyError:
                refuse(context, grpc.StatusCode.NOT_FOUND, "not-found")
            return pb.ValuesReply(values=b"".join(values), beside=b"".join(beside))

    def Chunks(self, request, context):
        with self.lock:
            file = self.files.get(request.file)
            numbers = range(request.start, request.start + request.count)
            if file is None or any(i not in file.chunks for i in numbers):
                refuse(context, grpc.StatusCode.NOT_FOUND, "not-found")
            data = b"".join(self.spoil(request.file, i, file.chunks[i]) for i in numbers)
        for at in range(0, len(data), PIECE):
            yield pb.ChunkPiece(data=data[at : at + PIECE])

    def _of_session(self, request, context):
        try:
            ring = self.m.rings["context"]
            session = sessions.verify_context(request.context, ring, self.me, c.now_ms())
        except Refused:
            refuse(context, grpc.StatusCode.UNAUTHENTICATED, "unauthenticated")
        client_id = uuid.UUID(bytes=request.id)
        return client_id, self.files.get(names.file_id(session.tenant, client_id))

    def Status(self, request, context):
        client_id, file = self._of_session(request, context)
        with self.lock:
            if file is None or file.record is None or file.ledger.size is None:
                return pb.StatusReply()
            return pb.StatusReply(status=json.dumps(self._status(client_id, file)).encode())

    def _status(self, client_id, file):
        ledger, record = file.ledger, Record.from_bytes(file.record)
        chunks = tree.chunks_of(ledger.size)
        ranges = {
            dc: [[start, tree.end_of((start, level), chunks)] for start, level in sorted(holding.spans)]
            for dc, holding in ledger.holders.items()
        }
        covered = {i for held in ranges.values() for first, end in held for i in range(first, end)}
        missing = [] if ledger.state() == "assembled" else [[i, i + 1] for i in range(chunks) if i not in covered]
        return {
            "id": str(client_id), "size": ledger.size, "chunks": chunks, "name": record.name,
            "content_type": record.content_type, "metadata": record.user, "state": ledger.state(),
            "home": self.m.dcs[ledger.claim[1]], "home_epoch": ledger.claim[0],
            "root": ledger.root and ledger.root.hex(), "dc": self.m.dcs[self.me],
            "home_answered": ledger.claim[1] == self.me, "missing_chunks": len(missing), "missing": missing,
            "holders": [
                {"dc": self.m.dcs[dc], "chunks": sum(end - first for first, end in held), "ranges": held}
                for dc, held in ranges.items() if held
            ],
        }

    def Locate(self, request, context):
        _, file = self._of_session(request, context)
        with self.lock:
            if file is None or not file.published:
                refuse(context, grpc.StatusCode.NOT_FOUND, "not-found")
            chunks, place = tree.chunks_of(file.ledger.size), (request.start, request.level)
            values = [file.values[i] for i in range(place[0], tree.end_of(place, chunks))]
            proof = [self._value(file, beside, chunks) for beside in tree.proof_places(place, chunks)]
            return pb.LocateReply(values=b"".join(values), proof=b"".join(proof))


def refuse(context, code, problem):
    context.set_trailing_metadata((("sluice-problem", problem),))
    context.abort(code, problem)


def in_chunks(data):
    return [data[i : i + CHUNK_LEN] for i in range(0, len(data), CHUNK_LEN)]
