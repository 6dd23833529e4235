"""Low-bit storage of weights as a Lightning callback."""
from __future__ import annotations

from typing import Any, Collection, Dict, Mapping, Optional

from torch import nn

from slimtrain.callbacks.deploying_callback import DeployingCallback
from slimtrain.callbacks.weight_quantizer import WeightQuantizer
from slimtrain.core import Moment


class WeightQuantizerCallback(DeployingCallback):
    """Trains the Trainer's model with its weights as MNN stores them, and writes the model with exactly these integers.

    ``trainer.validate`` or ``test`` with this callback and no training shows what storing the weights costs. At the end
    of ``fit`` there are a float ONNX file, its ``compress_params.bin`` and, where MNN is installed, a ``.mnn``.

    Args:
        bits: 2 to 8.
        debug_info: log how each layer is stored.
        mode: "symmetric" or "asymmetric".
        layer_bits: bits of layers by name or pattern, instead of ``bits``; later patterns win.
        skip_quant_layers: names or patterns of layers that stay float.
        block_size: input channels that share a scale, a multiple of 16; 0 for one scale per output channel.
        begin: until this moment the model is trained in float: an optimizer step (int), a part of the training (float
            in [0, 1]) or a text like "3 epochs".
        module: dotted path of the submodule to compress; "" for the whole model.
        export_to: path without suffix of what is written at the end of ``fit``; None for the model's name in the
            Trainer's log folder, "" for no export.
        export_checkpoints: also export beside every checkpoint.

    Raises:
        ValueError: bits outside 2..8, an unknown mode, a bad block size.
    """

    def __init__(self, bits: int = 8, debug_info: bool = False, mode: str = "symmetric", *,
                 layer_bits: Optional[Mapping[str, int]] = None, skip_quant_layers: Collection[str] = (),
                 block_size: int = 0, begin: Moment = 0.0, module: str = "", export_to: Optional[str] = None,
                 export_checkpoints: bool = False) -> None:
        super().__init__(module, export_to, export_checkpoints, begin)
        WeightQuantizer.check(bits, mode, layer_bits, block_size)
        self._arguments: Dict[str, Any] = {
            "bits": bits, "debug_info": debug_info, "mode": mode, "layer_bits": dict(layer_bits or {}),
            "skip_quant_layers": tuple(skip_quant_layers), "block_size": block_size}

    def make_quantizer(self, model: nn.Module) -> WeightQuantizer:
        return WeightQuantizer(model, **self._arguments)
