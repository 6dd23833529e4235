"""The example of low rank and over-parameterization runs, and its report says what its files hold."""
import json
import os
import subprocess
import sys
from pathlib import Path

from slimtrain.core import LayerState
from slimtrain.proto import inspect_model

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits_low_rank_session.py"


def test_the_example_decomposes_quantizes_and_expands(tmp_path):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    subprocess.run([sys.executable, str(EXAMPLE), "--steps", "20", "--out", str(tmp_path)], env=environment, check=True,
                   stdout=subprocess.DEVNULL)
    report = json.loads((tmp_path / "report.json").read_text())
    runs = report["runs"]
    assert report["sqnr_db"] >= 100 and runs["low rank, int8"]["coverage"] == 1.0
    layers = {line["name"]: line for line in report["layers"]}
    assert len(layers["hidden/matmul"]["ranks"]) == 1 and layers["separate/depthwise"]["reason"]
    left, dense = (sum(line["parameters"][index] for line in report["layers"]) for index in (1, 0))
    assert left < 0.45 * dense
    model = inspect_model(str(tmp_path / "low-rank" / "model.mnn"))
    assert sum(layer.parameters for layer in model.layers if layer.state is LayerState.INT8) == left
    assert runs["low rank, int8"]["bytes"] == (tmp_path / "low-rank" / "model.mnn").stat().st_size
    assert runs["low rank, int8"]["bytes"] < 0.2 * runs["float"]["bytes"]
    assert runs["LOP, merged"]["bytes"] == (tmp_path / "lop" / "model.mnn").stat().st_size
    assert abs(runs["LOP, merged"]["bytes"] - runs["float"]["bytes"]) < 0.01 * runs["float"]["bytes"]
