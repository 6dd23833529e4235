"""Pruning inside a Lightning Trainer."""
from __future__ import annotations

import logging
import math
from typing import Any, Dict, List, Mapping, Optional

import torch
from torch import nn

from slimtrain.callbacks.callback import compressions, example_from_batch
from slimtrain.callbacks.exporting import Exported
from slimtrain.callbacks.exporting_callback import ExportingCallback
from slimtrain.callbacks.moments import epoch_steps, training_steps
from slimtrain.callbacks.pruner import Pruner
from slimtrain.callbacks.pruning_export import PrunedFile, deploy_pruned, export_pruned
from slimtrain.callbacks.ranks import is_first
from slimtrain.core import Moment, PruningSchedule, check_window, schedule_between, step_of
from slimtrain.proto import ConvertOptions
from slimtrain.proto.conversion_report import LayerNote

logger = logging.getLogger(__name__)


class PrunerCallback(ExportingCallback):
    """Base of the pruner callbacks: reads gradients before an optimizer step, prunes and keeps zeros after it.

    Steps are optimizer steps. Gradients are read when they are accumulated, averaged over ranks and unscaled, so every
    rank decides the same.

    Args:
        begin, end: the first pruning event, and the moment by which the last is over: optimizer steps (int), parts of
            the training (float in [0, 1]) or a text like "3 epochs".
        prune_finetune_iterations: optimizer steps without pruning between two events; None spreads the events evenly
            from ``begin`` to ``end``.
        result_file: where the ratios found are written, as ``config_file`` takes them; "" for no file.
        module: dotted path of the submodule to prune; "" for the whole model.
        export_to: path without suffix of what is written at the end of ``fit``; None for the LightningModule's name
            in the Trainer's log folder, "" for no export.
        weight_bits: of the ``.mnn`` written at the end of ``fit``; 0 for floats.
        arguments: of the object.
    """

    def __init__(self, arguments: Dict[str, Any], begin: Moment, end: Moment, prune_finetune_iterations: Optional[int],
                 result_file: str, module: str, export_to: Optional[str], weight_bits: int) -> None:
        super().__init__(module, export_to)
        check_window(begin, end)
        self._arguments = dict(arguments, prune_finetune_iterations=prune_finetune_iterations or 0)
        self._begin, self._end, self._finetune = begin, end, prune_finetune_iterations
        self.result_file = result_file
        self.weight_bits = weight_bits
        self.deployed: Optional[PrunedFile] = None
        self._pruner: Optional[Pruner] = None
        self._scheduled = False
        self._looked = False
        self._sparsity = 0.0
        self._handles: List[Any] = []

    def make_pruner(self, model: nn.Module) -> Pruner:
        """The object that this callback drives."""
        raise NotImplementedError

    @property
    def pruner(self) -> Pruner:
        """The pruner of the model.

        Raises:
            RuntimeError: the callback has not been set up yet.
        """
        if self._pruner is None:
            raise RuntimeError("the callback has no model yet: run trainer.fit, validate or test first")
        return self._pruner

    # -- state

    def attach(self, model: nn.Module) -> None:
        self._pruner = self.make_pruner(model)
        self._scheduled = False

    def compression_state(self) -> Dict[str, Any]:
        return {"scheduled": self._scheduled, "pruner": self.pruner.state_dict()}

    def load_compression_state(self, state: Mapping[str, Any]) -> None:
        self.pruner.load_state_dict(state["pruner"])
        self._scheduled = bool(state["scheduled"])

    # -- steps

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._scheduled:
            self.pruner.schedule = self._schedule(training_steps(trainer), epoch_steps(trainer))
            self._scheduled = True
        self._sparsity = self.pruner.sparsity
        # the optimizer's own hook: right also under manual optimization, and silent when a scaler skips the step
        self._unhook()
        self._handles = [optimizer.register_step_post_hook(self._stepped) for optimizer in trainer.optimizers]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._example is None:
            self.remember(example_from_batch(self.pruner.model, batch))
            self.pruner.see_example(self._example)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        mine = {id(weight) for weight in self.pruner.weights().values()}
        if any(id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"]):
            self.pruner.look()
            self._looked = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.log("sparsity", self._sparsity, prog_bar=True, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._unhook()
        if not self.pruner.finished:
            logger.warning("training ended before pruning did: the sparsity is %.4f, asked for was %.4f",
                           self.pruner.sparsity, self.pruner.schedule.sparsity)
        for row in self.pruner.report():
            logger.info("%s: %d weights, %.4f pruned %s", row.name, row.parameters, row.ratio, row.reason)
        logger.info("pruned %.4f of the weights (asked for %.4f)", self.pruner.sparsity, self.pruner.schedule.sparsity)
        if self.exports(trainer) and self.write(trainer, pl_module):
            assert self.deployed is not None
            logger.info("wrote %s: %d bytes", self.deployed.mnn, self.deployed.bytes)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        # a quantizer's files are written at the end of training; what was pruned is added to them
        if self.export_to != "" and trainer.is_global_zero:
            for other in compressions(trainer):
                above = isinstance(other, ExportingCallback) and other.export_rank > self.export_rank
                if above and other.exports(trainer):
                    params = other.stem(trainer, pl_module) + ".compress_params.bin"
                    self.pruner.save_compress_params(params, append=True)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._unhook()

    # -- files

    export_rank = 1

    def example_model(self) -> nn.Module:
        return self.pruner.model

    def export(self, stem: str, example_input: Any = None, **options: Any) -> Exported:
        """Write ``stem.onnx`` and ``stem.compress_params.bin``; see :func:`slimtrain.callbacks.export_pruned`.

        Args:
            stem: path without suffix.
            example_input: the model's ``example_input_array`` or first training batch when None.
        """
        return export_pruned(self.pruner, stem, self.example(example_input), **options)

    def deploy(self, stem: str, example_input: Any = None, **options: Any) -> PrunedFile:
        """Export and convert with MNN; see :func:`slimtrain.callbacks.deploy_pruned`."""
        return deploy_pruned(self.pruner, stem, self.example(example_input),
                             **{"weight_bits": self.weight_bits, **options})

    def convert_options(self) -> ConvertOptions:
        return ConvertOptions(weight_bits=self.weight_bits, sparse=True)

    # -- what a report says

    def progress(self) -> Dict[str, float]:
        return {"sparsity": self._sparsity}

    def layer_notes(self) -> Dict[str, LayerNote]:
        return {row.name: LayerNote(row.ratio, row.reason or "pruned %.1f %%" % (100 * row.ratio))
                for row in self.pruner.report()}

    # -- inside

    def _schedule(self, total_steps: float, epoch_steps: Optional[float]) -> PruningSchedule:
        if math.isinf(total_steps) and (isinstance(self._begin, float) or isinstance(self._end, float)):
            raise ValueError("the Trainer does not know how long it will train (max_epochs=-1), so begin=%r and end=%r "
                             "must be given in optimizer steps or epochs" % (self._begin, self._end))
        total = 0 if math.isinf(total_steps) else int(total_steps)
        asked = self.pruner.schedule
        begin = max(step_of(self._begin, total, epoch_steps), asked.begin_step)
        if self._finetune is not None:
            return PruningSchedule(asked.sparsity, asked.events, asked.interval, begin, asked.ramp)
        end = step_of(self._end, total, epoch_steps)
        return schedule_between(asked.sparsity, asked.events, begin, end, asked.ramp)

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._looked:
            self._looked = False
            if self.pruner.prune_if_due():
                self.pruner.write_ratios(self.result_file if self.result_file and is_first() else None)
                self._sparsity = self.pruner.sparsity
        self.pruner.apply()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
