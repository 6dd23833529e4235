"""Train a digits classifier in Lightning, compressed as one flag says, down to MNN.

    python examples/cli_digits.py --compress examples/compress.yaml
    python examples/cli_digits.py --compress "prune:simd_oc,sparsity=0.5;quantize:lsq,bits=4"

Its twin for TensorFlow is ``cli_digits_session.py``, which takes the same flag.
"""
import argparse
import json
import os

import pytorch_lightning as pl
import torch
from digits_lightning import SEED, Digits, accuracy, load_images, run_mnn, train
from torch.utils.data import DataLoader, TensorDataset

from slimtrain.callbacks import LOPCallback, from_config
from slimtrain.core import add_compress_flag


def main():
    """Train in float, train on as the flag says, run the result in MNN."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_compress_flag(parser)
    parser.add_argument("--out", default=os.path.join("out", "cli"))
    parser.add_argument("--epochs", type=int, default=20, help="of training in float")
    parser.add_argument("--compress-epochs", type=int, default=10, help="of training with compression")
    options = parser.parse_args()
    pl.seed_everything(SEED, verbose=False)
    images, labels, test_images, test_labels = load_images()
    data = DataLoader(TensorDataset(images, labels), 64, shuffle=True, drop_last=True)

    model = Digits(len(data) * options.epochs, rate=3e-3)
    train(model, data, options.epochs)
    with torch.no_grad():
        report = {"accuracy": {"float": accuracy(model.eval()(test_images), test_labels)}}
    if options.compress:
        os.makedirs(options.out, exist_ok=True)
        for part in options.compress.runs:  # what is over-parameterized has a run of its own, and is merged after it
            model.steps, model.rate = len(data) * options.compress_epochs, 1e-3
            callbacks = from_config(part, export_to=os.path.join(options.out, "model"))
            train(model, data, options.compress_epochs, *callbacks)
            if isinstance(callbacks[0], LOPCallback):
                callbacks[0].merge()
        deployed = next(each.deployed for each in callbacks if getattr(each, "deployed", None))
        _, measured = run_mnn(deployed.mnn, test_images, test_labels)
        report["accuracy"]["mnn"] = measured["accuracy"]
        report.update(bytes=measured["bytes"], sqnr_db=min(deployed.sqnr_db, 300.0),
                      coverage=callbacks[-1].report.coverage)
        with open(os.path.join(options.out, "report.json"), "w") as file:
            json.dump(report, file, indent=2)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
