"""What is known of a file: facts and their joins, and the digests by which two datacenters compare."""

import struct

from . import Refused, command as c
from .names import UNKNOWN_SIZE, digest
from .tree import SEGMENT_LEVEL, check_node, children, chunks_of, end_of, merge, top_children

MASK = (1 << 64) - 1


def mix(a, b):
    def step(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        return z ^ z >> 31

    return step(step(a + 0x9E3779B97F4A7C15 & MASK) + b & MASK)


class Holding:
    """What one datacenter holds as of a generation: spans, siblings merged."""

    def __init__(self, generation):
        self.generation, self.spans = generation, {}

    def covers(self, place, chunks):
        first, end = place[0], end_of(place, chunks)
        return any(start <= first and end <= end_of((start, level), chunks) for start, level in self.spans)

    def add(self, place, value, chunks):
        if self.covers(place, chunks):
            return
        first, end = place[0], end_of(place, chunks)
        inside = [span for span in self.spans if first <= span[0] and end_of(span, chunks) <= end]
        for span in inside:
            del self.spans[span]
        self.spans[place] = value
        self._merge(None, chunks)

    def _merge(self, node, chunks):
        """Joins siblings, from the top down to where the spans are; the value of `node` if it is one span."""
        if node in self.spans:
            return self.spans[node]
        pair = top_children(chunks) if node is None else children(node, chunks)
        if pair is None:
            return None
        end = chunks if node is None else end_of(node, chunks)
        start = 0 if node is None else node[0]
        if not any(start <= first < end for first, _ in self.spans):
            return None
        values = [self._merge(child, chunks) for child in pair]
        if node is None or None in values:
            return None
        for child in pair:
            del self.spans[child]
        self.spans[node] = merge(*values)
        return self.spans[node]

    def chunks(self, chunks):
        return sum(end_of(place, chunks) - place[0] for place in self.spans)

    def coverage(self, chunks):
        sum_ = 0
        for place in self.spans:
            at, end = place[0], end_of(place, chunks)
            step = 1 << min(place[1], SEGMENT_LEVEL)
            while at < end:
                sum_ ^= mix(at, min(at + step, end))
                at += step
        return sum_


class Ledger:
    """What a datacenter knows of one file."""

    def __init__(self):
        self.metas, self.sizes, self.roots = [], [], []
        self.claim = self.conflict = self.drop = None
        self.holders, self.assembled = {}, {}

    @property
    def size(self):
        return self.sizes[0] if self.sizes else None

    @property
    def root(self):
        return self.roots[0][0] if len(self.roots) == 1 else None

    def state(self):
        if self.drop:
            return "dropped"
        if max(len(self.metas), len(self.sizes), len(self.roots)) > 1:
            return "conflict"
        if self.roots:
            return "assembled" if self.claim and self.assembled_at(self.claim[1]) else "complete"
        if self.conflict:
            return "conflict"
        return "receiving" if self.metas else "unheard"

    def assembled_at(self, dc):
        """Whether this datacenter is the home, and has said ASSEMBLED since it claimed the file last."""
        return self.claim is not None and self.claim[1] == dc and self.assembled.get(dc, -1) >= self.claim[0]

    def take(self, said):
        """Takes a fact; whether it may be acknowledged."""
        if said.kind == c.META:
            _two_smallest(self.metas, (said.digest, said.b))
            if said.a != UNKNOWN_SIZE:
                self._sized(said.a)
            self.claim = max(self.claim or (said.aux, said.home), (said.aux, said.home))
        elif said.kind == c.HAVE:
            return self._have(said)
        elif said.kind in (c.ROOT, c.ASSEMBLED):
            if said.kind == c.ASSEMBLED:
                if said.home != said.source:
                    return True
                self.assembled[said.home] = max(self.assembled.get(said.home, 0), said.aux)
            self._sized(said.a)
            _two_smallest(self.roots, (said.digest, said.a))
        elif said.kind == c.CONFLICT:
            found = (said.a, said.aux, said.digest, said.home)
            self.conflict = min(self.conflict or found, found)
        elif said.kind == c.DROP:
            found = (said.aux, said.b)
            self.drop = min(self.drop or found, found)
            self.holders.clear()
        return True

    def _sized(self, size):
        if _two_smallest(self.sizes, size):
            self.holders.clear()

    def _have(self, said):
        if self.size is None:
            return False
        if self.drop or len(self.sizes) > 1:
            return True
        chunks = chunks_of(self.size)
        place = (said.a, said.aux)
        if said.aux != c.NOTHING_HELD:
            try:
                check_node(place, chunks)
            except Refused:
                # Said again it would be no better.
                return True
        known = self.holders.get(said.source)
        if known is None or said.b > known.generation:
            known = self.holders[said.source] = Holding(said.b)
        if said.aux != c.NOTHING_HELD and said.b == known.generation:
            known.add(place, said.digest, chunks)
        return True

    def file_digest(self, one, other):
        """Digest of what two datacenters should both know; `None` of a file that is not known."""
        if self.drop:
            reason, tenant = self.drop
            return digest(digest(b"drop" + struct.pack(">BQ", reason, tenant))[:16])
        if self.state() == "unheard":
            return None
        out = b"".join(b"meta" + record + struct.pack(">Q", tenant) for record, tenant in self.metas)
        out += b"".join(b"size" + struct.pack(">Q", size) for size in self.sizes)
        epoch, home = self.claim or (0, c.EVERY)
        out += struct.pack(">BH", epoch, home)
        out += b"".join(b"root" + root + struct.pack(">Q", size) for root, size in self.roots)
        out = digest(out)[:16]
        for dc in sorted((one, other)):
            if self.assembled_at(dc):
                out += b"assembled" + struct.pack(">HB", dc, self.assembled[dc])
            beside = other if dc == one else one
            if home == beside and dc in self.holders and self.size is not None:
                chunks = chunks_of(self.size)
                holding = self.holders[dc]
                if holding.chunks(chunks):
                    out += b"have" + struct.pack(">QQ", holding.generation, holding.coverage(chunks))
        if self.conflict:
            start, level, root, found_by = self.conflict
            out += b"conflict" + struct.pack(">QB", start, level) + root + struct.pack(">H", found_by)
        return digest(out)


def _two_smallest(values, value):
    if value in values:
        return False
    before = list(values)
    values.append(value)
    values.sort()
    del values[2:]
    return values != before


def set_digest(ledgers, one, other, prefix=bytes(16), bits=0):
    """The digest of a range of files, and those in it."""
    shift = 128 - bits
    inside = lambda file: int.from_bytes(file, "big") >> shift == int.from_bytes(prefix, "big") >> shift
    words, files = [0] * 4, []
    for file in sorted(filter(inside, ledgers)):
        of_file = ledgers[file].file_digest(one, other)
        if of_file is not None:
            more = struct.unpack(">4Q", digest(file + of_file))
            words = [(a + b) % 2**64 for a, b in zip(words, more)]
            files.append(file)
    return struct.pack(">4Q", *words), files
