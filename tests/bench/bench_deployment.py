"""What MNN computes against what was trained: every family of networks, 8 to 2 bits, as a Markdown table.

    python tests/bench/bench_deployment.py [--nets PATTERN] [--bits 8 4 3 2] [--json FILE]

Each network is trained a few steps with LSQ, exported, converted, and run by MNN on three inputs it has not seen. A
cell is the worst SQNR in dB of these against the simulation; "exact" stands for no difference in any value. The exit
code tells whether every cell reaches 100 dB, also against a float64 copy of the model, at full coverage.
"""
from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import os
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "callbacks"))

import torch
from rich.console import Console
from rich.progress import track

from deployments import Comparison, compare
from slimtrain.callbacks import LSQQuantizer
from zoo import ZOO

_ENOUGH_DB = 100.0


def cell(result: Comparison) -> str:
    figure = "exact" if result.sqnr_db == float("inf") else "%.0f" % result.sqnr_db
    return figure if result.coverage == 1.0 else "%s (%.0f %% int8)" % (figure, 100 * result.coverage)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default="*", help="names or a pattern of names")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--steps", type=int, default=6, help="of training")
    parser.add_argument("--json", help="also write all figures to this file")
    options = parser.parse_args()
    logging.getLogger("slimtrain").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    names = fnmatch.filter(ZOO, options.nets)
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        pairs = [(name, bits) for name in names for bits in options.bits]
        for number, (name, bits) in enumerate(track(pairs, "Deploying", console=Console(stderr=True))):
            table[name, bits] = compare(lambda model, bits=bits: LSQQuantizer(model, bits=bits), ZOO[name],
                                        os.path.join(folder, str(number)), steps=options.steps)
    lines = ["| network | %s |" % " | ".join("W%dA%d" % (bits, bits) for bits in options.bits),
             "| --- |%s" % (" ---: |" * len(options.bits))]
    lines += ["| %s | %s |" % (name, " | ".join(cell(table[name, bits]) for bits in options.bits)) for name in names]
    sys.stdout.write("\n".join(lines) + "\n")
    if options.json:
        figures = [{"network": name, "bits": bits, "sqnr_db": result.sqnr_db, "float64_db": result.float64_db,
                    "coverage": result.coverage, "max_steps": result.steps} for (name, bits), result in table.items()]
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)
    passed = [min(each.sqnr_db, each.float64_db) >= _ENOUGH_DB and each.coverage == 1.0 for each in table.values()]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
