"""Whole files or none, whatever fails and whenever the process dies."""

import os
import signal
import subprocess
import sys
import time

import pytest

from slimtrain.core import replace_all, write_whole

posix = pytest.mark.skipif(os.name != "posix", reason="permission bits, links and signals of POSIX")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "model.bin"
    write_whole(path, b"first, the longer one")
    write_whole(str(path), b"second")
    assert path.read_bytes() == b"second"
    assert names(tmp_path) == ["model.bin"]


@posix
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_obeys_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


@posix
def test_an_old_file_keeps_its_mode_and_a_link_its_place(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a", tmp_path / "link"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_whole(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path / "real") == ["a"]


@pytest.mark.parametrize("function", ["fsync", "replace", "fdopen"])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "no" / "a", b"x")


@pytest.mark.parametrize("second, error", [("no/b", FileNotFoundError), ("folder", IsADirectoryError)])
def test_several_files_are_written_together_or_not_at_all(tmp_path, second, error):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error):
        replace_all([(tmp_path / "a", b"new"), (tmp_path / second, b"new")])
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a", "folder"]
    replace_all([(tmp_path / "a", b"new"), (tmp_path / "folder" / "b", b"too")])
    assert (tmp_path / "a").read_bytes() == b"new" and (tmp_path / "folder" / "b").read_bytes() == b"too"


@posix
def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a"
    write_whole(path, bytes(300000))
    program = ("import itertools, sys; from slimtrain.core import write_whole\n"
               "for i in itertools.count(): write_whole(sys.argv[1], bytes([i % 251]) * 300000)")
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    for pause in (0.0, 0.013, 0.029):
        writer = subprocess.Popen([sys.executable, "-c", program, str(path)], env=environment)
        try:
            deadline = time.monotonic() + 60
            first = path.stat().st_ino
            while path.stat().st_ino == first and time.monotonic() < deadline:
                time.sleep(0.001)
            assert path.stat().st_ino != first, "the writer never wrote"
            time.sleep(pause)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        data = path.read_bytes()
        assert len(data) == 300000 and data == data[:1] * 300000
