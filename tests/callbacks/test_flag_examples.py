"""The examples that take their compression from a flag, as a shell runs them."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("MNN")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PIPELINE = "prune:simd_oc,sparsity=0.5,total_pruning_iterations=2,end=0.5;quantize:lsq"


def run(name, *words):
    """What an example printed."""
    done = subprocess.run([sys.executable, str(EXAMPLES / name), *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_script_with_argparse(tmp_path):
    printed = run("cli_digits.py", "--epochs", 1, "--compress-epochs", 2, "--out", tmp_path, "--compress", PIPELINE)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert json.loads(printed.strip().splitlines()[-1]) == report
    assert report["coverage"] == 1.0 and report["sqnr_db"] >= 100
    assert report["accuracy"]["mnn"] >= report["accuracy"]["float"] - 0.1  # it was trained on, and for longer
    assert (tmp_path / "compression_report.html").exists() and (tmp_path / "model.mnn").exists()


def test_lightning_cli(tmp_path):
    quiet = ["--trainer.max_epochs", 1, "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
    run("lightning_cli.py", "fit", *quiet, "--compress", "quantize:lsq,bits=4;export:%s" % (tmp_path / "m"))
    report = json.loads((tmp_path / "compression_report.json").read_text(encoding="utf-8"))
    assert report["coverage"] == 1.0 and report["sqnr_db"] >= 100


def test_a_wrong_flag_ends_before_training():
    done = subprocess.run([sys.executable, str(EXAMPLES / "cli_digits.py"), "--compress", "quantize:lsq,bits=9"],
                          capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2
    assert "bits must be an integer from 2 to 8, got 9" in done.stderr and "Epoch" not in done.stdout
