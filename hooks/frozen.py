"""Frozen graphs: reading one from a file, and feeding it batches."""
from __future__ import annotations

import os
from typing import Any, Dict, Mapping, Union

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import ConversionError

PathLike = Union[str, "os.PathLike[str]"]


def frozen_graph(graph: Union[PathLike, Any]) -> Any:
    """A ``GraphDef``, or the one that a .pb file holds.

    Raises:
        ConversionError: the file is no frozen graph.
    """
    if isinstance(graph, tf.GraphDef):
        return graph
    graph_def, path = tf.GraphDef(), os.fspath(graph)
    try:
        with open(path, "rb") as file:
            graph_def.ParseFromString(file.read())
    except Exception as error:  # protobuf's errors have no class that all its versions share
        raise ConversionError("cannot read the frozen graph %s: %s" % (path, error)) from error
    if not graph_def.node:
        raise ConversionError("%s holds no graph" % path)
    return graph_def


def feeds_of(graph: tf.Graph, batch: Any) -> Dict[str, np.ndarray]:
    """A batch by tensor name.

    Args:
        graph: whose placeholders are fed.
        batch: arrays by name of a placeholder, or one array for a graph with one placeholder.

    Raises:
        ValueError: one array, and not one placeholder.
    """
    if isinstance(batch, Mapping):
        return {name if ":" in name else name + ":0": value for name, value in batch.items()}
    inputs = [op.outputs[0].name for op in graph.get_operations() if op.type == "Placeholder"]
    if len(inputs) != 1:
        raise ValueError("the graph has the placeholders %s: give each batch as a dict by name" % inputs)
    return {inputs[0]: np.asarray(batch)}
