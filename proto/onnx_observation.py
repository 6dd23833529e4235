"""Running a float ONNX model on data and observing the tensors that will carry a scale."""
from __future__ import annotations

import logging
from typing import Any, Dict, Iterable, List, NamedTuple

import numpy as np
import onnx

from slimtrain.core import (
    FIELDS_PER_BATCH,
    LONGEST_FIELD,
    InputMoments,
    Observation,
    Quantizer,
    add_moments,
    observe_together,
    receptive_fields,
)
from slimtrain.proto.onnx_check import open_session, run_session
from slimtrain.proto.onnx_geometry import as_image, conv_geometry
from slimtrain.proto.onnx_graph import OnnxGraph
from slimtrain.proto.onnx_rewrite import Rewritten
from slimtrain.proto.progress import with_progress

logger = logging.getLogger(__name__)

Arrays = Dict[str, np.ndarray]


class Observations(NamedTuple):
    """What was seen of a model."""

    tensors: Dict[Quantizer, Observation]
    moments: Dict[str, InputMoments]   #: output of a convolution -> what it read; empty unless asked for
    first: Arrays                      #: the first batch


def observe_onnx(structure: Rewritten, batches: Iterable[Arrays], with_moments: bool = False) -> Observations:
    """Run a model on batches and observe each quantized tensor; nothing of a batch is kept but the first input.

    Args:
        structure: a model whose layers are convolutions, its weights still float.
        batches: inputs by name.
        with_moments: also keep the moments of what each layer reads, for rounding and bias correction.

    Raises:
        ValueError: there was no batch, or a tensor is not finite.
        ConversionError: onnxruntime cannot run the model.
    """
    watched: Dict[Quantizer, List[str]] = {}
    for name, owner in structure.placement.quantizers.items():
        watched.setdefault(owner, []).append(name)
    convolutions = {str(node.output[0]): node for node in OnnxGraph(structure.model).nodes
                    if node.output[0] in structure.layers} if with_moments else {}
    wanted = {name for names in watched.values() for name in names}
    wanted |= {str(node.input[0]) for node in convolutions.values()}
    run = _Runner(structure.model, sorted(wanted))
    seen: Dict[Quantizer, Observation] = {owner: Observation() for owner in watched}
    moments: Dict[str, InputMoments] = {}
    first: Arrays = {}
    for batch in with_progress(batches, "calibrating"):
        first = first or batch
        values = run(batch)
        for owner, names in watched.items():
            seen[owner] = _observed(seen[owner], [values[name] for name in names], owner)
        for output, node in convolutions.items():
            _add_moments(moments, output, node, structure, values[node.input[0]])
    if not first:
        raise ValueError("calibration needs at least one batch, got none")
    return Observations(seen, moments, first)


class _Runner:
    """A session that also returns tensors inside the model."""

    def __init__(self, model: onnx.ModelProto, names: List[str]) -> None:
        inputs = {value.name for value in model.graph.input}
        watched = onnx.ModelProto()
        watched.CopyFrom(model)
        del watched.graph.output[:]
        self._names = [name for name in names if name not in inputs]
        watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._names)
        self._session: Any = open_session(watched.SerializeToString()) if self._names else None

    def __call__(self, batch: Arrays) -> Arrays:
        values = dict(batch)
        if self._session is not None:
            values.update(zip(self._names, run_session(self._session, self._names, batch)))
        return values


def _observed(seen: Observation, values: List[np.ndarray], owner: Quantizer) -> Observation:
    """One batch of all tensors that share a scale."""
    try:
        return observe_together(seen, values)
    except ValueError as error:
        raise ValueError("layer %r, %s: %s" % (owner.layer, owner.role.value, error)) from error


def _add_moments(moments: Dict[str, InputMoments], output: str, node: onnx.NodeProto, structure: Rewritten,
                 x: np.ndarray) -> None:
    layer = structure.layers[output]
    weight = layer.levels.reshape(layer.levels.shape + (1,) * (x.ndim - layer.levels.ndim))
    if weight[0].size > LONGEST_FIELD:
        if output not in moments:
            logger.warning("layer %r reads %d values at once, more than %d: its rounding and bias are left alone",
                           layer.name, weight[0].size, LONGEST_FIELD)
            moments[output] = InputMoments()
        return
    geometry = conv_geometry(node, weight.shape, x.shape[2:])
    fields = receptive_fields(as_image(x), geometry.kernel, geometry.strides, geometry.padding, geometry.dilation,
                              layer.groups, FIELDS_PER_BATCH)
    moments[output] = add_moments(moments.get(output, InputMoments()), fields)
