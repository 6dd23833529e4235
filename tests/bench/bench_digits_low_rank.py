"""What low rank costs, and what over-parameterization brings, in accuracy: digits, mean of three seeds.

    python tests/bench/bench_digits_low_rank.py

Low rank: 8 epochs of fine-tuning from a trained float net, with the default ranks and with a budget of 16.5 % of the
parameters. Over-parameterization: 20 epochs from scratch beside 20 epochs of the plain net; the merged net is tested.
"""
from __future__ import annotations

import sys
from typing import Any, List, Tuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from digits_torch import FLOAT_EPOCHS, FLOAT_RATE, SEEDS, accuracy, conv_net, fit, float_nets, quiet, tune
from slimtrain.callbacks import LOPCallback, LowRankDecompositionCallback
from slimtrain.core import BudgetRanks, Cost

RATES = (4,)


def weights(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters() if value.dim() > 1)


def low_rank(net: nn.Module, seed: int, **options: Any) -> Tuple[float, float]:
    """Accuracy and share of the weights that is left."""
    model = tune(net, seed, LowRankDecompositionCallback(export_to="", **options))
    return accuracy(model), weights(model) / weights(net)


def expanded(seed: int, rate: int) -> Tuple[float, float]:
    """Accuracy of the merged net, and its share of the plain net's weights."""
    torch.manual_seed(seed)
    callback = LOPCallback(rate, export_to="")
    model = fit(conv_net(), seed, FLOAT_EPOCHS, FLOAT_RATE, callback)
    callback.merge()
    return accuracy(model), weights(model) / weights(conv_net())


def main() -> int:
    quiet()
    nets = float_nets()
    rows: List[Tuple[str, List[Tuple[float, float]], float]] = [
        ("float, 20 epochs", [(accuracy(net), 1.0) for net in nets.values()], 0.0),
        ("low rank, defaults", [low_rank(nets[seed], seed) for seed in SEEDS], 0.982),
        ("low rank, 16.5 % of the parameters", [low_rank(
            nets[seed], seed, rank_rule=BudgetRanks(0.165, Cost.PARAMETERS)) for seed in SEEDS], 0.982)]
    rows += [("LOP of rate %d, 20 epochs" % rate, [expanded(seed, rate) for seed in SEEDS], 0.990) for rate in RATES]
    table, failed = Table("training", "weights left", "accuracy", "mean", "at least", ""), False
    for name, results, least in rows:
        mean = sum(value for value, _ in results) / len(results)
        good = round(mean, 4) >= least
        failed |= not good
        table.add_row(name, "%.3f" % results[0][1], " ".join("%.4f" % value for value, _ in results), "%.4f" % mean,
                      "%.3f" % least, "ok" if good else "MISSED")
    Console(width=120).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
