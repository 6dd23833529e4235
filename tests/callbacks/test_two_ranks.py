"""Quantized training on two processes that see different data: one set of scales."""
from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
KINDS = ["LSQQuantizerCallback", "EMAQuantizerCallback", "OAQQuantizerCallback"]

RANKS = """
import os, sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
import slimtrain.callbacks as callbacks
from pytorch_lightning.callbacks import Callback
from nets import Lit, loader, trainer

class Watch(Callback):
    def __init__(self, quantizing):
        self.quantizing, self.steps, self.batches = quantizing, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch[0].clone())
        self.look(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.look(pl_module)

    def look(self, pl_module):
        values = [*self.quantizing.quantizer.scale_parameters(), *pl_module.parameters()]
        self.steps.append([value.detach().clone() for value in values])

for kind in sys.argv[3:]:
    options = {"begin": 2} if kind in sys.argv[3:5] else {}  # two of them train in float before
    quantizing = getattr(callbacks, kind)(bits=4, export_to="", module="net", **options)
    watch = Watch(quantizing)
    torch.manual_seed(7)
    session = trainer(sys.argv[1], quantizing, watch, max_epochs=2, strategy="ddp", devices=2)
    session.fit(Lit(8), loader())
    torch.save({"steps": watch.steps, "batches": watch.batches, "plan": quantizing.quantizer.state_dict()["plan"]},
               os.path.join(sys.argv[1], "%s.%d.pt" % (kind, session.global_rank)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    (path / "ranks.py").write_text(RANKS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", str(path / "ranks.py"), str(path), HERE, *KINDS],
                          env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_scales_and_weights_are_equal_on_both_ranks_at_every_step(kind, folder):
    first, second = (torch.load(folder / ("%s.%d.pt" % (kind, rank)), weights_only=True) for rank in (0, 1))
    assert not any(torch.equal(a, b) for a, b in zip(first["batches"], second["batches"]))
    assert first["plan"] == second["plan"]
    assert len(first["steps"]) == len(second["steps"]) == 8
    for step, (mine, others) in enumerate(zip(first["steps"], second["steps"])):
        assert all(torch.equal(a, b) for a, b in zip(mine, others)), step
    scales = [torch.cat([value.flatten() for value in step[:8]]) for step in first["steps"]]
    assert not torch.equal(scales[0], scales[-1])
