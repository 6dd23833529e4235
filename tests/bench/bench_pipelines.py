"""Stacked pipelines on digits, in both frameworks: accuracy, bytes, SQNR and coverage of what MNN runs.

    python tests/bench/bench_pipelines.py [--framework torch|tf1|tf2 ...]

Each row is a run of examples/cli_digits.py or examples/cli_digits_session.py in its environment.
"""
import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"torch": "cli_digits.py", "tf1": "cli_digits_session.py", "tf2": "cli_digits_session.py"}
PIPELINES = (
    "prune:simd_oc,sparsity=0.5,end=0.5;quantize:lsq",
    "over_parameterize:lop,expand_rate=2,keep_weights=true;prune:simd_oc,sparsity=0.5,end=0.5;quantize:lsq",
    "low_rank:tucker;quantize:lsq",
    "prune:simd_oc,sparsity=0.5,end=0.5;quantize:weight,bits=4",
    "prune:snip,sparsity=0.5,end=0.5;quantize:oaq",
    "prune:simd_oc,sparsity=0.5,end=0.4;quantize:lsq,begin=0.5,end=0.9",
)


def run(framework, pipeline, folder):
    """The report of one run, or the last line of what went wrong."""
    python, script = ROOT / ".venv" / framework / "bin" / "python", ROOT / "examples" / SCRIPTS[framework]
    command = [str(python), "-W", "ignore", str(script), "--compress", pipeline, "--out", folder]
    environment = dict(os.environ, PYTHONPATH=str(ROOT / "build" / "dev"))
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    if done.returncode:
        return None, (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no word"])[-1]
    return json.loads(Path(folder, "report.json").read_text(encoding="utf-8")), ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--framework", nargs="+", choices=sorted(SCRIPTS), default=["torch", "tf1"])
    options = parser.parse_args()
    print("| pipeline | framework | float | MNN | bytes | SQNR (dB) | coverage |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for pipeline in PIPELINES:
        for framework in options.framework:
            with tempfile.TemporaryDirectory() as folder:
                report, problem = run(framework, pipeline, folder)
            if report is None:
                print("| `%s` | %s | failed: %s |" % (pipeline, framework, problem))
                continue
            print("| `%s` | %s | %.4f | %.4f | %d | %s | %.2f |" % (
                pipeline, framework, report["accuracy"]["float"], report["accuracy"]["mnn"], report["bytes"],
                "%.0f" % report["sqnr_db"] if "sqnr_db" in report else "", report["coverage"]), flush=True)


if __name__ == "__main__":
    main()
