"""Starting from trained weights: restored on a fresh start only, where a resumed run restores everything."""
from __future__ import annotations

import logging
from typing import Any, Dict, List, Tuple

import tensorflow.compat.v1 as tf

from slimtrain.core import SlimtrainError
from slimtrain.hooks.weight_file import PathLike, is_weight_file, read_weights, weight_shapes

logger = logging.getLogger(__name__)


def start_from_checkpoint(graph: tf.Graph, checkpoint: PathLike) -> int:
    """Let the variables of ``graph`` that ``checkpoint`` also holds, in the same shape, start from there.

    The initializers are rewritten, so a session that restores a later checkpoint is not touched. Variables made
    afterwards are not covered; the global step starts anew.

    Args:
        graph: the model, before its optimizer.
        checkpoint: a checkpoint, a folder with some, or a file of ``get_op_weight_values``.

    Returns:
        how many variables start from the checkpoint.

    Raises:
        ValueError: no checkpoint there, or not one variable in common.
    """
    try:
        count = start_common_variables(graph, checkpoint)
    except SlimtrainError as error:
        raise ValueError("init_checkpoint {!r} is no checkpoint: {}".format(checkpoint, error)) from error
    if not count:
        raise ValueError("init_checkpoint {!r} has no variable in common with the graph; it holds {}, the graph {}"
                         .format(checkpoint, sorted(weight_shapes(checkpoint))[:5],
                                 list(_whole_variables(graph))[:5]))
    return count


def start_common_variables(graph: tf.Graph, source: PathLike) -> int:
    """As :func:`start_from_checkpoint`, but having no variable in common is no mistake.

    Raises:
        SlimtrainError: neither a checkpoint nor a weight file.
    """
    shapes = weight_shapes(source)
    common: Dict[str, List[Any]] = {}
    others: List[str] = []
    for name, (shape, variables) in _whole_variables(graph).items():
        if shapes.get(name) == shape:
            common[name] = variables
        else:
            others.append(name)
    if others and common:
        logger.info("not in %s, started by their own initializers: %s", source, ", ".join(others))
    with graph.as_default(), tf.control_dependencies(None):
        if is_weight_file(source):
            _start_from_values(common, source)
        elif common:
            tf.train.init_from_checkpoint(source, {
                name: variables if len(variables) > 1 else variables[0] for name, variables in common.items()})
    return len(common)


def _start_from_values(common: Dict[str, List[Any]], path: PathLike) -> None:
    """What ``tf.train.init_from_checkpoint`` does, with constants: there is no public way to change an initializer."""
    values = read_weights(path, list(common))
    for name, variables in common.items():
        for variable in variables:
            with tf.device(variable.device), tf.name_scope("init_from_weight_file/"):
                value = tf.constant(values[name], variable.dtype.base_dtype)
                variable._initializer_op = tf.assign(variable, value).op
                variable._initial_value = value


def _whole_variables(graph: tf.Graph) -> Dict[str, Tuple[List[int], List[Any]]]:
    """Variables by the name under which a checkpoint holds them, the parts of a partitioned one together."""
    whole: Dict[str, Tuple[List[int], List[Any]]] = {}
    with graph.as_default():
        step = tf.train.get_global_step()
    for variable in graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES):
        if variable is step:
            continue
        part = variable._get_save_slice_info()  # no public way tells the name of a partitioned variable
        name = variable.op.name if part is None else part.full_name
        shape = variable.shape.as_list() if part is None else list(part.full_shape)
        whole.setdefault(name, (shape, []))[1].append(variable)
    return whole
