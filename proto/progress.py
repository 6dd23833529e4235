"""A progress bar for what takes longer than a breath: calibration, sensitivity, decomposition.

It stands on a terminal only, on standard error, and is gone when the work is done; in a log file, a notebook or the
other processes of a distributed training nothing appears.
"""
from __future__ import annotations

import os
from typing import Iterable, Iterator, Optional, Sized, TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def with_progress(items: Iterable[Item], what: str, console: Optional[Console] = None) -> Iterator[Item]:
    """Go through items while a bar shows how far one is.

    Args:
        items: any iterable; one that knows its length shows its end. A single item shows nothing.
        what: stands before the bar: ``"calibrating"``.
        console: where; standard error when None.
    """
    total = len(items) if isinstance(items, Sized) else None
    shown = console or Console(stderr=True)
    if not shown.is_terminal or total == 1 or os.environ.get("LOCAL_RANK", "0") != "0":
        return iter(items)
    return iter(track(items, what, total, console=shown, transient=True))
