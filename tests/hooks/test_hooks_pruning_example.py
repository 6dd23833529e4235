"""The pruning example runs, and its report says what its files hold."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from pruning import read_graph
from tf_setup import tf

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits_pruning_session.py"


def test_the_example_prunes_exports_and_draws(tmp_path):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    subprocess.run([sys.executable, str(EXAMPLE), "--steps", "40", "--sparsity", "0.7", "--out", str(tmp_path)],
                   env=environment, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((tmp_path / "report.json").read_text())
    kernels = [tf.make_ndarray(node.attr["value"].tensor) for node in read_graph(str(tmp_path / "model.pb")).node
               if node.op == "Const" and "/kernel" in node.name]
    zeros = sum(int(np.count_nonzero(kernel == 0)) for kernel in kernels)
    assert len(kernels) == len(report["layers"]) == 6
    assert report["sparsity"] == zeros / sum(kernel.size for kernel in kernels)
    assert abs(report["sparsity"] - 0.7) < 5e-3
    assert report["pruned"]["bytes"] == (tmp_path / "model.mnn").stat().st_size < 0.6 * report["float"]["bytes"]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
