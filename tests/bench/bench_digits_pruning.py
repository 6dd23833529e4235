"""What pruning costs in accuracy: digits, 8 epochs of fine-tuning from a trained float net, mean of three seeds.

    python tests/bench/bench_digits_pruning.py

The callbacks run with their defaults. Beside each accuracy stands the sparsity that was really reached. The LeNets lose
95 % of their weights; as in the paper they are not only tuned but trained with it, as long as the float nets were.
"""
from __future__ import annotations

import sys
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from digits_torch import (
    FLOAT_EPOCHS,
    FLOAT_RATE,
    SEEDS,
    accuracy,
    conv_net,
    float_nets,
    lenet_5,
    lenet_300_100,
    quiet,
    tune,
)
from slimtrain.callbacks import SIMDOCPrunerCallback, SNIPLevelPrunerCallback, TaylorFOChannelPrunerCallback


class Case(NamedTuple):
    kind: Any
    sparsity: float
    least: float       #: accuracy
    tolerance: float   #: of the sparsity


CASES = [Case(SNIPLevelPrunerCallback, sparsity, least, 1e-4)
         for sparsity, least in ((0.5, 0.986), (0.8, 0.984), (0.9, 0.975))]
CASES += [Case(SIMDOCPrunerCallback, sparsity, least, 5e-3)
          for sparsity, least in ((0.5, 0.986), (0.8, 0.980), (0.9, 0.968))]
CASES += [Case(TaylorFOChannelPrunerCallback, sparsity, least, 2e-2) for sparsity, least in ((0.5, 0.985), (0.8, 0.93))]
LENETS = (("LeNet-300-100", lenet_300_100), ("LeNet-5", lenet_5))


def run(net: Any, seed: int, kind: Any, sparsity: float, **training: Any) -> Any:
    """Accuracy and reached sparsity of one fine-tuning."""
    callback = kind(sparsity=sparsity, export_to="")
    model = tune(net, seed, callback, **training)
    smaller = callback.pruner.shrink() if kind is TaylorFOChannelPrunerCallback else model
    return accuracy(smaller), callback.pruner.sparsity


def main() -> int:
    quiet()
    table = Table("algorithm", "sparsity", "reached", "accuracy", "mean", "at least", "")
    failed = 0

    def row(name: str, sparsity: float, results: Any, least: float, tolerance: float) -> None:
        nonlocal failed
        accuracies = [result[0] for result in results]
        mean = sum(accuracies) / len(accuracies)
        worst = max((result[1] for result in results), key=lambda value: abs(value - sparsity))
        good = round(mean, 4) >= round(least, 4) and abs(worst - sparsity) <= tolerance
        failed += not good
        table.add_row(name, "%.2f" % sparsity, "%.4f" % worst, " ".join("%.4f" % value for value in accuracies),
                      "%.4f" % mean, "%.4f" % least, "ok" if good else "MISSED")

    nets = float_nets(conv_net)
    row("float", 0.0, [(accuracy(net), 0.0) for net in nets.values()], 0.0, 0.0)
    for case in CASES:
        row(case.kind.__name__[:-len("PrunerCallback")], case.sparsity,
            [run(nets[seed], seed, case.kind, case.sparsity) for seed in SEEDS], case.least, case.tolerance)
    for name, make in LENETS:
        nets = float_nets(make)
        whole = [(accuracy(net), 0.0) for net in nets.values()]
        row(name + " float", 0.0, whole, 0.0, 0.0)
        least = sum(value for value, _ in whole) / len(whole) - 0.01
        results = [run(nets[seed], seed, SNIPLevelPrunerCallback, 0.95, epochs=FLOAT_EPOCHS, rate=FLOAT_RATE)
                   for seed in SEEDS]
        row(name + " SNIP", 0.95, results, least, 1e-4)
    Console(width=120).print(table)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
