"""The first training batches, ahead of training and without a trace in it."""
from __future__ import annotations

import contextlib
import copy
import itertools
from typing import Any, Iterator, List

import torch
from torch.utils.data import DataLoader

from slimtrain.callbacks.lightning_bases import CombinedLoader


def first_batches(trainer: Any, pl_module: Any, count: int) -> List[Any]:
    """The batches that training will begin with, as a step receives them.

    The loaders are read through copies: one with persistent workers has only one iterator, and one that can resume
    remembers where it was, so batches taken here would be missing in training. The random state stays as it is.

    Args:
        trainer: a Trainer that is about to train.
        pl_module: its LightningModule.
        count: how many; fewer come when there are no more.
    """
    loader = CombinedLoader(trainer.train_dataloader, "max_size_cycle")
    with _random_state_kept(loader.flattened):
        loader.flattened = [_twin(each) for each in loader.flattened]
        batches = [batch for batch, _, _ in itertools.islice(iter(loader), count)]
        return [_received(trainer, pl_module, batch) for batch in batches]


def _received(trainer: Any, pl_module: Any, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)  # has no public name; calls the user's hook
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _twin(loader: Any) -> Any:
    try:
        twin = copy.copy(loader)  # a loader of the user's own may remember how far it was read
    except TypeError:
        return loader  # a generator: there is no second
    if isinstance(twin, DataLoader):
        twin._iterator = None  # where it keeps its persistent workers
        twin.num_workers, twin.timeout = 0, 0
    return twin


@contextlib.contextmanager
def _random_state_kept(loaders: List[Any]) -> Iterator[None]:
    holders = [holder for loader in loaders for holder in (loader, getattr(loader, "sampler", None))]
    generators = [generator for generator in (getattr(holder, "generator", None) for holder in holders)
                  if isinstance(generator, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for generator, state in zip(generators, states):
                generator.set_state(state)
