"""The example that takes its compression from a flag, as a shell runs it."""
import json
import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cli_digits_session.py"
PIPELINE = "prune:simd_oc,sparsity=0.5,total_pruning_iterations=2,end=0.5;quantize:lsq"


def test_a_script_with_argparse(tmp_path):
    words = ["--steps", "30", "--compress-steps", "30", "--out", str(tmp_path), "--compress", PIPELINE]
    done = subprocess.run([sys.executable, str(EXAMPLE), *words], capture_output=True, timeout=600, check=False,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr.decode("utf-8")[-3000:]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert json.loads(done.stdout.decode("utf-8").strip().splitlines()[-1]) == report
    assert report["coverage"] == 1.0 and report["sqnr_db"] >= 100
    assert report["accuracy"]["mnn"] >= report["accuracy"]["float"] - 0.1  # it was trained on, and for longer
