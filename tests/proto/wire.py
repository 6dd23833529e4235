"""Protobuf's wire format by hand: the oracle for golden bytes, and a file as another toolbox writes it."""

import struct


def varint(value):
    value %= 1 << 64
    digits = []
    while True:
        digits.append(value & 127 | (128 if value > 127 else 0))
        value >>= 7
        if not value:
            return bytes(digits)


def number(field, value):
    return varint(field << 3) + varint(value)


def real(field, value):
    return varint(field << 3 | 5) + struct.pack("<f", value)


def text(field, value):
    return block(field, value.encode())


def block(field, *parts):
    content = b"".join(parts)
    return varint(field << 3 | 2) + varint(len(content)) + content


# One layer with fields that our own writer would refuse: 4 bits, a zero point; and one field nobody knows (15).
FOREIGN_LAYER = block(
    4,
    block(1, text(1, "x"), number(2, 4), real(3, 0.5), number(4, 3)),
    block(2, text(1, "w"), real(3, 0.5), real(3, 0.25), number(5, 7)),
    block(3, text(1, "y"), real(3, 2.0), number(5, -8), number(6, 7)),
    number(4, 0),
    text(15, "unknown"),
)
FOREIGN_QUANTIZE = block(2, number(1, 0), block(2, number(1, 1), FOREIGN_LAYER))
FOREIGN_PRUNE = block(
    2, number(1, 1), block(3, number(1, 0), block(2, text(1, "w"), real(2, 0.5), text(3, "layer")))
)
FOREIGN_FILE = (
    text(1, "0.0.0") + FOREIGN_QUANTIZE + FOREIGN_PRUNE + text(3, "their-uuid") + text(9, "unknown too")
)
