"""Reading and editing the edges of a TensorFlow graph."""
from __future__ import annotations

import re
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Set

import tensorflow.compat.v1 as tf

#: operations that hand on a weight, whole or as one of its parts, without computing with it
_PASS_ON = frozenset({"Identity", "ReadVariableOp", "ExpandDims", "Reshape", "Squeeze", "Transpose", "Cast", "ConcatV2",
                      "Enter", "Switch", "StopGradient"})
#: of those, what leaves values in their order
_KEEP_ORDER = _PASS_ON - {"Transpose", "Cast", "ConcatV2"}
_VARIABLES = frozenset({"VariableV2", "Variable", "VarHandleOp"})
#: operations that let a value through or not
_GATES = frozenset({"Switch", "Enter"})
#: how optimizers change variables
_UPDATES = ("Apply", "ResourceApply", "SparseApply", "ResourceSparseApply")
_GRADIENTS = re.compile(r"(^|/)gradients(_\d+)?/")
_RANDOM = ("Random", "StatelessRandom", "TruncatedNormal", "ParameterizedTruncated", "Multinomial")


class Edge(NamedTuple):
    """Input number ``position`` of operation ``op``."""

    op: tf.Operation
    position: int


def edges_from(tensor: tf.Tensor) -> List[Edge]:
    """Every input of every operation that reads ``tensor``, in the order in which the operations were made."""
    readers = {op.name: op for op in tensor.consumers()}
    return [Edge(op, index) for op in readers.values() for index, source in enumerate(op.inputs)
            if source.name == tensor.name]


def connect(edges: Iterable[Edge], tensor: tf.Tensor) -> None:
    """Make each edge read ``tensor``. Without effect on a session that already ran: see ``checks``."""
    for edge in edges:
        edge.op._update_input(edge.position, tensor)  # TensorFlow has no public way to move an edge


def inside_control_flow(op: tf.Operation) -> bool:
    """Whether ``op`` belongs to the body of a version 1 ``cond`` or ``while_loop``."""
    return op._get_control_flow_context() is not None  # the context has no public getter


def variables_behind(tensor: tf.Tensor) -> List[str]:
    """Names of the variables that ``tensor`` hands on: one, several for a partitioned variable, none if computed."""
    found: List[str] = []
    waiting: List[tf.Operation] = [tensor.op]
    while waiting:
        op = waiting.pop(0)
        if op.type in _VARIABLES:
            found.append(op.name)
        elif op.type in _PASS_ON:
            waiting.extend(source.op for source in _values(op))
        elif op.type != "Const":
            return []
    return found


def is_frozen(graph: tf.Graph) -> bool:
    """Whether a graph has no variables: its weights are constants."""
    return not any(op.type in _VARIABLES for op in graph.get_operations())


def ordered_variable(tensor: tf.Tensor) -> str:
    """The name of the one variable that ``tensor`` hands on with its values in their order; "" for anything else."""
    op = tensor.op
    while op.type in _KEEP_ORDER:
        op = op.inputs[0].op
    return str(op.name) if op.type in _VARIABLES else ""


def _values(op: tf.Operation) -> List[tf.Tensor]:
    if op.type == "ConcatV2":
        return list(op.inputs)[:-1]
    return list(op.inputs)[:1]


def variable_device(tensor: tf.Tensor) -> str:
    """The device of the nearest variable that ``tensor`` is computed from; its own if there is none."""
    waiting, seen = [tensor.op], set()  # type: List[tf.Operation], Set[str]
    while waiting:
        op = waiting.pop(0)
        if op.type in _VARIABLES:
            return str(op.device)
        if op.name not in seen:
            seen.add(op.name)
            waiting.extend(source.op for source in op.inputs)
    return str(tensor.device)


def ancestors(ops: Iterable[tf.Operation]) -> Set[str]:
    """Names of ``ops`` and of everything that their values are computed from."""
    seen: Set[str] = set()
    waiting: List[tf.Operation] = list(ops)
    while waiting:
        op = waiting.pop()
        if op.name not in seen:
            seen.add(op.name)
            waiting.extend(source.op for source in op.inputs)
    return seen


def constant_tensors(graph: tf.Graph) -> Set[str]:
    """Names of the tensors that depend on variables and constants alone."""
    fixed: Set[str] = set()
    for op in graph.get_operations():
        source = op.type in _VARIABLES or op.type == "Const"
        inputs = list(op.inputs)[:1] if op.type in _GATES else op.inputs
        computed = bool(inputs) and all(tensor.name in fixed for tensor in inputs)
        if source or (computed and not is_random(op.type) and op.type != "PlaceholderWithDefault"):
            fixed.update(tensor.name for tensor in op.outputs)
    return fixed


def is_backward(op: tf.Operation) -> bool:
    """Whether an operation came with ``tf.gradients`` or an optimizer."""
    if is_update(op) or op.type.endswith(("Grad", "GradV2", "GradV3", "BackpropFilter")):
        return True
    return _GRADIENTS.search(op.name) is not None


def is_update(op: tf.Operation) -> bool:
    """Whether an operation is the one with which an optimizer changes a variable."""
    return str(op.type).startswith(_UPDATES)


def is_random(op_type: str) -> bool:
    """Whether operations of this type draw random numbers."""
    return op_type.startswith(_RANDOM)


def float_inputs(op: tf.Operation) -> List[tf.Tensor]:
    """The inputs of ``op`` that hold real numbers (axes and shapes left out)."""
    return [tensor for tensor in op.inputs if tensor.dtype.base_dtype.is_floating]


def variables_by_name(graph: tf.Graph) -> Dict[str, Any]:
    """The graph's global variables by the name of their operation."""
    return {variable.op.name: variable for variable in graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)}


def find_tensor(graph: tf.Graph, name: str) -> tf.Tensor:
    """The tensor called ``name``, with or without ``:0``.

    Raises:
        ValueError: the graph has no such tensor.
    """
    try:
        return graph.get_tensor_by_name(name if ":" in name else name + ":0")
    except (KeyError, ValueError) as error:
        raise ValueError("the graph has no tensor named {!r}".format(name)) from error


def only_reader(tensor: tf.Tensor, within: Optional[Set[str]] = None) -> Optional[tf.Operation]:
    """The one operation (of those named ``within``) that reads ``tensor``; None when there are none or several."""
    readers = {op.name: op for op in tensor.consumers() if within is None or op.name in within}
    return next(iter(readers.values())) if len(readers) == 1 else None
