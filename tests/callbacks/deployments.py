"""Train a network for a few steps, deploy it with MNN, and compare what it computes on inputs it has not seen."""
from __future__ import annotations

import copy
from typing import List, NamedTuple

import numpy as np
import torch
from torch import nn

from slimtrain.callbacks.exporting import Deployed, named_inputs
from slimtrain.core import LayerState, max_steps, sqnr_db
from slimtrain.proto import run_model
from zoo import Net, lived_in


class Comparison(NamedTuple):
    """A deployed network against its simulations, the worst of several inputs."""

    deployed: Deployed
    coverage: float          #: share of the model's weights that run in int8
    sqnr_db: float           #: MNN against the simulation of its integers
    float64_db: float        #: MNN against a float64 copy of the trained model
    steps: float             #: largest difference from the simulation, in steps of the output's grid


def trained(quantizer, net: Net, steps: int = 6, seed: int = 0) -> nn.Module:
    """Convert and train: weights, batch norm statistics and scales move away from where they began.

    The target is what the float model computed at first, so that results go on depending on the input.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher = copy.deepcopy(quantizer.model)
    model = quantizer.convert().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(steps):
        x = torch.randn(net.shape, generator=generator)
        optimizer.zero_grad()
        with torch.no_grad():
            target = teacher(x)
        nn.functional.mse_loss(model(x), target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def compare(make_quantizer, net: Net, stem, *, inputs: int = 3, steps: int = 6, seed: int = 0, **options) -> Comparison:
    """Train, deploy and compare one network.

    Args:
        make_quantizer: from a model to its quantizer.
        net: an entry of the zoo.
        stem: where the files go.
        inputs: how many inputs are compared.
        steps: of training.
        options: of ``deploy``.
    """
    torch.manual_seed(seed)
    quantizer = make_quantizer(lived_in(net.make(), seed))
    model = trained(quantizer, net, steps, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    examples: List[torch.Tensor] = [torch.randn(net.shape, generator=generator) for _ in range(inputs)]
    deployed = quantizer.deploy(stem, examples[0], **options)
    found, wanted, wide = [], [], []
    copied = copy.deepcopy(model).double().eval()
    for x in examples:
        (output,) = run_model(deployed.mnn, named_inputs("%s.onnx" % stem, (x,), {})).values()
        wanted.append(quantizer.simulate(x).double().numpy())
        with torch.no_grad():
            wide.append(copied(x.double()).numpy())
        found.append(output.reshape(wanted[-1].shape).astype(np.float64))
    assert np.mean(wanted[0] != wanted[-1]) > 0.2, "the network has collapsed: its result does not depend on its input"
    step = quantizer.deployed_layers()[-1].output_scale
    states = quantizer.coverage()
    return Comparison(deployed, 1.0 - states.share(LayerState.FLOAT), min(map(sqnr_db, wanted, found)),
                      min(map(sqnr_db, wide, found)), max(max_steps(a, b, step) for a, b in zip(wanted, found)))
