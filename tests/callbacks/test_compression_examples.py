"""The examples of pruning, low rank and automatic bits run, with few steps, and leave what they promise."""
from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("MNN")
EXAMPLES = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir, "examples")


def run(name, *words):
    done = subprocess.run([sys.executable, os.path.join(EXAMPLES, name), *map(str, words)], capture_output=True,
                          text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def read(folder):
    return json.loads((folder / "report.json").read_text())


def test_pruning(tmp_path):
    output = run("digits_pruning.py", "--out", tmp_path, "--epochs", 1, 2, "--sparsity", 0.7)
    report = read(tmp_path)
    assert report["sparsity"] == pytest.approx(0.7, abs=5e-3)
    assert report["files"]["pruned"]["bytes"] < 0.25 * report["files"]["dense"]["bytes"]
    left, total = (sum(row[key] for row in report["layers"]) for key in ("left", "weights"))
    assert 1 - left / total == pytest.approx(report["sparsity"], abs=1e-3)
    assert all(row["sensitivity"] > 0 for row in report["layers"])
    assert (tmp_path / "layers.png").stat().st_size > 10000
    assert "sensitivity" in output


def test_low_rank(tmp_path):
    run("digits_low_rank.py", "--out", tmp_path, "--epochs", 1, 1)
    report = read(tmp_path)
    assert report["files"]["low rank, int8"]["sqnr_db"] >= 100
    assert report["files"]["low rank, int8"]["bytes"] < 0.12 * report["files"]["dense"]["bytes"]
    assert all(row["parameters"][1] <= row["parameters"][0] for row in report["layers"])
    assert sum(bool(row["ranks"]) for row in report["layers"]) == 4
    assert (tmp_path / "spectra.png").stat().st_size > 10000


def test_automatic_bits(tmp_path):
    output = run("digits_automatic_bits.py", "--out", tmp_path, "--epochs", 2)
    assert (tmp_path / "sensitivity.png").stat().st_size > 10000
    assert (tmp_path / "chosen.mnn").stat().st_size < 1.1 * (tmp_path / "3_bits.mnn").stat().st_size
    assert "chosen" in output
