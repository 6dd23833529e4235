"""Low-bit storage of weights, trained or not: computed in float on the device, a quarter to a sixteenth of the size."""
from __future__ import annotations

import logging
import os
from typing import Any, Collection, Dict, Mapping, Optional, Set, Type, TypeVar, Union

import onnx
from torch import nn

from slimtrain.callbacks.batches import arguments
from slimtrain.callbacks.checkpoints import read_saved
from slimtrain.callbacks.exporting import Deployed, Exported, deploy, named_inputs
from slimtrain.callbacks.layers import choose_layers, why_float
from slimtrain.callbacks.model_view import run_double, submodule
from slimtrain.callbacks.onnx_export import export_float
from slimtrain.callbacks.tracked_model import TrackedModel
from slimtrain.callbacks.weight_export import StoredLayer, write_stored
from slimtrain.callbacks.weight_simulation import Storage, WeightSimulation
from slimtrain.core import (
    LayerState,
    StoredWeight,
    WeightMode,
    has_small_groups,
    largest_level,
    replace_all,
    select,
    stored_weight,
    usable_block,
)
from slimtrain.proto import params_from_json, read_params, write_params
from slimtrain.proto.onnx_files import params_bytes

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]
Self = TypeVar("Self", bound="WeightQuantizer")


class WeightQuantizer(TrackedModel):
    """Trains a model with its weights on the grid that MNN stores them on, or shows what storing does without training.

    The grid is the one that MNN's converter computes from the weights, so the file holds exactly the integers that were
    trained. Activations stay float. The model object, its parameters and its ``state_dict()`` stay what they are.

    Args:
        model: a float model, best a trained one.
        bits: 2 to 8.
        debug_info: log how each layer is stored.
        mode: "symmetric", or "asymmetric" for a minimum and a scale of each channel (zero is then not on the grid: not
            for pruned models).
        layer_bits: bits of layers by name or pattern (``{"features.*": 4, "head": 8}``), instead of ``bits``; later
            patterns win.
        skip_quant_layers: names or patterns of layers that stay float.
        block_size: input channels that share a scale, a multiple of 16; 0 for one scale per output channel. Layers
            that it does not divide have one per output channel.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: bits outside 2..8, an unknown mode or layer name, a bad block size, nothing to quantize.
    """

    state = LayerState.WEIGHT_ONLY

    def __init__(self, model: nn.Module, bits: int = 8, debug_info: bool = False,
                 mode: Union[str, WeightMode] = WeightMode.SYMMETRIC, *, layer_bits: Optional[Mapping[str, int]] = None,
                 skip_quant_layers: Collection[str] = (), block_size: int = 0) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError("model must be a torch.nn.Module, got %s" % type(model).__name__)
        self.check(bits, mode, layer_bits, block_size)
        choice = choose_layers(model, skip_quant_layers, why_not_stored)
        self.storages = _storages(choice.quantized, bits, WeightMode(mode), layer_bits or {}, block_size)
        self._simulation = WeightSimulation(self.storages)
        super().__init__(model, choice, self._simulation)
        self._configuration = {"bits": bits, "mode": WeightMode(mode).value, "layer_bits": dict(layer_bits or {}),
                               "skip_quant_layers": list(skip_quant_layers), "block_size": block_size}
        if debug_info:
            for name, storage in self.storages.items():
                logger.info("%s: %d bits, %s%s", name, storage.bits, storage.mode.value,
                            ", blocks of %d" % storage.block_size if storage.block_size else "")

    @staticmethod
    def check(bits: int, mode: Union[str, WeightMode], layer_bits: Optional[Mapping[str, int]],
              block_size: int) -> None:
        """Check arguments before there is a model.

        Raises:
            ValueError: as the constructor.
        """
        if mode not in [*WeightMode, *(known.value for known in WeightMode)]:
            raise ValueError("mode must be one of %s, got %r" % (
                ", ".join(repr(known.value) for known in WeightMode), mode))
        for width in (bits, *(layer_bits or {}).values()):
            largest_level(width, WeightMode(mode))
        usable_block((1, block_size), block_size)

    # -- presence on the model

    def convert(self) -> nn.Module:
        """Make the model compute with its stored weights; returns the same object."""
        self.attach()
        return self.model

    def strip_wq_ops(self) -> None:
        """Give back the plain float model, for saving and exporting."""
        self.detach()

    def resume_wq_graph(self) -> None:
        """Continue after :meth:`strip_wq_ops`."""
        self.attach()

    # -- results

    def stored_weights(self) -> Dict[str, StoredWeight]:
        """The integers, scales and minimums of each layer, from the weights as they are now."""
        return {name: stored_weight(_array(layer), *self.storages[name]) for name, layer in self.layers.items()}

    def simulate(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with its stored weights in float64: the reference for what a device computes."""
        with self.attached():
            return run_double(self.model, args, kwargs)

    # -- files

    def save_compress_params(self, filename: PathLike, append: bool = False, *,
                             onnx_inference_model_file: Optional[PathLike] = None) -> None:
        """Write the parameters that MNN's converter needs.

        With the ONNX file, its weights are put onto their grid in place and each layer's bits go into the parameters,
        so that converting needs no further option. Without it nothing can be said of single layers: convert with
        ``--weight-bits N`` (``mnnconvert --weightQuantBits N --weightQuantAsymmetric=0``, or ``=1``).

        Args:
            filename: the parameter file.
            append: keep the other algorithms that the file holds already.
            onnx_inference_model_file: exported by the user from the stripped model with its present weights.

        Raises:
            ValueError: layers are stored differently and there is no ONNX file to name them.
            SlimtrainError: the files cannot be read or written, or do not belong to this model.
        """
        if onnx_inference_model_file is not None:
            path = os.fspath(onnx_inference_model_file)
            self._write(onnx.load(path), path, filename, append, self._simulation.used or set(self.layers))
            return
        widths = " and ".join(map(str, sorted({storage.bits for storage in self.storages.values()})))
        skipped = self._configuration["skip_quant_layers"]
        if " " in widths or skipped:
            raise ValueError("layers have %s bits%s: pass onnx_inference_model_file, which tells what the converter "
                             "calls each of them" % (widths, " or stay float" if skipped else ""))
        # a missing file would be taken for a wish to have a template written
        write_params(filename, read_params(filename) if append else params_from_json('{"version": "0.0.0"}'))

    def export(self, stem: PathLike, example_input: Any, *, append: bool = False, opset: Optional[int] = None,
               dynamo: Optional[bool] = None) -> Exported:
        """Write ``stem.onnx`` and ``stem.compress_params.bin``; the training model is not touched.

        Args:
            stem: path without suffix; its folder is made.
            example_input: a tensor, a tuple of positional or a dict of keyword arguments.
            append: keep the other algorithms that the parameter file holds already.
            opset: ONNX operator set; the exporter's choice when None.
            dynamo: which of torch's exporters; None takes the newer one where it can capture the model.

        Raises:
            ConversionError: the model cannot be exported.
        """
        args, kwargs = arguments(example_input)
        self._simulation.used.clear()
        self.simulate(*args, **kwargs)
        exported = Exported("%s.onnx" % os.fspath(stem), "%s.compress_params.bin" % os.fspath(stem))
        os.makedirs(os.path.dirname(os.path.abspath(exported.onnx)), exist_ok=True)
        model = export_float(self.model, args, kwargs, opset=opset, dynamo=dynamo)
        self._write(model, exported.onnx, exported.params, append, self._simulation.used)
        return exported

    def deploy(self, stem: PathLike, example_input: Any, **options: Any) -> Deployed:
        """Export, convert with MNN, run the model and compare it with the simulation; arguments as :meth:`export`.

        Raises:
            ConversionError: as :meth:`export`; MNN is not installed or failed.
            CoverageError: a layer is not stored as it should be.
        """
        exported = self.export(stem, example_input, **options)
        args, kwargs = arguments(example_input)
        return deploy(exported, named_inputs(exported.onnx, args, kwargs), self.simulate(*args, **kwargs))

    def _write(self, model: onnx.ModelProto, onnx_path: PathLike, params_path: PathLike, append: bool,
               used: Set[str]) -> None:
        for name in self.layers:
            if name not in used:
                logger.warning("layer %r is not used by the model's forward and is not stored", name)
        weights = self.stored_weights()
        layers = [StoredLayer(name, _array(layer), weights[name], *self.storages[name],
                              groups=int(getattr(layer, "groups", 1)))
                  for name, layer in self.layers.items() if name in used]
        written, params = write_stored(model, layers)
        replace_all([(onnx_path, written.SerializeToString(deterministic=True)),
                     (params_path, params_bytes(params, params_path, append))])

    # -- state

    def state_dict(self) -> Dict[str, Any]:
        """The configuration; everything else follows from the weights."""
        return {"algorithm": type(self).__name__, "configuration": dict(self._configuration)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a saved state is that of this quantizer.

        Raises:
            ValueError: it was stored in another way.
        """
        if state["configuration"] != self._configuration:
            raise ValueError("the checkpoint was trained with %r, this quantizer has %r" % (
                state["configuration"], self._configuration))

    @classmethod
    def from_checkpoint(cls: Type[Self], model: nn.Module, path: PathLike, *, module: Optional[str] = None) -> Self:
        """The converted quantizer that a Lightning checkpoint was written with; also of one that holds weights only.

        Args:
            model: the LightningModule that was trained; the weights of the checkpoint are loaded into it.
            path: the checkpoint; its sidecar lies beside it where it holds weights only.
            module: which quantized submodule, where there are several.

        Raises:
            SlimtrainError: the checkpoint cannot be read, or holds no state of such a quantizer.
            RuntimeError: its weights are those of another model.
        """
        saved = read_saved(path, cls.__name__, module)
        model.load_state_dict(saved.weights)
        quantizer = cls(submodule(model, saved.state["module"]), **saved.state["configuration"])
        quantizer.convert()
        return quantizer


def why_not_stored(module: nn.Module) -> str:
    """The reason why a layer cannot be stored as it is simulated; "" when it can."""
    reason = why_float(module)
    if reason.startswith("MNN has no int8"):
        return "only convolutions and linear layers are stored in few bits, not %s" % type(module).__name__
    if not reason and isinstance(module, (nn.Conv1d, nn.Conv2d)) and has_small_groups(
            module.in_channels, module.out_channels, module.groups):
        return "the converter takes its %d small groups apart" % module.groups
    return reason


def _storages(layers: Mapping[str, nn.Module], bits: int, mode: WeightMode, layer_bits: Mapping[str, int],
              block_size: int) -> Dict[str, Storage]:
    widths = dict.fromkeys(layers, bits)
    for pattern, width in layer_bits.items():
        widths.update(dict.fromkeys(select(list(layers), [pattern]), width))
    return {name: Storage(widths[name], mode, usable_block(_weight(layer).shape, block_size))
            for name, layer in layers.items()}


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _array(layer: nn.Module) -> Any:
    return _weight(layer).detach().float().cpu().numpy()
