"""Low-rank decomposition inside a Lightning Trainer."""
from __future__ import annotations

import json
import logging
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from torch import nn

from slimtrain.callbacks.callback import compressions
from slimtrain.callbacks.low_rank import FactorizedLayer, LowRankDecomposition, log_report
from slimtrain.callbacks.low_rank_structure import apply_structure, structure_in, structure_of
from slimtrain.callbacks.plain_callback import PlainCallback
from slimtrain.callbacks.ranks import are_several
from slimtrain.core import ChosenSpectrum, RankRule, SlimtrainError, chosen_spectra, spectra_from_json, spectra_to_json

logger = logging.getLogger(__name__)


class LowRankDecompositionCallback(PlainCallback):
    """Decomposes the Trainer's model before training, so that the optimizer trains the factors.

    The weights decide on the ranks, so give those of a trained model: in the LightningModule itself, or with
    ``start_from``. Checkpoints hold the factors; ``trainer.fit(ckpt_path=...)``, ``test`` and so on give the model the
    structure of the checkpoint before its weights are loaded, and :func:`slimtrain.callbacks.load_decomposed` does
    without a Trainer.

    Args:
        skip_layers: names or patterns (``features.*``) of layers to leave.
        align_channels: ranks are multiples of it.
        tucker_minimal_ratio: Tucker-2 keeps at least this share of the channels.
        reserved_singular_value_ratio: share of the sum of the singular values that SVD keeps.
        rank_rule: another rule for all layers, of ``slimtrain.core``.
        separable: names or patterns of convolutions to write as k x 1 and 1 x k instead.
        refinements: rounds of orthogonal iteration for Tucker-2.
        start_from: a checkpoint, or a file with a ``state_dict``, of the dense LightningModule to decompose.
        module: dotted path of the submodule to decompose; "" for the whole model.
        export_to: path without suffix of what is written at the end of ``fit``; None for the model's name in the
            Trainer's log folder, "" for no export.
    """

    restructures = True

    def __init__(self, skip_layers: Optional[List[str]] = None, align_channels: int = 8,
                 tucker_minimal_ratio: float = 0.25, reserved_singular_value_ratio: float = 0.5, *,
                 rank_rule: Optional[RankRule] = None, separable: Optional[List[str]] = None, refinements: int = 2,
                 start_from: str = "", module: str = "", export_to: Optional[str] = None) -> None:
        super().__init__(module, export_to)
        LowRankDecomposition.check(align_channels, tucker_minimal_ratio, reserved_singular_value_ratio, refinements)
        self._arguments: Dict[str, Any] = dict(
            skip_layers=tuple(skip_layers or ()), align_channels=align_channels,
            tucker_minimal_ratio=tucker_minimal_ratio, reserved_singular_value_ratio=reserved_singular_value_ratio,
            rank_rule=rank_rule, separable=tuple(separable or ()), refinements=refinements)
        self.start_from = start_from
        self.report: Tuple[FactorizedLayer, ...] = ()  #: of the decomposition, where there was one
        self._started = False
        self._spectra: Dict[str, ChosenSpectrum] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.start_from and not self._started:
            pl_module.configure_model()
            pl_module.load_state_dict(_weights(self.start_from))
            self._started = True
        before = self._target
        if before is None and are_several():
            _take_weights_of_first_rank(pl_module, trainer.strategy.root_device)
        super().setup(trainer, pl_module, stage)
        if self._target is not before:
            pl_module.register_load_state_dict_pre_hook(self._take_structure)

    def attach(self, model: nn.Module) -> None:
        if structure_of(model):
            logger.info("the model is decomposed already, and stays as it is")
            return
        decomposition = LowRankDecomposition(model, **self._arguments)
        decomposition.apply()
        self.report = decomposition.report
        self._spectra = chosen_spectra(decomposition.spectra, decomposition.plans)
        log_report(self.report)

    def compression_state(self) -> Dict[str, Any]:
        structure = structure_of(self.deployed_model())
        return {"algorithm": "LowRankDecomposition", "structure": json.dumps(structure, sort_keys=True),
                "spectra": json.dumps(spectra_to_json(self._spectra))}

    def spectra(self) -> Dict[str, ChosenSpectrum]:
        """Those of the dense weights, before they were decomposed."""
        return dict(self._spectra)

    def load_compression_state(self, state: Mapping[str, Any]) -> None:
        here, saved = structure_of(self.deployed_model()), json.loads(state["structure"])
        if here != saved:
            raise SlimtrainError("the checkpoint's model was decomposed otherwise than the weights it holds: %s" % (
                ", ".join(sorted(name for name in {**here, **saved} if here.get(name) != saved.get(name)))))
        self._spectra = spectra_from_json(json.loads(state["spectra"]))

    def _take_structure(self, pl_module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Give the model the chains of the weights that are about to be loaded."""
        model = self.deployed_model()
        prefix = prefix + self._path + "." if self._path else prefix
        structure = structure_in(state_dict, model, prefix)
        if structure_of(model) and not structure and any(key.startswith(prefix) for key in state_dict):
            raise SlimtrainError("the weights to load are those of the dense model, and %s has decomposed it; to "
                                 "decompose these weights, pass their file as start_from" % type(self).__name__)
        if structure != structure_of(model):
            apply_structure(model, structure)
            self._spectra = {}  # they were those of other weights; the state of the checkpoint has its own
            for other in compressions(pl_module.trainer) if getattr(pl_module, "_trainer", None) is not None else ():
                if other is not self:
                    other.reattach(pl_module)


def _weights(path: str) -> Dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything from EOFError to RuntimeError for a damaged file
        raise SlimtrainError("start_from=%r cannot be read: %s" % (path, str(error).splitlines()[0])) from error
    return dict(content.get("state_dict", content))


def _take_weights_of_first_rank(model: nn.Module, device: torch.device) -> None:
    """DDP does so when it wraps the model, but ranks that decompose other weights would have other layers by then."""
    with torch.no_grad():
        for parameter in model.parameters():
            value = parameter.to(device)
            torch.distributed.broadcast(value, 0)
            parameter.copy_(value)
