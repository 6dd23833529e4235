"""The demo does what it says: in a minimum of training, and (slow) as the user runs it."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("MNN")
DEMO = Path(__file__).resolve().parents[2] / "examples" / "digits_lightning.py"


def run(folder, *options):
    """Run the demo in a process of its own: its report and what it printed."""
    done = subprocess.run([sys.executable, str(DEMO), "--out", str(folder), *options], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text()), done.stdout


def check(report, folder):
    assert report["coverage"] == 1.0
    assert report["sqnr_db"] >= 100
    models = report["models"]
    assert models["MNN int8"]["bytes"] == (folder / "int8.mnn").stat().st_size <= 0.3 * models["MNN float"]["bytes"]
    assert models["MNN int8"]["accuracy"] == models["fake-quant"]["accuracy"]
    assert models["MNN float"]["sqnr_db"] >= 100
    assert (folder / "compression_report.html").exists()
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_demo_with_little_training(tmp_path):
    report, printed = run(tmp_path, "--epochs", "1", "--qat-epochs", "1")
    check(report, tmp_path)
    assert {"stem.0", "separate.0", "logits"} <= set(report["layer_sqnr_db"])
    assert all(name in printed for name in report["models"])


@pytest.mark.slow
def test_whole_demo(tmp_path):
    report, _ = run(tmp_path)
    check(report, tmp_path)
    assert report["models"]["MNN int8"]["accuracy"] >= report["models"]["float"]["accuracy"] - 0.01
    assert report["models"]["float"]["accuracy"] >= 0.97
