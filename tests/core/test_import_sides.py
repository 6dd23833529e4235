"""``slimtrain.callbacks`` imports where TensorFlow cannot be imported; seen in a process of its own."""
import importlib.util
import subprocess
import sys

import pytest

SCRIPT = ("import sys; sys.path[:0] = {!r}; sys.modules[{!r}] = None; import {}; "
          "assert not {!r} & set(sys.modules) - {{{!r}}}")


def imports(module, blocked, unwanted=()):
    """Whether ``module`` imports in a fresh interpreter in which ``blocked`` does not, and loads nothing unwanted."""
    script = SCRIPT.format([path for path in sys.path if path], blocked, module, set(unwanted), blocked)
    return subprocess.run([sys.executable, "-c", script], stderr=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="this environment is TensorFlow's")
def test_callbacks_need_no_tensorflow():
    assert imports("slimtrain.callbacks", "tensorflow", ["keras", "slimtrain.hooks"])


def test_the_detector_detects():
    assert imports("json", "tensorflow")
    assert not imports("json", "json")
    assert not imports("json", "tensorflow", ["json"])
