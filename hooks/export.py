"""A frozen inference graph from a live training session, made on a copy.

The copy starts from the GraphDef that was taken before anything was inserted, and only reads the session's variables:
the training graph keeps its operations and its version, and stays finalized.
"""
from __future__ import annotations

import logging
import os
import tempfile
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import ConversionError, replace_all
from slimtrain.hooks.batch_norm import FUSED, normalizes_over_batch
from slimtrain.hooks.compositions import merge_in_copy
from slimtrain.hooks.deployment import DeployedLayer, deployed_scope
from slimtrain.hooks.graph import Edge, connect, find_tensor, is_random
from slimtrain.hooks.grids import put_on_grid
from slimtrain.hooks.operations import Network
from slimtrain.hooks.padding import exact_convolutions
from slimtrain.hooks.rewriting import (
    Replacements,
    Rewriting,
    add_float_operations,
    add_inference_norms,
    add_layers,
    redirect,
)
from slimtrain.hooks.stacking import contributed
from slimtrain.proto import quantize_algorithm, save_algorithm

logger = logging.getLogger(__name__)

_PLACEHOLDERS = frozenset({"Placeholder", "PlaceholderWithDefault"})
_SOURCES = frozenset({"IteratorGetNext", "QueueDequeueV2", "QueueDequeueManyV2", "QueueDequeueUpToV2"})


def export_model(stem: str, session: tf.Session, clean: Any, rewriting: Rewriting, output_names: Sequence[str]) -> None:
    """Write ``stem.pb`` and ``stem.compress_params.bin``, both or none.

    Args:
        stem: path without suffix.
        session: holds the trained variables.
        clean: GraphDef of the network as the user built it.
        rewriting: the network and its quantized layers.
        output_names: tensors or operations that leave the network.

    Raises:
        ValueError: an output that does not exist.
        ConversionError: a part of the graph has no inference form.
    """
    frozen = inference_graph(session, clean, rewriting, output_names)
    params = params_bytes([quantize_algorithm([layer.params for layer in rewriting.deployed])]
                          + contributed(session.graph, session))
    replace_all([(stem + ".pb", frozen.SerializeToString(deterministic=True)),
                 (stem + ".compress_params.bin", params)])


def params_bytes(algorithms: Sequence[Any]) -> bytes:
    """What MNN's parameter file holds for several ``CompressionAlgo``; nothing for none."""
    if not algorithms:
        return b""
    with tempfile.TemporaryDirectory(prefix="slimtrain-") as folder:
        path = os.path.join(folder, "params.bin")
        for index, algorithm in enumerate(algorithms):
            save_algorithm(path, algorithm, append=index > 0)
        with open(path, "rb") as file:
            return file.read()


def write_params_file(filename: str, deployed: Sequence[DeployedLayer], append: bool) -> None:
    """Write the parameters of quantized layers to MNN's parameter file."""
    save_algorithm(filename, quantize_algorithm([layer.params for layer in deployed]), append)


def inference_graph(session: tf.Session, clean: Any, rewriting: Rewriting, output_names: Sequence[str]) -> Any:
    """The frozen GraphDef that computes the network as MNN shall."""
    copy, replacements = inference_copy(clean, rewriting.network)
    put_on_grid(copy, rewriting.grids)
    replacements.update(add_layers(copy, rewriting.deployed))
    replacements.update(add_float_operations(copy, rewriting))
    return _frozen(session, copy, rewriting, replacements, output_names)


def float_graph(session: tf.Session, clean: Any, network: Network, output_names: Sequence[str],
                kernels: Optional[Mapping[str, np.ndarray]] = None) -> Any:
    """The frozen GraphDef that computes the network at inference, with its weights as they are.

    Args:
        session: holds the trained variables.
        clean: GraphDef of the network as the user built it.
        network: the network in it.
        output_names: what leaves it.
        kernels: by layer, what its operation shall read in the place of its weight.
    """
    copy, replacements = inference_copy(clean, network)
    with copy.as_default(), tf.control_dependencies(None):
        for name, kernel in (kernels or {}).items():
            constant = tf.constant(kernel, name="slimtrain_kernels/" + name)
            connect([Edge(copy.get_operation_by_name(name), 1)], constant)
    return _frozen(session, copy, Rewriting(network, (), ()), replacements, output_names)


def _frozen(session: tf.Session, copy: tf.Graph, rewriting: Rewriting, replacements: Replacements,
            output_names: Sequence[str]) -> Any:
    outputs = [find_tensor(copy, name).op.name for name in output_names]
    redirect(copy, {**replacements, **without_dropout(copy, rewriting.network)})
    renames = merge_in_copy(copy, session)
    padded = exact_convolutions(copy, rewriting.network, {layer.source.layer.name for layer in rewriting.deployed})
    redirect(copy, padded)
    replacements = {**replacements, **padded}
    graph_def = _with_old_names(copy.as_graph_def(), {**renames, **_renames(replacements, rewriting.deployed)})
    frozen = tf.graph_util.convert_variables_to_constants(session, graph_def, outputs)
    frozen = tf.graph_util.remove_training_nodes(frozen, protected_nodes=outputs)
    _check_inference(frozen)
    for name in _lost_outputs(frozen, outputs):
        logger.warning("MNN will not deliver the output %r, because other operations of the network read it: put "
                       "tf.reshape(y, tf.shape(y)) behind it, before the model is compressed, and name that as the "
                       "output", name)
    return frozen


def _lost_outputs(frozen: Any, outputs: Sequence[str]) -> List[str]:
    """Outputs that are read by others; the converter takes for outputs what nobody reads, and leaves identities out."""
    nodes = {node.name: node for node in frozen.node}
    readers: Dict[str, Set[str]] = {}
    for node in frozen.node:
        for source in node.input:
            readers.setdefault(source.partition(":")[0], set()).add(node.name)

    def is_read(name: str, by: str) -> bool:
        if readers.get(name, set()) - {by}:
            return True
        return nodes[name].op == "Identity" and is_read(nodes[name].input[0].partition(":")[0], name)

    return [name for name in outputs if is_read(name, name)]


def inference_copy(clean: Any, network: Network) -> Tuple[tf.Graph, Replacements]:
    """A graph of its own, and what has to be added to it in the place of what to make it infer."""
    copy = tf.Graph()
    with copy.as_default():
        tf.import_graph_def(clean, name="")
    replacements = add_inference_norms(copy, [norm for norm in network.norms.values() if norm.training])
    replacements.update((name, copy.get_tensor_by_name(average.name)) for name, average in network.statistics.items())
    replacements.update(_placeholders(copy, network.within))
    for name, tensor in _test_branches(copy, network.within).items():
        replacements.setdefault(name, tensor)
    return copy, replacements


def _test_branches(graph: tf.Graph, within: Set[str]) -> Replacements:
    """What a version 1 ``cond`` on a placeholder gives when that is false, as a training state is at inference."""
    switches = [op for op in graph.get_operations()
                if op.type == "Switch" and op.name in within and _is_state(op.inputs[1])]
    decided = {op.outputs[0].name: op.inputs[0] for op in switches}
    untaken = {op.outputs[1].name for op in switches}
    for op in graph.get_operations():
        if op.type == "Merge" and op.name in within and any(_reaches(source, untaken) for source in op.inputs):
            decided[op.outputs[0].name] = next(source for source in op.inputs if not _reaches(source, untaken))
    return decided


def _is_state(predicate: tf.Tensor) -> bool:
    while predicate.op.type == "Identity":
        predicate = predicate.op.inputs[0]
    return predicate.op.type in ("Placeholder", "PlaceholderWithDefault") and predicate.shape.rank == 0


def _reaches(tensor: tf.Tensor, wanted: Set[str]) -> bool:
    """Whether a branch that ends in ``tensor`` begins at one of ``wanted``."""
    waiting: List[tf.Tensor] = [tensor]
    seen: Set[str] = set()
    while waiting:
        current = waiting.pop()
        if current.name in wanted:
            return True
        if current.op.name not in seen and current.op.type != "Switch":  # a branch begins at its switches
            seen.add(current.op.name)
            waiting.extend(current.op.inputs)
            waiting.extend(output for op in current.op.control_inputs for output in op.outputs[:1])
    return False


def without_dropout(graph: tf.Graph, network: Network) -> Replacements:
    """What each dropout drops from, to be read in its place."""
    return {name: graph.get_tensor_by_name(source.name) for name, source in network.dropouts.items()}


def delivered_inputs(graph: tf.Graph, within: Set[str]) -> Dict[str, str]:
    """What an input pipeline delivers to a network, and the name that its placeholder has in exported graphs."""
    wanted = [tensor.name for op in graph.get_operations() if op.type in _SOURCES and op.name in within
              for tensor in op.outputs if any(reader.name in within for reader in tensor.consumers())]
    return {name: "input" if len(wanted) == 1 else "input_{}".format(index) for index, name in enumerate(wanted)}


def network_inputs(graph: tf.Graph, within: Set[str], inner: Set[str]) -> Dict[str, str]:
    """The tensors that feed a network, and what an inference graph calls each; a switch is no input.

    Args:
        graph: that the network is in.
        within: names of the operations of the network.
        inner: of those, what its layers are computed from.
    """
    found = {op.outputs[0].name: op.name for op in graph.get_operations()
             if op.name in inner and op.type in _PLACEHOLDERS and op.outputs[0].shape.rank != 0}
    delivered = delivered_inputs(graph, within)
    return {**found, **{name: given for name, given in delivered.items() if name.partition(":")[0] in inner}}


def _placeholders(graph: tf.Graph, within: Set[str]) -> Replacements:
    """Placeholders in the place of what an input pipeline delivers."""
    added = {}
    with graph.as_default():
        for delivered, name in delivered_inputs(graph, within).items():
            tensor = graph.get_tensor_by_name(delivered)
            added[tensor.name] = tf.placeholder(tensor.dtype, tensor.shape, name=name)
            logger.info("%s becomes the placeholder %s of the exported graph", tensor.name, added[tensor.name].op.name)
    return added


def _renames(replacements: Replacements, deployed: Sequence[DeployedLayer]) -> Dict[str, str]:
    """Give replacements the names of what they replace, so that outputs keep theirs."""
    renames = {tensor.op.name: name.partition(":")[0] for name, tensor in replacements.items()
               if tensor.op.type != "Placeholder"}
    for layer in deployed:
        exported, live = layer.params.output_names[:2]
        if layer.source.call.fused.partition(":")[0] != layer.params.name:  # else a bias that it had not has its name
            renames[deployed_scope(layer.params.name) + "convolution"] = layer.params.name
        renames[live] = exported
    return renames


def _with_old_names(graph_def: Any, renames: Dict[str, str]) -> Any:
    replaced = set(renames.values())
    renamed = tf.GraphDef()
    renamed.versions.CopyFrom(graph_def.versions)
    renamed.library.CopyFrom(graph_def.library)
    for node in graph_def.node:
        if node.name not in replaced:
            fresh = renamed.node.add()
            fresh.CopyFrom(node)
            fresh.name = renames.get(node.name, node.name)
            fresh.device = ""
            fresh.attr.pop("_class", None)  # colocation with what may be gone
            fresh.input[:] = [_renamed_input(name, renames) for name in node.input]
    return renamed


def _renamed_input(name: str, renames: Dict[str, str]) -> str:
    mark, bare = ("^", name[1:]) if name.startswith("^") else ("", name)
    op, colon, index = bare.partition(":")
    return mark + renames.get(op, op) + colon + index


def _check_inference(frozen: Any) -> None:
    """Raise ``ConversionError`` for what only makes sense in training."""
    problems: List[str] = []
    for node in frozen.node:
        if node.op in FUSED and node.attr["is_training"].b:
            problems.append("batch norm {!r} uses the statistics of the batch and has no moving averages".format(
                node.name))
        elif is_random(node.op):
            problems.append("{} {!r} draws random numbers".format(node.op, node.name))
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(frozen, name="")
    problems.extend("{!r} uses the statistics of the batch and has no moving averages".format(op.name)
                    for op in graph.get_operations() if normalizes_over_batch(op))
    if problems:
        raise ConversionError("the network has no inference form: {}".format("; ".join(problems)))
