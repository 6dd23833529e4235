"""Choosing layers by exact name or shell pattern (``features.*``); a choice of nothing is an error."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from typing import Iterable, List, Sequence, Set


def select(names: Sequence[str], patterns: Iterable[str]) -> List[str]:
    """The names that equal or match any of the patterns, in the order of ``names``.

    Args:
        names: all known layer names.
        patterns: exact names, or ``fnmatch`` patterns with ``*``, ``?`` and ``[...]``, case-sensitive.

    Raises:
        TypeError: ``patterns`` is one string, or holds something else than strings.
        ValueError: a pattern matches nothing; the message lists the nearest names.
    """
    if isinstance(patterns, str):
        raise TypeError(f"patterns must be several strings, got the one string {patterns!r}")
    chosen: Set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"a pattern must be a string, got {pattern!r}")
        matched = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(_nothing_matches(pattern, names))
        chosen.update(matched)
    return [name for name in names if name in chosen]


def _nothing_matches(pattern: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
    if near:
        return f"no layer matches {pattern!r}; the nearest names are {', '.join(map(repr, near))}"
    return f"no layer matches {pattern!r}; known are {', '.join(map(repr, names)) or 'none'}"
