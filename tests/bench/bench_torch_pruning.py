"""Time and size of pruning in PyTorch: events, steps that keep zeros, shrunk channels and sparse blocks in MNN files.

    python tests/bench/bench_torch_pruning.py [--rounds 15] [--json FILE]

Events run on one core and are measured in its CPU time, which is the time on the clock of a machine that does nothing
else. The exit code tells whether every limit holds.
"""
from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "callbacks"))
from rich.console import Console
from rich.table import Table

from bench_torch_qat import mobilenet
from digits_torch import conv_net
from slimtrain.callbacks import SIMDOCPruner, SNIPLevelPruner, TaylorFOChannelPruner
from slimtrain.callbacks.onnx_export import export_float
from slimtrain.proto import ConvertOptions, convert, run_model
from zoo import ResNet, ShuffleNet, lived_in

BATCH, PIXELS = 8, 112
WARM_UP = 3
LIMITS = {"finding ratios (s)": 0.15, "a pruning event (s)": 0.1, "a step that keeps zeros / float step": 1.03,
          "1x4 at 0.7, 8-bit sparse / dense": 0.55}


def trained_once(model, x, classes):
    """Gradients of one batch."""
    F.cross_entropy(model.train()(x), torch.randint(classes, (len(x),))).backward()


def event_times(kind):
    """CPU seconds for finding ratios and for one pruning event on ResNet-18, medians of five."""
    torch.manual_seed(0)
    times = [], []
    model = ResNet(64, 1000)
    trained_once(model, torch.randn(2, 3, 64, 64), 1000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other would count as work
    for _ in range(5):
        pruner = kind(model, 0.5, sensitivity_steps=1)
        pruner.look()
        moments = [time.process_time()]
        pruner.found_ratios()
        moments.append(time.process_time())
        pruner.prune_if_due()
        pruner.apply()
        moments.append(time.process_time())
        for measured, begin, end in zip(times, moments, moments[1:]):
            measured.append(end - begin)
    torch.set_num_threads(threads)
    return [statistics.median(measured) for measured in times]


def step_ratio(rounds):
    """Time of a ResNet-18's step whose zeros are kept over that of the same step without it, a median.

    Both are timed in one run: between two runs of the same step there are differences of several percent.
    """
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH, 3, PIXELS, PIXELS), torch.randint(1000, (BATCH,))
    model = ResNet(64, 1000).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    pruner = SNIPLevelPruner(model, 0.5, sensitivity_steps=1)
    ratios = []
    for _ in range(WARM_UP + rounds):
        moments = [time.perf_counter()]
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        moments.append(time.perf_counter())
        pruner.do_pruning(None)
        moments.append(time.perf_counter())
        ratios.append((moments[2] - moments[0]) / (moments[1] - moments[0]))
    return statistics.median(ratios[WARM_UP:])


def converted(model, x, stem, options=None):
    """Bytes of the model's .mnn file, and what MNN computes."""
    onnx_model = export_float(model, (x,), {})
    with open(stem + ".onnx", "wb") as file:
        file.write(onnx_model.SerializeToString())
    size = convert(stem + ".onnx", stem + ".mnn", None, options or ConvertOptions()).bytes
    return size, torch.from_numpy(next(iter(run_model(stem + ".mnn", x.numpy()).values())).copy())


def shrunk(name, make, shape, folder):
    """One line of the table of shrunk networks at half of the weights."""
    torch.manual_seed(0)
    model, x = lived_in(make()), torch.randn(shape)
    pruner = TaylorFOChannelPruner(model, 0.5, sensitivity_steps=1, align_channels=4)
    model.train()(x).square().mean().backward()
    pruner.do_pruning(None)
    smaller = pruner.shrink().eval()
    with torch.no_grad():
        wanted, found = model.eval()(x), smaller(x)
    sizes = [converted(net, x, os.path.join(folder, name + suffix)) for net, suffix in ((model, "-a"), (smaller, "-b"))]
    counts = [sum(value.numel() for value in net.parameters()) for net in (model, smaller)]
    error = float((wanted - found).abs().max() / wanted.abs().max())
    in_mnn = float((sizes[1][1].reshape(wanted.shape) - wanted).abs().max() / wanted.abs().max())
    return {"network": name, "sparsity": pruner.sparsity, "parameters": counts[1] / counts[0],
            "bytes": sizes[1][0] / sizes[0][0], "error": error, "error in MNN": in_mnn,
            "removed bytes / removed parameters": (sizes[0][0] - sizes[1][0]) / (4 * (counts[0] - counts[1]))}


def sparse_blocks(folder):
    """Bytes with 1x4 blocks at 0.7 over those of the dense file, both with 8-bit symmetric weights."""
    torch.manual_seed(0)
    model, x = lived_in(conv_net()), torch.rand(4, 1, 8, 8)
    dense = converted(model, x, os.path.join(folder, "dense"), ConvertOptions(weight_bits=8))[0]
    trained_once(model, x, 10)
    pruner = SIMDOCPruner(model, 0.7, sensitivity_steps=1)
    pruner.do_pruning(None)
    sparse, found = converted(model, x, os.path.join(folder, "sparse"), ConvertOptions(weight_bits=8, sparse=True))
    with torch.no_grad():
        wanted = model.eval()(x)
    return sparse / dense, float((found.reshape(wanted.shape) - wanted).norm() / wanted.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="also write all figures to this file")
    options = parser.parse_args()
    logging.getLogger("slimtrain").setLevel(logging.ERROR)
    figures = {}
    for kind in (SNIPLevelPruner, SIMDOCPruner):
        found, event = event_times(kind)
        figures["finding ratios (s), " + kind.__name__] = found
        figures["a pruning event (s), " + kind.__name__] = event
    figures["a step that keeps zeros / float step"] = step_ratio(options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        figures["1x4 at 0.7, 8-bit sparse / dense"], error = sparse_blocks(folder)
        nets = (("ResNet-18", lambda: ResNet(64, 1000), (2, 3, 64, 64)), ("MobileNetV2", mobilenet, (2, 3, 64, 64)),
                ("concat and shuffle", ShuffleNet, (2, 3, 16, 16)))
        rows = [shrunk(name, make, shape, folder) for name, make, shape in nets]
    table, failed = Table("figure", "measured", "at most", ""), False
    for name, value in figures.items():
        limit = LIMITS[name.partition(", SN")[0].partition(", SI")[0]]
        failed |= value > limit
        table.add_row(name, "%.3f" % value, "%.2f" % limit, "ok" if value <= limit else "MISSED")
    shrinking = Table(*rows[0], "")
    for row in rows:
        good = row["error"] < 1e-5 and abs(row["removed bytes / removed parameters"] - 1) < 0.05
        failed |= not good
        shrinking.add_row(*(value if isinstance(value, str) else "%.3g" % value for value in row.values()),
                          "ok" if good else "MISSED")
    console = Console(width=140)
    console.print(table, shrinking)
    console.print("1x4 blocks: relative error of MNN's outputs with 8-bit weights %.4f" % error)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"figures": figures, "shrunk": rows}, file, indent=2)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
