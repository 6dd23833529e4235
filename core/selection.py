"""Choosing layers by exact name or shell pattern (``features.*``); a choice that matches nothing is an error."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from typing import Iterable, List, Sequence


def select(names: Sequence[str], patterns: Iterable[str]) -> List[str]:
    """The names that equal or match any of the patterns, in the order of ``names``.

    Args:
        names: all known layer names.
        patterns: exact names, or patterns of ``fnmatch`` with ``*``, ``?`` and ``[...]``, case-sensitive.

    Raises:
        TypeError: ``patterns`` is one string instead of several.
        ValueError: a pattern matches nothing; the message lists the nearest names.
    """
    if isinstance(patterns, str):
        raise TypeError("patterns must be a sequence of strings, got the string {!r}".format(patterns))
    chosen = set()
    for pattern in patterns:
        matched = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(_nothing_matches(pattern, names))
        chosen.update(matched)
    return [name for name in names if name in chosen]


def _nothing_matches(pattern: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
    if near:
        return "no layer matches {!r}; the nearest names are {}".format(pattern, ", ".join(map(repr, near)))
    return "no layer matches {!r}; known are {}".format(pattern, ", ".join(map(repr, names)) or "none")
