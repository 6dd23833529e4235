"""The helper that finds a Python for an environment: it believes only an interpreter that runs."""

import shutil
import subprocess
import sys

import pytest

from sources import ROOT

BASH = shutil.which("bash")
VERSION = "%d.%d" % sys.version_info[:2]


@pytest.fixture
def places(tmp_path):
    """Folders for PATH and for pyenv's versions, both empty."""
    for name in ("path", "pyenv", "home"):
        (tmp_path / name).mkdir()
    return tmp_path


def find_python(places, version=VERSION, pyenv_root="pyenv"):
    environment = {"PATH": str(places / "path"), "HOME": str(places / "home")}
    if pyenv_root:
        environment["PYENV_ROOT"] = str(places / pyenv_root)
    return subprocess.run([BASH, str(ROOT / ".ci/find-python"), version], env=environment, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True)


def put_python(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    put_script(path, 'exec "%s" "$@"' % sys.executable)


def put_script(path, command):
    path.write_text("#!%s\n%s\n" % (BASH, command))
    path.chmod(0o755)


@pytest.mark.parametrize("place", ["path/python" + VERSION, "path/python3", "path/python",
                                   "pyenv/versions/%s.9/bin/python" % VERSION])
def test_finds(places, place):
    put_python(places / place)
    done = find_python(places)
    assert (done.stdout, done.stderr) == ("%s\n" % (places / place), "")


def test_finds_through_uv(places):
    working = places / "uv/python"
    put_python(working)
    put_script(places / "path/uv", '[ "$*" = "python find --system %s" ] && echo "%s"' % (VERSION, working))
    assert find_python(places).stdout == "%s\n" % working


def test_pyenv_without_its_variable(places):
    working = places / "home/.pyenv/versions" / (VERSION + ".9") / "bin/python"
    put_python(working)
    assert find_python(places, pyenv_root=None).stdout == "%s\n" % working


def test_passes_over_a_shim_that_refuses_to_run(places):
    put_script(places / "path" / ("python" + VERSION), "echo 'pyenv: command not found' >&2; exit 127")
    working = places / "pyenv/versions" / (VERSION + ".16") / "bin/python"
    put_python(working)
    assert find_python(places).stdout == "%s\n" % working


def test_says_in_one_sentence_how_to_get_it(places):
    put_python(places / "path/python3")
    done = find_python(places, "3.5")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pyenv install 3.5" in done.stderr
