"""Files written whole or not at all: to a temporary neighbour first, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path
from typing import Sequence, Tuple, Union

PathLike = Union[str, "os.PathLike[str]"]


def write_whole(path: PathLike, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader, or a crash, sees the old or the new file, never a part.

    An existing file keeps its permission bits and, if ``path`` is a link, its place.

    Raises:
        OSError: the folder is missing or cannot be written; the old file is untouched.
    """
    replace_all([(path, data)])


def replace_all(files: Sequence[Tuple[PathLike, bytes]]) -> None:
    """Write several files, all or none as far as a file system allows.

    Every temporary is complete and on the disk before the first rename, so that only a failing rename
    (not a full disk, not a missing folder) can leave some files new and some old.

    Raises:
        OSError: as ``write_whole``.
    """
    targets = [Path(os.path.realpath(os.fspath(path))) for path, _ in files]
    temporaries = [target.with_name(".slimtrain-" + secrets.token_hex(8) + ".tmp") for target in targets]
    try:
        for target, temporary, (_, data) in zip(targets, temporaries, files):
            _write_temporary(target, temporary, data)
        for target, temporary in zip(targets, temporaries):
            os.replace(str(temporary), str(target))
    finally:
        for temporary in temporaries:
            if temporary.exists():
                temporary.unlink()
    for folder in sorted({str(target.parent) for target in targets}):
        _sync_folder(folder)


def _write_temporary(target: Path, temporary: Path, data: bytes) -> None:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "cannot write a file over a folder", str(target))
    handle = os.open(str(temporary), os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if target.exists():
        os.chmod(str(temporary), target.stat().st_mode & 0o7777)


def _sync_folder(folder: str) -> None:
    """Put the rename on the disk too, where folders can be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
