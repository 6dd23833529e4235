"""Reading the tables of a flatbuffer by the numbers that its schema gives to their fields.

A flatbuffer begins with the offset of its root. A table begins with the distance back to its vtable, which holds two
sizes and then, for each field, its place in the table, or 0 where it is left out. Strings, vectors and other tables
are stored as the distance to them; all numbers are little-endian.
"""

from __future__ import annotations

import struct
from typing import List, Optional, Tuple

import numpy as np


class Table:
    """A table inside ``data``, uint8 [bytes]; vectors are views of it, writable where it is."""

    def __init__(self, data: np.ndarray, at: int) -> None:
        self._data = data
        self._at = at
        self._vtable = at - _number(data, at, "<i")

    @classmethod
    def root(cls, data: np.ndarray) -> Table:
        """The table that holds all others.

        Raises:
            struct.error: here and in all methods, ``data`` ends too early.
        """
        return cls(data, _target(data, 0))

    def number(self, field: int, form: str, default: int = 0) -> int:
        """A number in the form of ``struct``; ``default`` where it is left out."""
        at = self._find(field)
        return default if at is None else _number(self._data, at, form)

    def table(self, field: int) -> Optional[Table]:
        """Another table, also one of a union; None where it is left out."""
        at = self._find(field)
        return None if at is None else Table(self._data, _target(self._data, at))

    def tables(self, field: int) -> List[Table]:
        """A vector of tables, empty where it is left out."""
        start, count = self._vector(field)
        return [Table(self._data, _target(self._data, start + 4 * index)) for index in range(count)]

    def vector(self, field: int, dtype: str) -> np.ndarray:
        """A vector of numbers, [count]; empty where it is left out."""
        start, count = self._vector(field)
        return self._data[start : start + count * np.dtype(dtype).itemsize].view(dtype)

    def text(self, field: int) -> str:
        """A string, "" where it is left out."""
        return self.vector(field, "u1").tobytes().decode("utf-8", errors="replace")

    def _find(self, field: int) -> Optional[int]:
        slot = 4 + 2 * field
        if slot >= _number(self._data, self._vtable, "<H"):
            return None  # written by an older schema
        distance = _number(self._data, self._vtable + slot, "<H")
        return self._at + distance if distance else None

    def _vector(self, field: int) -> Tuple[int, int]:
        """Where the elements begin, and their number."""
        at = self._find(field)
        if at is None:
            return 0, 0
        start = _target(self._data, at)
        return start + 4, _number(self._data, start, "<I")


def _target(data: np.ndarray, at: int) -> int:
    return at + _number(data, at, "<I")


def _number(data: np.ndarray, at: int, form: str) -> int:
    return int(struct.unpack_from(form, data.data, at)[0])
