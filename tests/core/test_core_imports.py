"""The core stays light: numpy, the standard library and a YAML reader, both as written and as loaded."""

import ast
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import slimtrain.core

FOLDER = Path(slimtrain.core.__file__).parent
ALLOWED = {"numpy", "yaml", "slimtrain.core"}
HEAVY = {"torch", "lightning", "pytorch_lightning", "tensorflow", "onnx", "onnxruntime", "MNN", "google",
         "scipy", "matplotlib", "rich", "click", "yaml"}


def imported_modules(source):
    """Full names of all modules that a source imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def in_standard_library(name):
    top = name.split(".")[0]
    spec = importlib.util.find_spec(top) if top else None
    if spec is None:
        return False
    origin = spec.origin or ""
    library = sysconfig.get_paths()["stdlib"]
    return origin in ("built-in", "frozen") or (origin.startswith(library) and "site-packages" not in origin)


def foreign_imports(source):
    return {name for name in imported_modules(source) if not in_standard_library(name)
            and not any(name == allowed or name.startswith(allowed + ".") for allowed in ALLOWED)}


def loaded_by(statement, *extra_path):
    """Top-level names of the modules that a fresh interpreter has loaded after a statement."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([*map(str, extra_path), *sys.path]))
    program = statement + "\nimport sys; print(' '.join({name.split('.')[0] for name in sys.modules}))"
    output = subprocess.check_output([sys.executable, "-c", program], env=environment)
    return set(output.decode().split())


def test_sources_import_only_what_is_allowed():
    sources = sorted(FOLDER.glob("*.py"))
    assert len(sources) > 5
    offenders = {path.name: foreign_imports(path.read_text(encoding="utf-8")) for path in sources}
    assert {name: found for name, found in offenders.items() if found} == {}


def test_the_source_scan_detects():
    source = "import os, numpy.linalg\nfrom slimtrain.core.grid import Grid\n"
    assert foreign_imports(source) == set()
    source += "def f():\n    import torch.nn\n    from slimtrain.proto import x\n    from . import y\n"
    assert foreign_imports(source) == {"torch.nn", "slimtrain.proto", "."}


def test_importing_core_loads_nothing_heavy():
    loaded = loaded_by("import slimtrain.core")
    assert {"slimtrain", "numpy"} <= loaded
    assert loaded & HEAVY == loaded_by("import numpy") & HEAVY


def test_the_load_check_detects(tmp_path):
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "innocent.py").write_text("def f():\n    pass\nimport torch\n")
    assert "torch" in loaded_by("import innocent", tmp_path) & HEAVY
    assert "torch" not in loaded_by("import numpy", tmp_path)
