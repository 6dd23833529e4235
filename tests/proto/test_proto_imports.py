"""What proto may load: core and protobuf; the command line click and rich; MNN and frameworks never."""

import ast
import configparser
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import slimtrain.proto
from slimtrain.proto import VERSION

FOLDER = Path(slimtrain.proto.__file__).resolve().parent
MODULES = sorted(path for path in FOLDER.glob("*.py"))
ALLOWED = {"slimtrain.core", "slimtrain.proto", "numpy", "google.protobuf"}
# What single modules may import beyond that, and why is in their docstrings.
ONNX_MODULES = {path.name for path in MODULES if path.name.startswith("onnx_")}
EXTRA = {
    **{name: {"onnx"} for name in ONNX_MODULES},
    "onnx_check.py": {"onnx", "onnxruntime"},
    "bit_picture.py": {"matplotlib"},
    "bit_sensitivity.py": {"rich"},
    "calibration_data.py": {"PIL"},
    "cli_offline.py": {"click", "rich"},
    "cli.py": {"click", "rich"},
    "cli_config.py": {"click", "rich"},
    "doctor.py": {"click", "rich", "importlib_metadata", "importlib.metadata"},
    "printing.py": {"click", "rich"},
    "progress.py": {"rich"},
    "report.py": {"rich"},
    "report_page.py": {"jinja2", "matplotlib"},
    "report_table.py": {"rich"},
    "verification.py": {"onnxruntime"},
    "_runner.py": {"MNN"},
}
HEAVY = {
    "MNN",
    "_tools",
    "_mnncengine",
    "torch",
    "tensorflow",
    "onnx",
    "onnxruntime",
    "rich",
    "click",
    "scipy",
    "jinja2",
    "matplotlib",
}


def imported(path):
    """Full names of all modules that a file imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # "from google.protobuf import x" and "from google import protobuf" alike
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def in_standard_library(name):
    top = name.split(".")[0]
    if top in sys.builtin_module_names:
        return True
    origin = getattr(importlib.util.find_spec(top), "origin", None) or ""
    library = sysconfig.get_paths()["stdlib"]
    return origin == "frozen" or (origin.startswith(library) and "site-packages" not in origin)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_imports_as_written(path):
    allowed = ALLOWED | EXTRA.get(path.name, set())
    foreign = {
        name
        for name in imported(path)
        if not name.startswith("__future__")
        and not any((name + ".").startswith(module + ".") for module in allowed)
        and not in_standard_library(name)
    }
    assert foreign == set()


def loaded_by(statement):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(os.path.abspath(part) for part in sys.path))
    program = statement + "\nimport sys; print(' '.join({name.split('.')[0] for name in sys.modules}))"
    return set(subprocess.check_output([sys.executable, "-c", program], env=environment).decode().split())


def test_imports_as_loaded():
    assert loaded_by("import slimtrain.proto") & HEAVY == set()
    assert loaded_by("import slimtrain.proto.cli") & HEAVY == {"rich", "click"}


def test_the_check_notices_what_is_loaded():
    assert "rich" in loaded_by("import rich") & HEAVY


def test_the_version_is_that_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(str(FOLDER.parent / "setup.cfg"))
    assert setup["metadata"]["version"] == VERSION


def test_everything_public_is_listed():
    assert slimtrain.proto.__all__ == sorted(slimtrain.proto.__all__)
    assert all(hasattr(slimtrain.proto, name) for name in slimtrain.proto.__all__)
