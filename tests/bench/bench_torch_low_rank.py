"""Time of low-rank decomposition and of over-parameterization on networks of full size.

    python tests/bench/bench_torch_low_rank.py

Seconds on this machine, the best of two runs; the exit code tells whether every limit holds.
"""
from __future__ import annotations

import os
import sys
import time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "callbacks"))
from rich.console import Console
from rich.table import Table

from bench_torch_qat import mobilenet
from slimtrain.callbacks import LOP, low_rank_decompose
from zoo import ResNet


def seconds(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def expand_and_merge(model):
    lop = LOP(model)
    lop.linear_expand_layers(4, None)
    lop.linear_merge_layers()


def main() -> int:
    torch.manual_seed(0)
    resnet, small = ResNet(64, 1000), mobilenet()
    cases = (("low_rank_decompose, ResNet-18", 3.0, lambda: low_rank_decompose(resnet, None)),
             ("low_rank_decompose, MobileNetV2", 1.0, lambda: low_rank_decompose(small, None)),
             ("LOP of rate 4, expand and merge, ResNet-18", 3.0, lambda: expand_and_merge(resnet)))
    table, failed = Table("figure", "seconds", "at most", ""), False
    for name, limit, function in cases:
        value = min(seconds(function), seconds(function))
        failed |= value > limit
        table.add_row(name, "%.2f" % value, "%.0f" % limit, "ok" if value <= limit else "MISSED")
    Console(width=120).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
