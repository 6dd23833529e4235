"""The seed interface of quantization-aware training: convert, strip, resume, save."""
from __future__ import annotations

import logging
import os
from typing import Any, List, Mapping, Optional, Type, TypeVar, Union

import onnx
from torch import nn

from slimtrain.callbacks.batches import arguments
from slimtrain.callbacks.checkpoints import read_saved
from slimtrain.callbacks.deployment import deployed_layers
from slimtrain.callbacks.exporting import Deployed, Exported, deploy, named_inputs, record, write_params_only
from slimtrain.callbacks.model_view import submodule
from slimtrain.callbacks.onnx_export import export_float
from slimtrain.callbacks.qdq import write_qdq
from slimtrain.callbacks.quantizer import Quantizer
from slimtrain.proto.deployed import DeployedLayer
from slimtrain.proto.onnx_files import write_files

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]
Self = TypeVar("Self", bound="QATQuantizer")


class QATQuantizer(Quantizer):
    """A quantizer for plain PyTorch loops; see :class:`slimtrain.callbacks.LSQQuantizer`."""

    @classmethod
    def from_state(cls: Type[Self], model: nn.Module, state: Mapping[str, Any]) -> Self:
        """A converted quantizer of ``model`` as it was when :meth:`state_dict` gave ``state``.

        Args:
            model: has the weights of that moment.
            state: of the same class.

        Raises:
            ValueError: the state is that of another model.
        """
        quantizer = cls(model, **state["configuration"])
        quantizer.load_state_dict(state)
        quantizer.convert()
        return quantizer

    @classmethod
    def from_checkpoint(cls: Type[Self], model: nn.Module, path: PathLike, *, module: Optional[str] = None) -> Self:
        """The quantizer that a Lightning checkpoint was written with; also of one that holds weights only.

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
        return cls.from_state(submodule(model, saved.state["module"]), saved.state)

    def convert(self) -> nn.Module:
        """Make the model compute as it will be deployed; returns the same object.

        The first batch in training mode sets the activations' scales.
        """
        self.attach()
        return self.model

    def strip_qat_ops(self) -> None:
        """Give back the plain float model, for saving and exporting; nothing learned is lost."""
        self.detach()

    def resume_qat_graph(self) -> None:
        """Continue after :meth:`strip_qat_ops`."""
        self.attach()

    def deployed_layers(self) -> List[DeployedLayer]:
        """Every use of a quantized layer with the integers and scales that go to the device, in execution order.

        Raises:
            RuntimeError: the model has not been trained or calibrated.
        """
        return deployed_layers(self.model, self.known_plan(), self.scales)

    def save_compress_params(self, onnx_inference_model_file: PathLike, filename: PathLike, append: bool = False, *,
                             rewrite: bool = True) -> None:
        """Write the parameters that MNN's converter needs for an ONNX file of the stripped model.

        What MNN would not quantize, or not exactly, is rewritten in the ONNX file in place: weights go onto their
        grid, linear layers become 1x1 convolutions, average pools become exact ones. Both files are written or none.

        Args:
            onnx_inference_model_file: exported by the user from the stripped model with its present weights.
            filename: the parameter file.
            append: keep the other algorithms that the file holds already.
            rewrite: False leaves the ONNX file alone and logs which layers stay float.

        Raises:
            SlimtrainError: the file holds other weights; it cannot be rewritten; the parameters cannot be written.
            RuntimeError: the model has not been trained or calibrated.
        """
        path = os.fspath(onnx_inference_model_file)
        model = onnx.load(path)
        layers = self.deployed_layers()
        if rewrite:
            write_files(model, layers, path, filename, append)
            return
        for name in write_params_only(model, layers, filename, append):
            logger.warning("layer %r stays float: MNN runs linear layers in int8 only as 1x1 convolutions, "
                           "and rewriting is turned off", name)

    def export(self, stem: PathLike, example_input: Any, *, append: bool = False, opset: Optional[int] = None,
               dynamo: Optional[bool] = None, qdq: bool = False, simulation: bool = False) -> Exported:
        """Write ``stem.onnx`` and ``stem.compress_params.bin``; the training model is not touched.

        Args:
            stem: path without suffix; its folder is made.
            example_input: a tensor, a tuple of positional or a dict of keyword arguments.
            append: keep the other algorithms that the parameter file holds already.
            opset: ONNX operator set; the exporter's choice when None.
            dynamo: which of torch's exporters; None takes the newer one where it can capture the model.
            qdq: also write ``stem.qdq.onnx``, a standard quantized ONNX file that onnxruntime runs in int8.
            simulation: also write ``stem.simulation.npz``, the example and what the device must compute from it, for
                ``slimtrain verify``.

        Raises:
            ConversionError: the model cannot be exported.
            RuntimeError: the model has not been trained or calibrated.
        """
        layers = self.deployed_layers()
        args, kwargs = arguments(example_input)
        exported = Exported("%s.onnx" % os.fspath(stem), "%s.compress_params.bin" % os.fspath(stem))
        os.makedirs(os.path.dirname(os.path.abspath(exported.onnx)), exist_ok=True)
        model = export_float(self.model, args, kwargs, opset=opset, dynamo=dynamo)
        write_files(model, layers, exported.onnx, exported.params, append)
        if qdq:
            write_qdq(exported.onnx, layers, "%s.qdq.onnx" % os.fspath(stem))
        if simulation:
            record(exported, named_inputs(exported.onnx, args, kwargs), self.simulate(*args, **kwargs))
        return exported

    def deploy(self, stem: PathLike, example_input: Any, **options: Any) -> Deployed:
        """Export, convert with MNN, run the int8 model and compare it with the simulation.

        Args:
            stem, example_input, options: as :meth:`export`.

        Raises:
            ConversionError: as :meth:`export`; MNN is not installed or failed.
            CoverageError: a layer that should be int8 is not.
        """
        exported = self.export(stem, example_input, **options)
        args, kwargs = arguments(example_input)
        return deploy(exported, named_inputs(exported.onnx, args, kwargs), self.simulate(*args, **kwargs))
