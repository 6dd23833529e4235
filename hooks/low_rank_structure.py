"""The structure of a decomposed graph: read from it or from a checkpoint, and given to another one."""
from __future__ import annotations

import os
from typing import Any, List, Mapping, Sequence, Union

import tensorflow.compat.v1 as tf

from slimtrain.hooks.compositions import compositions
from slimtrain.hooks.factor_chain import core_shapes, replace_layer
from slimtrain.hooks.low_rank import Structure, check_decomposable, decomposable
from slimtrain.hooks.own_weights import find_own_weights
from slimtrain.hooks.weight_file import weight_shapes

PathLike = Union[str, "os.PathLike[str]"]


def structure_of(graph: tf.Graph) -> Structure:
    """The chains of a graph: operation -> shapes of the factors."""
    return {made.layer: [list(shape) for shape in made.factors] for made in compositions(graph) if made.factors}


def structure_in(checkpoint: PathLike, graph: tf.Graph) -> Structure:
    """The chains that the variables of a checkpoint ask for.

    Args:
        checkpoint: of a decomposed graph; a file or a folder with some.
        graph: of the same network, not decomposed: its layers are looked for.

    Raises:
        SlimtrainError: there is no checkpoint.
    """
    shapes = weight_shapes(checkpoint)
    found: Structure = {}
    for name, own in find_own_weights(graph)[1].items():
        links: List[List[int]] = []
        while "{}/factor_{}".format(own.variable.op.name, len(links)) in shapes:
            links.append(shapes["{}/factor_{}".format(own.variable.op.name, len(links))])
        if links:
            found[name] = links
    return found


def apply_structure(graph: tf.Graph, structure: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Give a forward graph exactly these chains, so that a checkpoint of the one they are from can be restored.

    Args:
        graph: of the network that was decomposed, before its optimizer and without a session.
        structure: of :func:`structure_of`, :func:`structure_in` or ``LowRankDecomposition.structure``.

    The new variables start at random.

    Raises:
        ValueError: a layer does not exist, or cannot be such a chain; nothing is changed then.
        TypeError, RuntimeError: ``graph`` is none, or cannot be changed any more.
    """
    check_decomposable(graph)
    own = decomposable(graph, ()).own
    for name, shapes in structure.items():
        if name not in own:
            raise ValueError("the structure has a layer {!r}, which the graph has not, or which cannot be a chain; "
                             "those that can are {}".format(name, ", ".join(map(repr, own)) or "none"))
        core_shapes(own[name], shapes)
    for name, shapes in structure.items():
        with graph.as_default():
            replace_layer(own[name], [_random(shape) for shape in shapes])


def _random(shape: Sequence[int]) -> Any:
    return lambda: tf.variance_scaling_initializer()(list(shape), tf.float32)
