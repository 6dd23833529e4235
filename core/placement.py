"""Where MNN quantizes: the tensors of a network that carry a scale, and whose scale it is.

MNN's converter describes tensors only through the convolutions around them: the inputs and the (fused) outputs of
quantized layers. The description spreads along operations that only move values (views, pools, concatenation), in
both directions, and the runtime may merge such operations or run them on integers or on floats as it likes. Results
do not depend on what it does if all tensors that are connected in this way share one scale: that of the first layer
that produces one of them, else of the first layer that reads one. Training has to simulate exactly that, so both
frameworks translate their graph into :class:`Op` values and ask :func:`place`.
"""
from __future__ import annotations

from enum import Enum
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple


class OpKind(Enum):
    """What an operation does to the values that flow through it."""

    LAYER = "layer"                #: a convolution or linear layer that will run in int8
    BATCH_NORM = "batch_norm"      #: a per-channel affine that the converter folds into the layer before it
    RELU = "relu"                  #: fused into the layer before it
    RELU6 = "relu6"                #: fused into the layer before it
    NON_NEGATIVE = "non_negative"  #: any other operation whose result is never below zero (sigmoid, abs, softmax)
    COMBINE = "combine"            #: non-negative when all its inputs are (add, mean, multiply)
    VIEW = "view"                  #: moves values without changing any (reshape, transpose, slice, flatten)
    MAX_POOL = "max_pool"          #: selects values without changing any
    CONCAT = "concat"              #: puts tensors side by side
    RESIZE = "resize"              #: interpolates between values
    OTHER = "other"


class Op(NamedTuple):
    """One operation of a network, in execution order."""

    output: str               #: name of the tensor it produces; unique
    kind: OpKind
    inputs: Tuple[str, ...]   #: the tensors it reads, weights and constants left out
    layer: str = ""           #: name of the layer, for ``OpKind.LAYER``


class Role(Enum):
    """Which of a layer's two activation scales a tensor uses."""

    INPUT = "input"
    OUTPUT = "output"


class Quantizer(NamedTuple):
    """The owner of an activation scale."""

    layer: str
    role: Role


class LayerCall(NamedTuple):
    """One use of a quantized layer (a layer that is called twice has two)."""

    layer: str
    tensor: str               #: what the layer itself produces, before anything fused into it
    fused: str                #: what leaves the fused operation: after batch norm and activation
    input: Quantizer
    output: Quantizer


class PlannedCall(NamedTuple):
    """One use of a quantized layer in the deployed model, in execution order."""

    layer: str
    input: Quantizer
    output: Quantizer
    batch_norm: str     #: name of the batch norm module folded into it, "" for none
    activation: str     #: "relu", "relu6" or "" as fused behind it


class Placement(NamedTuple):
    """Every quantized tensor of a network."""

    quantizers: Dict[str, Quantizer]     #: tensor -> owner of its scale; tensors made by moving these are on its grid
    calls: Tuple[LayerCall, ...]         #: in execution order
    non_negative: Tuple[Quantizer, ...]  #: owners of which no tensor can be below zero
    on_grid: Dict[str, Quantizer]        #: all tensors on a grid: the quantized ones, and those that only move values


_MOVES = (OpKind.VIEW, OpKind.MAX_POOL, OpKind.CONCAT)
_NON_NEGATIVE = (OpKind.RELU, OpKind.RELU6, OpKind.NON_NEGATIVE)
_KEEPS_SIGN = (*_MOVES, OpKind.RESIZE, OpKind.COMBINE)


def place(ops: Sequence[Op], outputs: Sequence[str]) -> Placement:
    """Find each quantized tensor and the owner of its scale.

    Args:
        ops: the network in execution order; a name that no operation produces is an input of the network.
        outputs: tensors that leave the network (an operation is never fused past one); operations that lead to none
            of them are ignored, as a converter drops them.

    Raises:
        ValueError: two operations produce a tensor of the same name, or a layer reads no or several tensors.
    """
    producer = _producers(ops)
    ops = _alive(ops, outputs, producer)
    fused = _fused_outputs(ops, outputs)
    layers = [op for op in ops if op.kind is OpKind.LAYER]
    group = _connected(ops)
    owners: Dict[str, Quantizer] = {}
    for op in layers:
        owners.setdefault(group(fused[op.output]), Quantizer(op.layer, Role.OUTPUT))
    for op in layers:
        owners.setdefault(group(op.inputs[0]), Quantizer(op.layer, Role.INPUT))
    tensors = dict.fromkeys(name for op in ops for name in (*op.inputs, op.output))
    on_grid = {name: owners[group(name)] for name in tensors if group(name) in owners}
    moved = {op.output for op in ops if op.kind in _MOVES}
    quantizers = {name: owner for name, owner in on_grid.items() if name not in moved}
    calls = [LayerCall(op.layer, op.output, fused[op.output], on_grid[op.inputs[0]], on_grid[fused[op.output]])
             for op in layers]
    return Placement(quantizers, tuple(calls), _never_negative(ops, quantizers), on_grid)


def _connected(ops: Sequence[Op]) -> Callable[[str], str]:
    """A function from a tensor to the representative of all tensors that it shares values with."""
    parent: Dict[str, str] = {}

    def find(name: str) -> str:
        while parent.get(name, name) != name:
            parent[name] = parent.get(parent[name], parent[name])
            name = parent[name]
        return name

    for op in ops:
        if op.kind in _MOVES:
            for name in op.inputs:
                parent[find(name)] = find(op.output)
    return find


def _producers(ops: Sequence[Op]) -> Dict[str, Op]:
    producer: Dict[str, Op] = {}
    for op in ops:
        if op.output in producer:
            raise ValueError("two operations produce a tensor named %r" % op.output)
        if op.kind is OpKind.LAYER and len(op.inputs) != 1:
            raise ValueError("layer %r must read one tensor, it reads %r" % (op.layer, op.inputs))
        producer[op.output] = op
    return producer


def _alive(ops: Sequence[Op], outputs: Sequence[str], producer: Dict[str, Op]) -> List[Op]:
    """The operations that lead to an output, in order."""
    wanted = list(outputs)
    alive = set()
    while wanted:
        name = wanted.pop()
        if name in producer and name not in alive:
            alive.add(name)
            wanted.extend(producer[name].inputs)
    return [op for op in ops if op.output in alive]


def _fused_outputs(ops: Sequence[Op], outputs: Sequence[str]) -> Dict[str, str]:
    """Map each layer's own output to that of the batch norm and activation which the converter fuses into it."""
    readers: Dict[str, List[Op]] = {}
    for op in ops:
        for name in op.inputs:
            readers.setdefault(name, []).append(op)
    fused = {}
    for op in ops:
        if op.kind is not OpKind.LAYER:
            continue
        end = op.output
        for wanted in ((OpKind.BATCH_NORM,), (OpKind.RELU, OpKind.RELU6)):
            following = readers.get(end, [])
            if len(following) == 1 and end not in outputs and following[0].kind in wanted:
                end = following[0].output
        fused[op.output] = end
    return fused


def _never_negative(ops: Sequence[Op], quantizers: Dict[str, Quantizer]) -> Tuple[Quantizer, ...]:
    positive = set()
    for op in ops:
        inherits = op.kind in _KEEPS_SIGN and op.inputs and all(name in positive for name in op.inputs)
        if op.kind in _NON_NEGATIVE or inherits:
            positive.add(op.output)
    signed = {owner for tensor, owner in quantizers.items() if tensor not in positive}
    return tuple(sorted(set(quantizers.values()) - signed, key=lambda owner: (owner.layer, owner.role.value)))
