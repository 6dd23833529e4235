"""Every code block of README and docs runs: PyTorch's, commands and pipelines here, TensorFlow's in tests/hooks."""
from __future__ import annotations

import shlex

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from doc_blocks import PAGES, blocks, code_of, pages_with
from slimtrain.core import load_pipeline
from slimtrain.proto.cli import cli

#: first words of command lines that are not run here, and why
ELSEWHERE = {"git": "needs the network", "make": "is what runs these tests", "pip": "needs the network",
             "python": "examples have tests of their own", "$": "shows what a command prints"}


class Net(nn.Module):
    """A small classifier of 8x8 images."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 32, 3, padding=1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.body(F.relu(self.stem(x))))
        return self.fc(x.mean([2, 3]))


class Model(pl.LightningModule):
    """What a user has."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def names():
    """What the pages speak of as given."""
    torch.manual_seed(0)
    x = torch.rand(16, 1, 8, 8)
    data = TensorDataset(x, torch.randint(10, (16,)))
    return {"Net": Net, "Model": Model, "model": Model(), "loader": DataLoader(data, 8), "x": x, "__name__": "page"}


@pytest.mark.parametrize("page", pages_with("slimtrain.callbacks"))
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(page, "slimtrain.callbacks"), page, "exec"), names())


def test_commands_run(tmp_path, monkeypatch):
    """Those of all pages, on the files that the page about Lightning leaves."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of("docs/lightning.md", "slimtrain.callbacks"), "page", "exec"), names())
    ran = 0
    for block in blocks("bash"):
        for line in block.text.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] not in ELSEWHERE:
                assert words[0] == "slimtrain", "%s: nothing runs %r" % (block.page, line)
                result = CliRunner().invoke(cli, words[1:], catch_exceptions=False)
                assert result.exit_code == 0, "%s: %s\n%s" % (block.page, line, result.output)
                ran += 1
    assert ran >= 4


def test_pipelines_load():
    files = blocks("yaml")
    assert files
    for block in files:
        load_pipeline(block.text)


def test_every_python_block_belongs_to_a_framework():
    everything = sum(len(code_of(page, word).split()) for word in ("slimtrain.callbacks", "slimtrain.hooks")
                     for page in pages_with(word))
    assert everything == sum(len(block.text.split()) for block in blocks("python"))


def test_links_lead_somewhere():
    import re
    for page in PAGES:
        if page.exists():
            for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
                assert "://" in link or (page.parent / link).exists(), "%s: %s" % (page.name, link)
