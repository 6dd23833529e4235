"""Winograd-aware quantization as a Lightning callback."""
from __future__ import annotations

from typing import Any, Dict, List, Optional

from torch import nn

from slimtrain.callbacks.quantizer_callback import QuantizerCallback
from slimtrain.callbacks.waq_quantizer import WAQQuantizer
from slimtrain.core import Moment
from slimtrain.core.winograd_choice import check_sqnr


class WAQQuantizerCallback(QuantizerCallback):
    """Trains the Trainer's model in simulated int8 with Winograd's transforms; see :class:`WAQQuantizer`.

    Args:
        skip_quant_layers: names or patterns (``features.*``) of layers that stay float.
        bits: 2 to 8, for weights and activations.
        debug_info: log the scales as they start.
        retain_sparsity: weights that are zero when training starts stay zero.
        min_sqnr_db: how near the output of a transformed layer must be to that of plain int8 before training, in dB.
        weight_bits: instead of ``bits``.
        activation_bits: instead of ``bits``.
        unsigned_activations: below 8 bits, give activations that are never negative the range 0..2^bits - 1.
        scale_lr_ratio: learning rate of the scales over that of their parameter group.
        module: dotted path of the submodule to compress; "" for the whole model.
        begin: until this moment the model is trained in float, then its scales start: an optimizer step (int), a part
            of the training (float in [0, 1]) or a text like "3 epochs".
        end: from this moment on scales stay as they are, while weights go on learning; 1.0 for never.
        calibration_batches: training batches that set the start of the activation scales.
        export_to: path without suffix of what is written at the end of ``fit``; None for the model's name in the
            Trainer's log folder, "" for no export.
        export_checkpoints: also export beside every checkpoint.
    """

    def __init__(self, skip_quant_layers: Optional[List[str]] = None, bits: int = 8, debug_info: bool = False,
                 retain_sparsity: bool = False, *, min_sqnr_db: float = 25.0, weight_bits: Optional[int] = None,
                 activation_bits: Optional[int] = None, unsigned_activations: bool = True,
                 scale_lr_ratio: float = 1.0, begin: Moment = 0.0, end: Moment = 1.0, module: str = "",
                 calibration_batches: int = 1, export_to: Optional[str] = None,
                 export_checkpoints: bool = False) -> None:
        super().__init__(module, calibration_batches, export_to, export_checkpoints, begin, end)
        WAQQuantizer.check(bits, weight_bits, activation_bits, "online", scale_lr_ratio)
        check_sqnr(min_sqnr_db)
        self._arguments: Dict[str, Any] = {
            "skip_quant_layers": tuple(skip_quant_layers or ()), "bits": bits, "debug_info": debug_info,
            "retain_sparsity": retain_sparsity, "min_sqnr_db": min_sqnr_db, "weight_bits": weight_bits,
            "activation_bits": activation_bits, "unsigned_activations": unsigned_activations,
            "scale_lr_ratio": scale_lr_ratio}

    def make_quantizer(self, model: nn.Module) -> WAQQuantizer:
        return WAQQuantizer(model, **self._arguments)
