"""Deflate (RFC 1951) of a picture of which only one part is not blank: the work is that part's alone.

zlib looks at every byte of the empty rest, and searches for what it has seen before; here the rest is known to be runs
of zeros, and the photograph goes through one Huffman code made for it. Files are as large as zlib's with Z_RLE.
"""

from __future__ import annotations

import numba
import numpy as np

NONE, SUB, UP = 0, 1, 2  # PNG's row filters: the bytes themselves, differences to the pixel on the left, above
WHITE = 255  # of the blank picture's pixels, which are transparent
# What the picture becomes first: bytes, MATCH + n for the last byte n times more (LEAST..MOST), and MATCH, the end.
MATCH, LEAST, MOST = 256, 3, 258
PAIR = MATCH + MOST + 1  # PAIR + byte: the byte and a zero, as inside an opaque part, where alpha does not change
SYMBOLS = 286  # of deflate's code for bytes and lengths
MOST_BITS = 15
LENGTH_ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)  # RFC 1951, 3.2.7
ADLER = 65521


@numba.njit(cache=True)
def _put(tokens, count, sums, value):
    """Appends one byte; returns the new count. sums: the two halves of Adler-32 so far."""
    tokens[count] = value
    sums[0] += value
    sums[1] += sums[0]
    return count + 1


@numba.njit(cache=True)
def _put_zeros(tokens, count, sums, length):
    """Appends `length` zeros."""
    if length == 0:
        return count
    sums[0] %= ADLER
    sums[1] = (sums[1] + length * sums[0]) % ADLER
    tokens[count] = 0
    count += 1
    length -= 1
    while length >= LEAST:
        step = min(length, MOST)
        tokens[count] = MATCH + step
        count += 1
        length -= step
    for _ in range(length):
        tokens[count] = 0
        count += 1
    return count


@numba.njit(cache=True)
def _put_blank(tokens, count, sums, rows, size):
    """Appends blank rows; the first one is told without the row above it, which is not blank or not there."""
    for row in range(rows):
        if row == 0:
            count = _put(tokens, count, sums, SUB)
            for _ in range(3):
                count = _put(tokens, count, sums, WHITE)
            count = _put_zeros(tokens, count, sums, 4 * size - 3)
        else:
            count = _put(tokens, count, sums, UP)
            count = _put_zeros(tokens, count, sums, 4 * size)
    return count


@numba.njit(cache=True)
def tokenise(first, differences, left, top, size, tokens):
    """A picture's filtered rows as tokens: blank rows, the part's, blank rows. Returns their number and Adler-32.

    differences: [h, w] uint32 pixels, each the difference to the one above. first: [4 size] uint8, the first row's own
    bytes where it is the picture's first (top is 0), else empty. tokens: uint16, long enough for all bytes of the part.
    """
    sums = np.array([1, 0], np.int64)
    count = _put_blank(tokens, 0, sums, top, size)
    height, width = differences.shape
    if len(first):
        count = _put(tokens, count, sums, NONE)
        for value in first:
            count = _put(tokens, count, sums, np.int64(value))
    for row in range(1 if len(first) else 0, height):
        count = _put(tokens, count, sums, UP)
        zeros = 4 * left
        for column in range(width):
            pixel = np.int64(differences[row, column])
            if pixel == 0:
                zeros += 4
                continue
            if zeros:
                count = _put_zeros(tokens, count, sums, zeros)
                zeros = 0
            low, high = sums[0], sums[1]
            for channel in range(4):
                value = (pixel >> (8 * channel)) & 255  # the first byte is the lowest
                tokens[count + channel] = value
                low += value
                high += low
            sums[0], sums[1] = low, high
            if pixel >> 24:
                count += 4
            else:
                tokens[count + 2] += PAIR
                count += 3
        count = _put_zeros(tokens, count, sums, zeros + 4 * (size - left - width))
        sums[0] %= ADLER
        sums[1] %= ADLER
    count = _put_blank(tokens, count, sums, size - top - height, size)
    tokens[count] = MATCH
    return count + 1, (sums[1] % ADLER) << 16 | sums[0] % ADLER


@numba.njit(cache=True)
def _length_symbol(length):
    """Deflate's symbol for a match's length, how many further bits say which, and these bits (RFC 1951, 3.2.5)."""
    if length == MOST:
        return 285, 0, 0
    rest = length - LEAST
    if rest < 8:
        return 257 + rest, 0, 0
    extra = 1
    while rest >> (extra + 3):
        extra += 1
    return 257 + 4 * (extra + 1) + ((rest >> extra) & 3), extra, rest & ((1 << extra) - 1)


@numba.njit(cache=True)
def code_lengths(counts):
    """[n] how often each symbol occurs -> [n] bits of its Huffman code, at most MOST_BITS; 0 for those that do not.

    Two queues of a sorted list build the tree (van Leeuwen 1976). Codes that come out too long are cut, and the room
    this takes is given back by lengthening short ones until Kraft's sum is 1 again.
    """
    used = np.flatnonzero(counts)
    number = len(used)
    used = used[np.argsort(counts[used], kind="mergesort")]
    weight = np.zeros(2 * number, np.int64)
    parent = np.zeros(2 * number, np.int64)
    weight[:number] = counts[used]
    leaf, inner = 0, number
    for node in range(number, 2 * number - 1):
        for _ in range(2):
            if inner >= node or (leaf < number and weight[leaf] <= weight[inner]):
                taken = leaf
                leaf += 1
            else:
                taken = inner
                inner += 1
            weight[node] += weight[taken]
            parent[taken] = node
    depth = np.zeros(2 * number, np.int64)
    of_length = np.zeros(2 * number + MOST_BITS, np.int64)
    for node in range(2 * number - 3, -1, -1):
        depth[node] = depth[parent[node]] + 1
        if node < number:
            of_length[min(depth[node], MOST_BITS)] += 1
    room = np.int64(0)
    for bits in range(1, MOST_BITS + 1):
        room += of_length[bits] << (MOST_BITS - bits)
    while room > 1 << MOST_BITS:
        of_length[MOST_BITS] -= 1
        bits = MOST_BITS - 1
        while of_length[bits] == 0:
            bits -= 1
        of_length[bits] -= 1
        of_length[bits + 1] += 2
        room -= 1
    lengths = np.zeros(len(counts), np.int64)
    place = number
    for bits in range(1, MOST_BITS + 1):  # the shortest for the most frequent
        for _ in range(of_length[bits]):
            place -= 1
            lengths[used[place]] = bits
    return lengths


@numba.njit(cache=True)
def _codes(lengths):
    """The canonical codes of these lengths, the first bit lowest (RFC 1951, 3.2.2)."""
    codes = np.zeros(len(lengths), np.int64)
    code = 0
    for bits in range(1, MOST_BITS + 1):
        for symbol in range(len(lengths)):
            if lengths[symbol] == bits:
                turned = 0
                for place in range(bits):
                    turned |= ((code >> place) & 1) << (bits - 1 - place)
                codes[symbol] = turned
                code += 1
        code <<= 1
    return codes


@numba.njit(cache=True)
def _add(out, state, value, bits):
    """Appends bits, the lowest first. state: bytes written, bits that wait, their number."""
    state[1] |= value << state[2]
    state[2] += bits
    while state[2] >= 8:
        out[state[0]] = state[1] & 255
        state[0] += 1
        state[1] >>= 8
        state[2] -= 8


@numba.njit(cache=True)
def deflate(tokens, out):
    """One final deflate block of the tokens, into out [n] uint8, long enough; returns its length in bytes."""
    seen = np.zeros(PAIR + 256, np.int64)
    for token in tokens:
        seen[token] += 1
    counts = np.zeros(SYMBOLS, np.int64)
    counts[: MATCH + 1] = seen[: MATCH + 1]
    counts[:256] += seen[PAIR:]
    counts[0] += seen[PAIR:].sum()
    for length in range(LEAST, MOST + 1):
        counts[_length_symbol(length)[0]] += seen[MATCH + length]
    lengths = code_lengths(counts)
    codes = _codes(lengths)
    state = np.zeros(3, np.int64)
    # A final block with its own codes: all symbols for bytes and lengths, one for distances, their 19 lengths' lengths.
    _add(out, state, 1 | 2 << 1 | (SYMBOLS - 257) << 3 | 0 << 8 | 15 << 13, 17)
    for symbol in LENGTH_ORDER:
        _add(out, state, 4 if symbol < 16 else 0, 3)  # so that every length is told in four bits
    for symbol in range(SYMBOLS + 1):
        length = lengths[symbol] if symbol < SYMBOLS else 1  # the one distance, to the last byte, takes a bit
        turned = (length & 1) << 3 | (length & 2) << 1 | (length & 4) >> 1 | (length & 8) >> 3
        _add(out, state, turned, 4)
    value = np.zeros(len(seen), np.uint64)
    bits = np.zeros(len(seen), np.uint64)
    for token in range(len(seen)):
        symbol, extra, rest = token, 0, 0
        if token >= PAIR:
            symbol, extra, rest = token - PAIR, lengths[0], codes[0]
        elif token > MATCH:
            symbol, extra, rest = _length_symbol(max(token - MATCH, LEAST))
        value[token] = codes[symbol] | rest << lengths[symbol]
        bits[token] = lengths[symbol] + extra + (1 if MATCH < token < PAIR else 0)  # the distance's bit is 0
    waiting, number, place = np.uint64(state[1]), np.uint64(state[2]), state[0]
    for token in tokens:
        waiting |= value[token] << number
        number += bits[token]
        if number >= np.uint64(32):  # four bytes at once; a token adds at most 30 bits
            for byte in range(4):
                out[place + byte] = (waiting >> np.uint64(8 * byte)) & np.uint64(255)
            place += 4
            waiting >>= np.uint64(32)
            number -= np.uint64(32)
    for byte in range(-(-np.int64(number) // 8)):
        out[place] = (waiting >> np.uint64(8 * byte)) & np.uint64(255)
        place += 1
    return place
