"""What every compression callback has in common: when it acts, and how its state travels.

Lightning owns the module, the optimizer and the checkpoint. A compression callback therefore makes everything with
parameters in ``setup`` (before a checkpoint is restored, DDP wraps and the optimizer is made), keeps its state beside
the model's ``state_dict`` and never inside it, and leaves the user's module object the one it was.
"""
from __future__ import annotations

import functools
import logging
import os
from typing import Any, Dict, List, Mapping, Optional

import torch
from torch import nn

from slimtrain.callbacks.checkpoints import read_sidecar, remove_sidecar, write_sidecar
from slimtrain.callbacks.lightning_bases import Callback
from slimtrain.callbacks.model_view import is_compiled, submodule
from slimtrain.callbacks.weight_decay import admit
from slimtrain.core import ChosenSpectrum
from slimtrain.proto import ConvertOptions
from slimtrain.proto.conversion_report import LayerNote

logger = logging.getLogger(__name__)

_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
_AVERAGING = ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging")


class CompressionCallback(Callback):
    """Base of the compression callbacks.

    An algorithm implements :meth:`attach`, :meth:`compression_state` and :meth:`load_compression_state`.

    Args:
        module: dotted path of the submodule to compress; "" for the whole LightningModule, or, where that has no
            ``forward`` of its own, for the only submodule that has weights.
    """

    #: whether attaching exchanges modules or parameters, so that every other compression comes after it
    restructures = False

    def __init__(self, module: str = "") -> None:
        super().__init__()
        self.module = module
        self._target: Optional[nn.Module] = None
        self._path = ""  #: dotted path of the target
        self._plain_checkpoint: Dict[str, Any] = {}  #: one without our state, while it is being loaded

    # -- what an algorithm does

    def attach(self, model: nn.Module) -> None:
        """Prepare a model for training; called once for each model."""
        raise NotImplementedError

    def compression_state(self) -> Dict[str, Any]:
        """State as tensors, numbers, strings and dicts of them."""
        raise NotImplementedError

    def load_compression_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`compression_state` gave, into the attached model."""
        raise NotImplementedError

    def new_parameters(self) -> List[nn.Parameter]:
        """The parameters of the attached model that the plain float model does not have."""
        return []

    def restart(self) -> None:
        """Forget what was learned: the weights that were just loaded are those of a model without this compression."""

    def checkpoint_saved(self, trainer: Any, path: str) -> None:
        """A checkpoint was written to ``path``; called on every rank."""

    # -- what a report says

    def progress(self) -> Dict[str, float]:
        """Numbers that change in training, by name."""
        return {}

    def layer_notes(self) -> Dict[str, LayerNote]:
        """What was done to each layer, by its name."""
        return {}

    def spectra(self) -> Dict[str, ChosenSpectrum]:
        """Singular values of each layer, and how many were kept."""
        return {}

    def convert_options(self) -> ConvertOptions:
        """What the model was converted with at the end of ``fit``."""
        return ConvertOptions()

    # -- when

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Attach to the model, once, whatever the stage: a checkpoint may be restored in any of them."""
        _refuse_unsupported(trainer, pl_module, self)
        pl_module.configure_model()  # documented to be idempotent; layers made there do not exist before
        for other in compressions(trainer):
            if other.restructures and not self.restructures:  # the order in the Trainer's list does not matter
                other.setup(trainer, pl_module, stage)
        path = find_target(pl_module, self.module)
        target = submodule(pl_module, path)
        _announce_checkpoints(trainer)
        if target is not self._target:
            self.attach(target)
            self._target, self._path = target, path

    def reattach(self, pl_module: Any) -> None:
        """Layers of the model were exchanged for others, which are those of a checkpoint: attach to these."""
        if self._target is not None:
            self._target = submodule(pl_module, self._path)
            self.attach(self._target)

    @property
    def state_key(self) -> str:
        """Two callbacks of one class on two submodules have two states."""
        return str(self._generate_state_key(module=self.module))

    def state_dict(self) -> Dict[str, Any]:
        """The state that goes into a checkpoint; loadable with ``weights_only=True``."""
        return {**self.compression_state(), "module": self._path} if self._target is not None else {}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Restore the state of a checkpoint; Lightning calls it after :meth:`setup`."""
        self.load_compression_state(state_dict)

    # -- a checkpoint of the plain float model

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Dict[str, Any]) -> None:
        if self.state_key not in checkpoint["callbacks"]:
            self.restart()
            self._plain_checkpoint = checkpoint

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Between the making of the optimizers and the loading of their states."""
        for optimizer, saved in zip(trainer.optimizers, self._plain_checkpoint.get("optimizer_states", ())):
            admit(self.new_parameters(), optimizer, saved)
        self._plain_checkpoint = {}

    # -- a checkpoint that holds weights only can be evaluated, and Lightning asks callbacks nothing when it is loaded

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.training and not trainer.sanity_checking:
            self._load_sidecar(trainer)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._load_sidecar(trainer)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._load_sidecar(trainer)

    def _load_sidecar(self, trainer: Any) -> None:
        state = read_sidecar(trainer.ckpt_path, self.state_key) if trainer.ckpt_path else None
        if state is not None:
            self.load_compression_state(state)


def compressions(trainer: Any) -> List[CompressionCallback]:
    """The compression callbacks of a Trainer, in its order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, CompressionCallback)]


def find_target(pl_module: nn.Module, path: str) -> str:
    """Dotted path of the module to compress.

    Raises:
        ValueError: no such submodule, or none was named and the LightningModule has no forward.
    """
    if path or has_forward(pl_module):
        return path
    weighted = [name for name, child in pl_module.named_children() if next(child.parameters(), None) is not None]
    if len(weighted) != 1:
        raise ValueError("%s has no forward, so it cannot be told which module will be deployed: define forward, or "
                         "name the module (module=%s)" % (type(pl_module).__name__,
                                                          " or ".join(map(repr, weighted)) or "..."))
    return weighted[0]


def has_forward(module: nn.Module) -> bool:
    """Whether the user's own classes define a forward."""
    definer = next(base for base in type(module).__mro__ if "forward" in vars(base))
    return not definer.__module__.startswith(("pytorch_lightning.", "lightning.", "torch.nn.modules.module"))


def _refuse_unsupported(trainer: Any, pl_module: Any, callback: Any) -> None:
    strategy = type(trainer.strategy).__name__
    if strategy in _SHARDED:
        raise RuntimeError("%s does not work with %s, which splits parameters after callbacks are set up; use a "
                           "single device or DDP" % (type(callback).__name__, strategy))
    compiled = [name for name, module in pl_module.named_modules() if is_compiled(module)]
    if compiled or getattr(pl_module, "_compiler_ctx", None) is not None:
        raise RuntimeError("%s cannot follow the tensors of a model that went through torch.compile; pass the "
                           "uncompiled model to the Trainer" % type(callback).__name__)
    for other in trainer.callbacks:
        if other is callback:
            return
        if any(base.__name__ in _AVERAGING for base in type(other).__mro__):
            raise RuntimeError("%s copies the model when it is set up and would miss the scales: put %s before it in "
                               "the Trainer's callbacks" % (type(other).__name__, type(callback).__name__))


def _announce_checkpoints(trainer: Any) -> None:
    """Tell the compression callbacks of each checkpoint that the Trainer writes or removes.

    ``ModelCheckpoint(save_weights_only=True)`` asks callbacks for nothing, and no hook names the file that was
    written: the Trainer's own ``save_checkpoint`` is the one place that all checkpoints pass, and its strategy's
    ``remove_checkpoint`` the one where they go.
    """
    save, remove = trainer.save_checkpoint, trainer.strategy.remove_checkpoint
    if not hasattr(save, "__wrapped__"):
        @functools.wraps(save)
        def announced(filepath: Any, weights_only: Optional[bool] = None,
                      storage_options: Optional[Any] = None) -> None:
            save(filepath, weights_only, storage_options)
            _checkpoint_saved(trainer, os.fspath(filepath), bool(weights_only))

        trainer.save_checkpoint = announced
    if not hasattr(remove, "__wrapped__"):
        @functools.wraps(remove)
        def removed(filepath: Any) -> None:
            remove(filepath)
            if trainer.is_global_zero:
                remove_sidecar(filepath)

        trainer.strategy.remove_checkpoint = removed


def _checkpoint_saved(trainer: Any, path: str, weights_only: bool) -> None:
    mine = compressions(trainer)
    if weights_only and trainer.is_global_zero:
        if "://" in path:
            logger.warning("%s holds weights only and lies on a remote file system, where no file can be put beside "
                           "it: it cannot be exported. Save full checkpoints there", path)
        else:
            states = {callback.state_key: callback.state_dict() for callback in mine}
            write_sidecar(path, states, trainer.global_step)
    for callback in mine:
        callback.checkpoint_saved(trainer, path)


def example_from_batch(model: nn.Module, batch: Any) -> Any:
    """The model's input in a training batch: the batch itself, its first item, or the items that forward names.

    A model with an ``example_input_array`` that is a tuple or dict tells how many items, or which.
    """
    array = getattr(model, "example_input_array", None)
    if isinstance(batch, Mapping):
        return _named_items(model, batch, array)
    if isinstance(batch, (tuple, list)):
        return tuple(batch[:len(array)]) if isinstance(array, tuple) else batch[0]
    return batch


def _named_items(model: nn.Module, batch: Mapping[str, Any], array: Any) -> Any:
    code = getattr(type(model).forward, "__code__", None)
    names = array if isinstance(array, Mapping) else code.co_varnames[:code.co_argcount] if code else ()
    items = {name: batch[name] for name in names if name in batch}
    if items:
        return items
    return next(value for value in batch.values() if isinstance(value, torch.Tensor))
