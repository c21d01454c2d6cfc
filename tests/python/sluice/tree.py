"""How a file falls into chunks, places and runs, and how values prove each other."""

from . import Refused
from .hashing import CHUNK_LEN, merge, merge_root

MAX_FILE_LEN = 34 << 50
MAX_CHUNKS = MAX_FILE_LEN // CHUNK_LEN
MAX_LEVEL = 35
UNIT_LEVEL = 12
SEGMENT_LEVEL = 16


def chunks_of(size):
    return -(-size // CHUNK_LEN)


def covering(chunks):
    """The lowest level that covers so many chunks."""
    return (chunks - 1).bit_length() if chunks > 1 else 0


def clipped(start, level, chunks):
    return start, min(level, covering(chunks - start))


def end_of(place, chunks):
    return min(place[0] + (1 << place[1]), chunks)


def top_children(chunks):
    """The two nodes below the top; none of fewer than two chunks."""
    if chunks < 2:
        return None
    level = covering(chunks) - 1
    return (0, level), clipped(1 << level, level, chunks)


def children(place, chunks):
    start, level = place
    if level == 0:
        return None
    return (start, level - 1), clipped(start + (1 << level - 1), level - 1, chunks)


def check_place(start, level):
    """Whether it can be a place in any file."""
    if level > MAX_LEVEL:
        raise Refused("span-level", f"{level}")
    if start >= MAX_CHUNKS:
        raise Refused("span-range", f"{start}")
    if start % (1 << level):
        raise Refused("span-alignment", f"{start}, {level}")
    return start, level


def check_node(place, chunks):
    """Whether it is one of this file."""
    if way_down(place, chunks) is None:
        raise Refused("span-past-end", f"{place} of {chunks}")
    return place


def way_down(place, chunks):
    """The nodes from a child of the top down to `place`, each with its sibling; `None` if there is no such node."""
    if chunks == 1:
        return [] if place == (0, 0) else None
    pair = top_children(chunks)
    way = []
    while pair is not None:
        left, right = pair
        node, beside = (left, right) if place[0] < right[0] else (right, left)
        way.append((node, beside))
        if node == place:
            return way
        pair = children(node, chunks)
    return None


def proof_places(place, chunks):
    """The places beside the way from `place` up to the root, lowest first."""
    return [beside for _, beside in reversed(check_way(place, chunks))]


def check_way(place, chunks):
    way = way_down(place, chunks)
    if way is None:
        raise Refused("span-past-end", f"{place} of {chunks}")
    return way


def climb(place, value, beside, chunks, top=None):
    """The value of `top`, or without it the root, from a value below and those beside the way up."""
    way = check_way(place, chunks)
    nodes = [node for node, _ in way]
    if top is not None:
        # Down to and including `top`; what is beside it is not asked for.
        way = way[nodes.index(top) + 1 :]
    if len(beside) != len(way):
        raise Refused("proof", f"{len(beside)} values, expected {len(way)}")
    for i, (value_beside, (node, sibling)) in enumerate(zip(beside, reversed(way))):
        join = merge_root if top is None and i == len(way) - 1 else merge
        value = join(value, value_beside) if node < sibling else join(value_beside, value)
    return value


def merged(place, values, chunks):
    """The value of a place from those of its chunks."""
    if end_of(place, chunks) - place[0] != len(values):
        raise Refused("values", f"{len(values)} for {place}")
    pair = children(place, chunks)
    if pair is None:
        return values[0]
    left, right = pair
    at = right[0] - place[0]
    return merge(merged(left, values[:at], chunks), merged(right, values[at:], chunks))


def root_of(values, chunks):
    """The root of a file of two chunks or more."""
    left, right = top_children(chunks)
    return merge_root(merged(left, values[: right[0]], chunks), merged(right, values[right[0] :], chunks))


def tile(first, end, level, chunks):
    """The fewest nodes that make up a range."""
    if chunks == 1:
        return [(0, 0)] if first == 0 and end == 1 else []

    def inside(node):
        if first <= node[0] and end_of(node, chunks) <= end and node[1] <= level:
            return [node]
        if end_of(node, chunks) <= first or end <= node[0]:
            return []
        return [place for child in children(node, chunks) for place in inside(child)]

    return [place for child in top_children(chunks) or () for place in inside(child)]


def check_run(size, index, length):
    """The number of chunks that a body of `length` bytes at `index` holds."""
    chunks = chunks_of(size)
    if index >= chunks:
        raise Refused("chunk-past-end", f"{index}")
    if length == 0:
        raise Refused("run-empty")
    count = -(-length // CHUNK_LEN)
    if count not in (1, 2, 4, 8):
        raise Refused("run-count", f"{count}")
    if index % count:
        raise Refused("run-alignment", f"{index}, {count}")
    if index + count > chunks:
        raise Refused("chunk-past-end", f"{index + count - 1}")
    if length != min((index + count) * CHUNK_LEN, size) - index * CHUNK_LEN:
        raise Refused("run-length", f"{length}")
    return count
