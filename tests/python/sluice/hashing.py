"""BLAKE3 taken apart: chaining values of chunks, and how they merge. After the BLAKE3 paper, many leaves at once."""

import functools

import numpy as np

CHUNK_LEN = 1 << 20
LEAF_LEN = 1024
BLOCK_LEN = 64

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
LEAF_START, LEAF_END, PARENT, ROOT = 1, 2, 4, 8

_COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def _rotate(x, by):
    return (x >> np.uint32(by)) | (x << np.uint32(32 - by))


def _mix(s, places, x, y):
    a, b, c, d = places
    s[a] = s[a] + s[b] + x
    s[d] = _rotate(s[d] ^ s[a], 16)
    s[c] = s[c] + s[d]
    s[b] = _rotate(s[b] ^ s[c], 12)
    s[a] = s[a] + s[b] + y
    s[d] = _rotate(s[d] ^ s[a], 8)
    s[c] = s[c] + s[d]
    s[b] = _rotate(s[b] ^ s[c], 7)


def _compress(value, block, counter, length, flags):
    """The first eight words of the compression function; `value` and `block` are lists of arrays of lanes."""
    lanes = len(value[0])
    constant = lambda n: np.full(lanes, n, dtype=np.uint32)
    s = list(value) + [constant(n) for n in IV[:4]]
    s += [(counter & np.uint64(0xFFFFFFFF)).astype(np.uint32), (counter >> np.uint64(32)).astype(np.uint32)]
    s += [constant(length), constant(flags)]
    block = list(block)
    for turn in range(7):
        for i, places in enumerate(_COLUMNS):
            _mix(s, places, block[2 * i], block[2 * i + 1])
        for i, places in enumerate(_DIAGONALS):
            _mix(s, places, block[8 + 2 * i], block[9 + 2 * i])
        if turn < 6:
            block = [block[i] for i in PERMUTATION]
    return [s[i] ^ s[i + 8] for i in range(8)]


def _initial(lanes):
    return [np.full(lanes, n, dtype=np.uint32) for n in IV]


def _words(data):
    return np.frombuffer(data, dtype="<u4")


def _full_leaves(data, first):
    """Values of whole leaves, one row each."""
    lanes = len(data) // LEAF_LEN
    words = _words(data).reshape(lanes, 16, 16)
    counter = np.arange(first, first + lanes, dtype=np.uint64)
    value = _initial(lanes)
    for i in range(16):
        flags = (LEAF_START if i == 0 else 0) | (LEAF_END if i == 15 else 0)
        value = _compress(value, [words[:, i, j] for j in range(16)], counter, BLOCK_LEN, flags)
    return np.stack(value, axis=1)


def _short_leaf(data, counter):
    counter = np.array([counter], dtype=np.uint64)
    value = _initial(1)
    blocks = [data[i : i + BLOCK_LEN] for i in range(0, len(data), BLOCK_LEN)]
    for i, block in enumerate(blocks):
        flags = (LEAF_START if i == 0 else 0) | (LEAF_END if i == len(blocks) - 1 else 0)
        words = _words(block.ljust(BLOCK_LEN, b"\0"))
        value = _compress(value, [words[j : j + 1] for j in range(16)], counter, len(block), flags)
    return np.stack(value, axis=1)


def _parents(left, right, flags):
    lanes = len(left)
    block = [left[:, i] for i in range(8)] + [right[:, i] for i in range(8)]
    zero = np.zeros(lanes, dtype=np.uint64)
    return np.stack(_compress(_initial(lanes), block, zero, BLOCK_LEN, PARENT | flags), axis=1)


def _bytes(row):
    return row.astype("<u4").tobytes()


def _row(value):
    return _words(value).reshape(1, 8).astype(np.uint32)


@functools.lru_cache(maxsize=64)
def chunk_value(index, data):
    """The chaining value of the chunk at `index`. Remembered for a while, since it takes 50 ms."""
    if not 0 < len(data) <= CHUNK_LEN:
        raise ValueError("a chunk has 1 byte to 1 MiB")
    first = index * (CHUNK_LEN // LEAF_LEN)
    whole = len(data) // LEAF_LEN
    rows = []
    if whole:
        rows.append(_full_leaves(data[: whole * LEAF_LEN], first))
    if len(data) % LEAF_LEN:
        rows.append(_short_leaf(data[whole * LEAF_LEN :], first + whole))
    level = np.concatenate(rows)
    # Joining neighbours, and carrying an odd one up, is the tree whose left side is a power of two.
    while len(level) > 1:
        pairs = len(level) // 2
        above = _parents(level[: 2 * pairs : 2], level[1 : 2 * pairs : 2], 0)
        level = above if len(level) % 2 == 0 else np.concatenate([above, level[-1:]])
    return _bytes(level[0])


def merge(left, right):
    """The value of the node above two siblings."""
    return _bytes(_parents(_row(left), _row(right), 0)[0])


def merge_root(left, right):
    """The root above the two children of the top."""
    return _bytes(_parents(_row(left), _row(right), ROOT)[0])
