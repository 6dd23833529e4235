"""Starting from a float checkpoint: restored on a fresh start only, where a resumed run restores everything."""
from __future__ import annotations

import logging
from typing import Any, Dict, List, Tuple

import tensorflow.compat.v1 as tf

logger = logging.getLogger(__name__)


def start_from_checkpoint(graph: tf.Graph, checkpoint: str) -> int:
    """Let the variables of ``graph`` that ``checkpoint`` also holds, in the same shape, start from there.

    The initializers are rewritten, so a session that restores a later checkpoint is not touched. Variables made
    afterwards are not covered; the global step starts anew.

    Args:
        graph: the model, before its optimizer.
        checkpoint: a checkpoint or a folder with some.

    Returns:
        how many variables start from the checkpoint.

    Raises:
        ValueError: no checkpoint there, or not one variable in common.
    """
    try:
        shapes = tf.train.load_checkpoint(checkpoint).get_variable_to_shape_map()
    except (ValueError, tf.errors.OpError) as error:
        raise ValueError("init_checkpoint {!r} is no checkpoint: {}".format(checkpoint, error)) from error
    assignment: Dict[str, Any] = {}
    others: List[str] = []
    for name, (shape, variables) in _whole_variables(graph).items():
        if shapes.get(name) == shape:
            assignment[name] = variables if len(variables) > 1 else variables[0]
        else:
            others.append(name)
    if not assignment:
        raise ValueError("init_checkpoint {!r} has no variable in common with the graph; it holds {}, the graph {}"
                         .format(checkpoint, sorted(shapes)[:5], others[:5]))
    if others:
        logger.info("not in %s, started by their own initializers: %s", checkpoint, ", ".join(others))
    with graph.as_default():
        tf.train.init_from_checkpoint(checkpoint, assignment)
    return len(assignment)


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
