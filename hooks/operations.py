"""A TensorFlow graph in the vocabulary of ``slimtrain.core.placement``: what each operation does to its values."""
from __future__ import annotations

from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

import tensorflow.compat.v1 as tf

from slimtrain.core import Op, OpKind
from slimtrain.hooks.batch_norm import BatchNorm, find_batch_norms, find_batch_statistics
from slimtrain.hooks.compositions import replaced_layers
from slimtrain.hooks.dropout import find_dropouts
from slimtrain.hooks.graph import ancestors, constant_tensors, find_tensor, float_inputs
from slimtrain.hooks.layers import Layer, find_layers

_KINDS: Dict[OpKind, Tuple[str, ...]] = {
    OpKind.RELU: ("Relu",),
    OpKind.RELU6: ("Relu6",),
    OpKind.NON_NEGATIVE: ("Sigmoid", "Softmax", "Abs", "Exp", "Softplus", "Square", "Sqrt"),
    OpKind.COMBINE: ("Add", "AddV2", "AddN", "Mul", "RealDiv", "Maximum", "ConcatV2", "Mean", "Sum", "Max", "AvgPool"),
    OpKind.VIEW: ("Reshape", "Squeeze", "ExpandDims", "Transpose", "Slice", "StridedSlice", "Split", "SplitV", "Unpack",
                  "Pack", "Identity", "StopGradient", "Gather", "GatherV2", "Pad", "PadV2", "SpaceToBatchND",
                  "BatchToSpaceND", "DepthToSpace", "SpaceToDepth", "Tile", "ResizeNearestNeighbor", "CheckNumerics"),
    OpKind.MAX_POOL: ("MaxPool", "MaxPoolV2"),
    OpKind.RESIZE: ("ResizeBilinear",),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}
#: operations that watch a network without being part of it
_WATCHERS = ("Summary", "Assert", "Print", "Histogram")


class Network(NamedTuple):
    """What a graph computes between its inputs and its outputs."""

    layers: Dict[str, Layer]          #: by operation name
    norms: Dict[str, BatchNorm]       #: by the name of the output tensor
    dropouts: Dict[str, tf.Tensor]    #: name of a dropout's output -> what it drops from
    within: Set[str]                  #: names of all operations of the network
    fixed: Set[str]                   #: names of the tensors that depend on variables and constants alone
    outputs: Tuple[str, ...]          #: names of the tensors that are known to leave it
    statistics: Dict[str, tf.Tensor]  #: name of a statistic of the batch -> moving average to read at inference


def read_network(graph: tf.Graph, output_names: Optional[Sequence[str]]) -> Network:
    """Find the layers of a graph and what lies between them; adds operations that read moving averages.

    Args:
        graph: the forward graph.
        output_names: tensors or operations that leave the network; None to take everything but summaries and asserts.

    Raises:
        ValueError: an output that does not exist.
    """
    outputs = [find_tensor(graph, name) for name in output_names or ()]
    within = ancestors([tensor.op for tensor in outputs]) if outputs else forward_names(graph)
    names = {tensor.name for tensor in outputs}
    fixed = constant_tensors(graph)
    norms = find_batch_norms(graph)
    dropouts = {name: drop.source for name, drop in find_dropouts(graph, fixed).items() if drop.op in within}
    layers = find_layers(graph, within, fixed, names)
    return Network(layers, norms, dropouts, within, fixed, tuple(sorted(names)), find_batch_statistics(graph))


def leaves(ops: Sequence[Op]) -> List[str]:
    """The tensors that no operation reads."""
    read = {name for op in ops for name in op.inputs}
    return [op.output for op in ops if op.output not in read]


def forward_names(graph: tf.Graph) -> Set[str]:
    """Names of all operations but those that only watch, and those whose work others have taken over."""
    working = {op.name for op in graph.get_operations() if not any(word in op.type for word in _WATCHERS)}
    return working - replaced_layers(graph)


def translate(graph: tf.Graph, network: Network, quantized: Iterable[Layer]) -> List[Op]:
    """The network for ``slimtrain.core.place``, with the layers that are to be quantized."""
    hidden = {name for norm in network.norms.values() for name in norm.ops}
    known = {name: Op(name, OpKind.BATCH_NORM, (norm.input.name,)) for name, norm in network.norms.items()}
    known.update((name, Op(name, OpKind.VIEW, (source.name,))) for name, source in network.dropouts.items())
    for layer in quantized:
        hidden.add(layer.name)
        known[layer.linear.name] = Op(layer.linear.name, OpKind.LAYER, (layer.input.name,), layer.name)
    translated = []
    for op in graph.get_operations():
        for tensor in op.outputs if op.name in network.within else ():
            if tensor.name in known:
                translated.append(known[tensor.name])
            elif op.name not in hidden and tensor.dtype.is_floating and tensor.name not in network.fixed:
                translated.extend(_plain(op, tensor, network.fixed))
    return translated


def _plain(op: tf.Operation, tensor: tf.Tensor, fixed: Set[str]) -> List[Op]:
    """An operation that is nothing special; none at all for an input of the network."""
    reals = float_inputs(op)
    inputs = tuple(source.name for source in reals if source.name not in fixed)
    if not inputs:
        return []
    kind = _KIND_OF.get(op.type, OpKind.OTHER)
    if kind is OpKind.COMBINE and len(inputs) < len(reals):
        kind = OpKind.OTHER  # a constant may be negative
    return [Op(tensor.name, kind, inputs)]
