"""Files written whole or not at all: into a temporary neighbour, to the disk, then renamed over the target."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import List, Sequence, Tuple, Union

PathLike = Union[str, "os.PathLike[str]"]


def write_whole(path: PathLike, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader, or a crash, sees the old file or the new one, never a part.

    Raises:
        OSError: the folder is missing or cannot be written; an old file is untouched.
    """
    replace_all([(path, data)])


def replace_all(files: Sequence[Tuple[PathLike, bytes]]) -> None:
    """Write several files, all or none as far as a file system allows.

    Every temporary is complete and on the disk before the first rename, so only a failing rename
    (not a full disk, not bad data) can leave some files new and some old.

    Raises:
        OSError: as ``write_whole``.
    """
    waiting = []  # type: List[Tuple[str, Path]]
    try:
        for path, data in files:
            target = Path(path)
            waiting.append((_write_temporary(target, data), target))
        while waiting:
            os.replace(waiting[0][0], str(waiting[0][1]))
            waiting.pop(0)
    finally:
        for temporary, _ in waiting:
            os.unlink(temporary)
    for folder in sorted({str(Path(path).parent) for path, _ in files}):
        _sync_folder(folder)


def _write_temporary(target: Path, data: bytes) -> str:
    handle, name = tempfile.mkstemp(prefix="." + target.name + ".", suffix=".tmp", dir=str(target.parent))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.chmod(name, _mode(target))
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(name)
        raise
    return name


def _mode(target: Path) -> int:
    """Permission bits: those of the file to be replaced, else what ``open`` would give."""
    if target.exists():
        return target.stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _sync_folder(folder: str) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
