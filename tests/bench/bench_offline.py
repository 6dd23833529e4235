"""Time of offline calibration over that of the plain forward passes it observes, and memory over the batches seen.

    python tests/bench/bench_offline.py [--images 640] [--rounds 2] [--threads 2] [--json FILE]

MobileNetV2 at full width on 112x112 pixels in batches of 32, in PyTorch (with the choice of all scales, whatever the
method) and as an ONNX file in onnxruntime. Plain passes and calibration take turns; the figures are ratios of medians.
"""
import argparse
import json
import statistics
import sys
import time
import tracemalloc

import numpy as np
import torch

from bench_torch_qat import mobilenet
from slimtrain.callbacks import OfflineQuantizer
from slimtrain.callbacks.onnx_export import export_float
from slimtrain.core import ActivationMethod, Observation, observe
from slimtrain.proto.onnx_check import open_session
from slimtrain.proto.onnx_offline import OfflineSettings, quantize_onnx

BATCH, PIXELS, LIMIT = 32, 112, 1.5
METHODS = ("max_abs", "kl", "mse")


def ratio(plain, other, rounds):
    """Median time of the other over that of the plain, taking turns."""
    times = ([], [])
    for _ in range(rounds):
        for part, function in zip(times, (plain, other)):
            start = time.perf_counter()
            function()
            part.append(time.perf_counter() - start)
    return statistics.median(times[1]) / statistics.median(times[0])


def torch_ratios(model, batches, rounds):
    """Calibration by each method over forward passes in evaluation mode."""
    def plain():
        with torch.no_grad():
            for batch in batches:
                model(batch)

    results = {}
    for method in METHODS:
        quantizer = OfflineQuantizer(model, method=method)

        def calibrate(quantizer=quantizer):
            quantizer.calibrate(batches)
            quantizer.strip_qat_ops()

        results["PyTorch, " + method] = ratio(plain, calibrate, rounds)
    return results


def onnx_ratio(model, batches, rounds):
    """``quantize_onnx``, rewriting and weights included, over runs of the optimized session."""
    exported = export_float(model, (batches[0][:2],), {}, dynamo=False)
    for value in (exported.graph.input[0], exported.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    session, name = open_session(exported.SerializeToString()), exported.graph.input[0].name
    data = [{name: batch.numpy()} for batch in batches]

    def plain():
        for batch in data:
            session.run(None, batch)

    return ratio(plain, lambda: quantize_onnx(exported, data, OfflineSettings(ActivationMethod.KL)), rounds)


def memory_ratio():
    """Peak of Python's memory while 10,000 batches are observed over that of 100."""
    def peak(count):
        generator = np.random.RandomState(0)
        tracemalloc.start()
        seen = Observation()
        for index in range(count):
            seen = observe(seen, generator.standard_normal(4096).astype(np.float32) * (30 if index == 50 else 1))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    return peak(10000) / peak(100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = mobilenet().eval()
    batches = list(torch.randn(options.images, 3, PIXELS, PIXELS).split(BATCH))
    results = torch_ratios(model, batches, options.rounds)
    results["memory, 10000 batches over 100"] = memory_ratio()
    results["ONNX, kl (no limit)"] = onnx_ratio(model, batches, options.rounds)
    for name, value in results.items():
        print(f"{name:32} {value:.2f}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file)
    limits = {name: value for name, value in results.items() if "no limit" not in name}
    sys.exit(int(any(value > LIMIT for value in limits.values())))


if __name__ == "__main__":
    main()
