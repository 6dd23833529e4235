"""What is shipped is what stands in the tree, and it works where the checkout is absent."""

import configparser
import fnmatch
import os
import subprocess
import tarfile
import zipfile

import pytest

import slimtrain.proto
from sources import FOLDERS, ROOT, repository_files

LIBRARY = {path.as_posix() for path in repository_files() if path.parts[0] in FOLDERS}
CLEAN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL")}


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the wheel and the sdist that ``make dist`` builds from this tree."""
    folder = tmp_path_factory.mktemp("dist")
    run("make", "-C", ROOT, "dist", "DIST=%s" % folder)
    return folder


def run(*command, **options):
    """Standard output of a command, which fails the test with all it said if it fails."""
    done = subprocess.run([str(part) for part in command], env=CLEAN, text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def only(paths):
    found = list(paths)
    assert len(found) == 1, found
    return found[0]


def lines(text):
    return [line for line in text.splitlines() if line]


def test_every_folder_is_a_package(setup_cfg):
    assert lines(setup_cfg["options"]["packages"]) == ["slimtrain." + folder for folder in lines(
        "core\ncallbacks\nhooks\nproto")]
    mapping = dict(line.split(" = ") for line in lines(setup_cfg["options"]["package_dir"]))
    assert mapping == {"slimtrain." + folder: folder for folder in FOLDERS}


def test_every_data_file_is_declared(setup_cfg):
    patterns = {package.split(".")[1]: value.split(", ") for package, value in
                setup_cfg["options.package_data"].items()}
    left_out = [path for path in sorted(LIBRARY) if not path.endswith(".py") and not any(
        fnmatch.fnmatch(path.split("/")[1], pattern) for pattern in patterns[path.split("/")[0]])]
    assert left_out == []


def test_both_versions_are_the_same(setup_cfg):
    assert setup_cfg["metadata"]["version"] == slimtrain.proto.VERSION


def test_pyproject_holds_the_build_system_alone():
    assert len((ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.slow
def test_wheel_holds_exactly_the_tree(dist):
    with zipfile.ZipFile(only(dist.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        licences = [name for name in wheel.namelist() if name.endswith("LICENSE")]
    assert names == {"slimtrain/" + path for path in LIBRARY}
    assert licences


@pytest.mark.slow
def test_sdist_holds_the_tree(dist):
    with tarfile.open(only(dist.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert LIBRARY | {"setup.cfg", "pyproject.toml", "README.md", "LICENSE"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("version, constraints", [("3.7", "tf1.txt"), ("3.11", "torch.txt")])
def test_wheel_works_in_a_clean_environment(dist, tmp_path, version, constraints):
    python = tmp_path / "venv/bin/python"
    run(run(ROOT / ".ci/find-python", version).strip(), "-m", "venv", tmp_path / "venv")
    run(python, "-m", "pip", "install", only(dist.glob("*.whl")), "--constraint", ROOT / "constraints" / constraints)
    program = ("import slimtrain.core, slimtrain.proto, sys, importlib.util as util\n"
               "print(sys.version_info[:2], slimtrain.core.__file__)\n"
               "print([name for name in %r if util.find_spec(name)])" % (FOLDERS,))
    where, leaked = lines(run(python, "-c", program, cwd=tmp_path))
    assert where.startswith("(%s) %s" % (version.replace(".", ", "), tmp_path))
    assert leaked == "[]"
    assert "Usage:" in run(tmp_path / "venv/bin/slimtrain", "--help", cwd=tmp_path)
