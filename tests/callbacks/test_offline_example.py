"""The example of offline quantization runs and loses next to nothing."""
from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("MNN")
EXAMPLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir, "examples", "offline_onnx.py")


def test_the_example_quantizes_a_network_of_scikit_learn(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, EXAMPLE, "--out", str(tmp_path)], capture_output=True, text=True,
                          timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "100.0 % of the weights asked for are int8" in done.stdout
    report = json.loads((tmp_path / "accuracy.json").read_text())
    assert report["int8 in MNN"] >= report["float"] - 0.005 > 0.9
    assert (tmp_path / "int8" / "digits.mnn").stat().st_size < 0.5 * (tmp_path / "digits.onnx").stat().st_size
