#!/usr/bin/env python3
"""Verifies docs/vectors.json (or another file) with the implementation in `sluice`: every section, or one. Prints what
it checked, and fails at the first difference."""

import json
import sys
import uuid
from pathlib import Path

from blake3 import blake3

from sluice import Refused, command, hashing, ledger, names, sessions, tree

VECTORS = Path(__file__).parents[2] / "docs" / "vectors.json"


def expect(what, got, expected):
    if got != expected:
        sys.exit(f"{what}: got {got!r}, expected {expected!r}")


def expect_refused(what, code, call, detail=None):
    try:
        got = call()
    except Refused as refused:
        expect(what, refused.code, code)
        if detail is not None:
            # Fields are named with capitals on the other side.
            expect(f"{what}, field", refused.detail.lower(), detail.lower())
    else:
        sys.exit(f"{what}: taken as {got!r}, expected {code}")


def content(seed, length):
    return blake3(f"sluice vectors {seed}".encode()).digest(length=length)


def place(value):
    return value["start"], value["level"]


def valued(values):
    return {place(value): bytes.fromhex(value["value"]) for value in values}


class Checker:
    def __init__(self, vectors):
        self.v = vectors
        keys = vectors["keys"]
        self.tag = names.cluster_tag(keys["cluster"])
        expect("cluster tag", self.tag.hex(), keys["cluster_tag"])
        self.rings, self.secrets = {}, {}
        for purpose in ("command", "context"):
            known = {}
            for key in keys[purpose]:
                secret = names.Key(purpose, self.tag, key["dc"], key["id"], bytes.fromhex(key["seed"]))
                expect(f"public half of {purpose} key {key['id']}", secret.public.hex(), key["public"])
                self.secrets[purpose, key["id"]] = secret
                if key["known"]:
                    known[key["id"]] = (key["dc"], secret.public)
            self.rings[purpose] = names.KeyRing(purpose, self.tag, known)

    def limits(self):
        said = self.v["limits"]
        for name, ours in {
            "chunk_len": hashing.CHUNK_LEN, "max_file_len": tree.MAX_FILE_LEN, "max_chunks": tree.MAX_CHUNKS,
            "max_level": tree.MAX_LEVEL, "unit_level": tree.UNIT_LEVEL, "segment_level": tree.SEGMENT_LEVEL,
            "max_context_life_ms": sessions.MAX_LIFE_MS, "clock_tolerance_ms": sessions.TOLERANCE_MS,
        }.items():
            expect(name, ours, said[name])
        return len(said)

    def file_ids(self):
        for case in self.v["file_ids"]:
            file = names.file_id(case["tenant"], uuid.UUID(case["client_id"]))
            expect("file id", str(uuid.UUID(bytes=file)), case["file_id"])
            expect("slot", names.slot(file), case["slot"])
        return len(self.v["file_ids"])

    def contents(self):
        for case in self.v["contents"]:
            expect("content", content(case["seed"], case["len"]).hex(), case["bytes"])
        return len(self.v["contents"])

    def chunks(self):
        for case in self.v["chunks"]:
            value = hashing.chunk_value(case["index"], content(case["seed"], case["len"]))
            expect(f"chunk {case}", value.hex(), case["value"])
        return len(self.v["chunks"])

    def files(self):
        for case in self.v["files"]:
            data, chunks = content(case["seed"], case["size"]), tree.chunks_of(case["size"])
            expect("chunks", chunks, case["chunks"])
            expect("top level", tree.covering(chunks), case["top_level"])
            parts = [data[i << 20 : i + 1 << 20] for i in range(chunks)]
            values = [hashing.chunk_value(i, part) for i, part in enumerate(parts)]
            root = tree.root_of(values, chunks) if chunks > 1 else blake3(data).digest()
            expect(f"root of {case['size']} bytes", root.hex(), case["root"])
            expect("b3sum", blake3(data).hexdigest(), case["root"])
            self.nodes(case, values, chunks)
        return len(self.v["files"])

    def nodes(self, case, values, chunks):
        said = valued(case["nodes"])
        every = {(0, 0)} if chunks == 1 else set()
        left = list(tree.top_children(chunks) or ())
        while left:
            node = left.pop()
            every.add(node)
            left.extend(tree.children(node, chunks) or ())
        expect("nodes", set(said), every)
        for node, value in said.items():
            expect(f"node {node}", tree.merged(node, values[node[0] : tree.end_of(node, chunks)], chunks), value)

    def trees(self):
        for case in self.v["trees"]:
            chunks = case["chunks"]
            values = [names.digest(i.to_bytes(8, "big")) for i in range(chunks)]
            root = bytes.fromhex(case["root"])
            expect(f"root over {chunks}", tree.root_of(values, chunks), root)
            expect("children of the top", list(valued(case["top"])), list(tree.top_children(chunks)))
            for proof in case["proofs"]:
                at, steps = (proof["index"], 0), valued(proof["proof"])
                expect("places of a proof", list(steps), tree.proof_places(at, chunks))
                way = list(steps.values())
                expect("proof", tree.climb(at, values[at[0]], way, chunks), root)
                wrong = [hashing.merge(way[0], way[0])] + way[1:]
                if tree.climb(at, values[at[0]], wrong, chunks) == root:
                    sys.exit("a wrong proof leads to the root")
                expect_refused("a shorter proof", "proof", lambda: tree.climb(at, values[at[0]], way[1:], chunks))
            path = case["path"]
            at, top = place(path["from"]), place(path["to"])
            value = tree.climb(at, values[at[0]], list(valued(path["beside"]).values()), chunks, top)
            expect("path", value, valued(case["top"])[top])
            if case["nodes"]:
                self.nodes(case, values, chunks)
        return len(self.v["trees"])

    def tiles(self):
        for case in self.v["tiles"]:
            got = tree.tile(case["first"], case["end"], case["level"], case["chunks"])
            expect("tiles", got, [place(said) for said in case["places"]])
        return len(self.v["tiles"])

    def places(self):
        for case in self.v["places"]["valid"]:
            at, chunks = place(case), case["chunks"]
            way = tree.way_down(tree.check_place(*at), chunks)
            expect("end", tree.end_of(at, chunks), case["end"])
            if case["parent"]:
                expect("parent", way[-2][0], place(case["parent"]))
                expect("sibling", way[-1][1], place(case["sibling"]))
            elif len(way) > 1:
                sys.exit(f"{at} of {chunks} should have a parent")
        for case in self.v["places"]["invalid"]:
            def call(case=case):
                tree.check_node(tree.check_place(*place(case)), case["chunks"])
            expect_refused(f"place {case}", case["error"], call)
        return len(self.v["places"]["valid"]), len(self.v["places"]["invalid"])

    def runs(self):
        for case in self.v["runs"]["valid"]:
            expect("run", tree.check_run(case["size"], case["index"], case["len"]), case["count"])
        for case in self.v["runs"]["invalid"]:
            def call(case=case):
                tree.check_run(case["size"], case["index"], case["len"])
            expect_refused(f"run {case}", case["error"], call)
        return len(self.v["runs"]["valid"]), len(self.v["runs"]["invalid"])

    def records(self):
        for case in self.v["records"]["valid"]:
            root = case["expected_root"]
            record = names.Record(
                case["tenant"], uuid.UUID(case["client_id"]), case["size"], case["expiry_secs"],
                root and bytes.fromhex(root), case["name"], case["content_type"], case["user"],
            )
            data = record.to_bytes()
            expect("record", data.hex(), case["bytes"])
            expect("digest", names.digest(data).hex(), case["digest"])
            expect("read back", vars(names.Record.from_bytes(data)), vars(record))
            file = names.file_id(record.tenant, record.client_id)
            expect("file id", str(uuid.UUID(bytes=file)), case["file_id"])
        for case in self.v["records"]["invalid"]:
            data = case["bytes"]
            data = bytes.fromhex(data) if isinstance(data, str) else bytes(data["zeros"])
            expect_refused(case["what"], case["error"], lambda: names.Record.from_bytes(data))
        return len(self.v["records"]["valid"]), len(self.v["records"]["invalid"])

    def commands(self):
        said, ring = self.v["commands"], self.rings["command"]
        for kind in said["kinds"]:
            expect("kind", command.NAMES[kind["number"]], kind["name"])
            expect("about a file", kind["number"] in command.ABOUT_A_FILE, kind["about_a_file"])
        expect("kinds", len(command.NAMES), len(said["kinds"]))
        for case in said["valid"]:
            data, fields = bytes.fromhex(case["bytes"]), dict(case["fields"])
            got, digest = command.verify(data, ring, said["me"])
            expect("name", got.name, case["kind"])
            expect("digest", digest.hex(), case["digest"])
            fields["source"] = fields.pop("from")
            fields["file"], fields["digest"] = bytes.fromhex(fields["file"]), bytes.fromhex(fields["digest"])
            expect(case["what"], got, command.Command(**fields))
            expect("signed", got.sign(self.secrets["command", got.key]), data)
        for case in said["invalid"]:
            data = bytes.fromhex(case["bytes"])
            expect_refused(
                case["what"], case["error"], lambda: command.verify(data, ring, said["me"]), case["field"]
            )
        return len(said["valid"]), len(said["invalid"])

    def contexts(self):
        said, ring = self.v["contexts"], self.rings["context"]
        for case in said["valid"]:
            data = bytes.fromhex(case["bytes"])
            got = sessions.verify_context(data, ring, said["me"], said["now"])
            expect("scopes", got.scope_names(), case["scopes"])
            expect("session", str(got.session), case["session"])
            for name in ("issuer", "tenant", "rate", "quota", "quota_files", "revocation", "issued_at", "ends_at", "key"):
                expect(name, getattr(got, name), case[name])
            expect("allowed", list(got.allowed), case["allowed"])
            expect("signed", got.sign(self.secrets["context", got.key]), data)
        for case in said["invalid"]:
            data = bytes.fromhex(case["bytes"])
            call = lambda: sessions.verify_context(data, ring, case["me"], case["now"])
            expect_refused(case["what"], case["error"], call)
        return len(said["valid"]), len(said["invalid"])

    def tokens(self):
        said, public = self.v["tokens"], bytes.fromhex(self.v["keys"]["token"]["public"])
        for case in said["valid"]:
            claims = sessions.verify_token(case["token"], public, said["cluster"], said["now"])
            expect("claims", claims, case["claims"])
            expect("session", claims["jti"], case["session"])
            expect("quota in files", claims.get("quota_files", 0), case["quota_files"])
            known = [name for name in sessions.SCOPES.values() if name in claims["scopes"]]
            expect("scopes", known, case["scopes"])
        for case in said["invalid"]:
            call = lambda: sessions.verify_token(case["token"], public, said["cluster"], case["now"])
            expect_refused(case["what"], case["error"], call)
        return len(said["valid"]), len(said["invalid"])

    def set_digests(self):
        said, ring = self.v["set_digests"], self.rings["command"]
        me, peer = said["me"], said["peer"]
        expect("of no files", ledger.set_digest({}, me, peer)[0].hex(), said["none"])
        ledgers = {}
        for case in said["files"]:
            file, one = uuid.UUID(case["file"]).bytes, ledger.Ledger()
            for data in case["commands"]:
                one.take(command.verify(bytes.fromhex(data), ring, me)[0])
            expect(f"digest of a file: {case['what']}", one.file_digest(me, peer).hex(), case["digest"])
            expect("alone", ledger.set_digest({file: one}, me, peer)[0].hex(), case["set_of_it_alone"])
            ledgers[file] = one
        expect("of all", ledger.set_digest(ledgers, me, peer)[0].hex(), said["set_of_all"])
        return len(said["files"])


def main(path=VECTORS, only=None):
    checker = Checker(json.loads(Path(path).read_text()))
    # A section that is not known here fails, rather than going unchecked.
    for section in [only] if only else sorted(set(checker.v) - {"about", "version", "keys"}):
        counts = getattr(checker, section)()
        counts = counts if isinstance(counts, tuple) else (counts,)
        print(f"{section:12} {counts[0]:3} hold" + "".join(f", {count} are refused" for count in counts[1:]))


if __name__ == "__main__":
    main(*sys.argv[1:])
