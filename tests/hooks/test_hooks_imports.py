"""Importing one framework's side never loads the other; seen in a process of its own."""
import subprocess
import sys

import pytest


def modules_after(code, names):
    """Which of ``names`` are loaded after running ``code`` in a fresh interpreter."""
    script = "import sys; sys.path[:0] = {!r}; {}; print('LOADED', [n for n in {!r} if n in sys.modules])".format(
        [path for path in sys.path if path], code, list(names))
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    return output.stdout.decode().split("LOADED")[1].strip()


FRAMEWORKS = ("torch", "lightning", "pytorch_lightning", "slimtrain.callbacks", "onnx")


def test_hooks_load_no_torch():
    assert modules_after("import slimtrain.hooks", FRAMEWORKS) == "[]"


@pytest.mark.parametrize("blocked", ["torch", "onnx"])
def test_hooks_import_where_torch_cannot_be_imported(blocked):
    code = "sys.modules[{!r}] = None; import slimtrain.hooks".format(blocked)
    assert modules_after(code, ["slimtrain.hooks"]) == "['slimtrain.hooks']"


def test_the_detector_detects():
    assert modules_after("import json", ["json"]) == "['json']"
    with pytest.raises(subprocess.CalledProcessError):
        modules_after("sys.modules['json'] = None; import json", ["json"])
