"""A layer of a graph trained as a chain of wider ones, and the one layer that this chain equals.

The kernel becomes the product of a 1x1, a k x k and a 1x1 kernel with ``rate`` times the channels in between (Guo et
al., "ExpandNets", arXiv 1811.10495), with batch normalization in between and the layer's own input added on request.
Once the statistics are fixed, all of that is linear, so the layer's own operation computes it with the merged kernel.
It does so in training too where nothing is normalized. Where something is, training has a path of its own.

The first normalization only scales, because the second takes out every constant; so its scale can be put into the
kernel, and the variances it needs follow from the covariance of the narrow input. Nothing has a bias before the
padding, which one layer could not imitate.
"""
from __future__ import annotations

from typing import Any, List, Optional, Sequence, Tuple, Union

import tensorflow.compat.v1 as tf

from slimtrain.core import identity_tap
from slimtrain.hooks.compositions import Composition, remember, replace_variable
from slimtrain.hooks.expanded_parts import (
    SCOPE,
    Expansion,
    Parts,
    Statistics,
    absorbed,
    chain,
    channels_of,
    make_parts,
    with_tap,
)
from slimtrain.hooks.graph import Edge, connect, edges_from, variables_behind
from slimtrain.hooks.layers import LayerKind
from slimtrain.hooks.own_weights import OwnWeight

_MOMENTUM = 0.1

#: 1.0 in training, 0.0 in tests; a number in a graph that only trains
State = Union[float, tf.Tensor]


def expand_layer(own: OwnWeight, how: Expansion, training: Optional[State]) -> Tuple[List[Any], bool]:
    """Make a layer an expanded one.

    Args:
        own: the layer.
        how: it is expanded.
        training: 1.0 where the statistics are those of the batch (a number where they always are, which spares the
            graph the choice), 0.0 where they are the averages; None for a graph that only knows the averages.

    Returns:
        the variables, and whether the layer has a bypass.

    Raises:
        RuntimeError: the layer was expanded before.
    """
    graph, op = own.layer.op.graph, own.layer.op
    tap = _tap(own) if how.bypass else None
    with graph.as_default(), tf.control_dependencies(None), tf.name_scope(None):
        parts = make_parts(own, how, tap)
        variables = [part for part in parts if part is not None]
        with tf.device(own.variable.device), tf.name_scope("{}/{}/".format(SCOPE, op.name)):
            statistics = parts.running()
            kernel = tf.identity(own.as_variable(_merged(own, parts, statistics, tap)), name="kernel")
            kernel.set_shape(own.variable.shape)
        made = Composition(op.name, own.variable.op.name, kernel.name, [], "")
        if statistics is not None:
            with tf.device(op.device), tf.name_scope("{}/{}/".format(SCOPE, op.name)):
                made = _normalize(own, parts, statistics, tap, training, made)
        trained = [part for part in parts[:5] if part is not None]
        replace_variable(own.variable, kernel, trained)
        for part in variables[len(trained):]:
            graph.add_to_collection(tf.GraphKeys.GLOBAL_VARIABLES, part)
    remember(graph, made)
    return variables, tap is not None


def _bias_edge(own: OwnWeight) -> Optional[Edge]:
    """Where the layer's bias is read."""
    layer = own.layer
    if layer.bias is None:
        return None
    reader = layer.linear.op
    return Edge(reader, next(i for i, source in enumerate(reader.inputs) if source.name == layer.bias.name))


def _tap(own: OwnWeight) -> Optional[Tuple[int, ...]]:
    """The position of the kernel that passes the input through; None where output and input differ in shape."""
    inputs, outputs = channels_of(own)
    if inputs != outputs:
        return None
    if own.layer.kind is LayerKind.MATMUL:
        return ()
    return identity_tap(tuple(own.shape[:2]), own.stride, _padding(own), own.dilation)


def _padding(own: OwnWeight) -> List[Tuple[int, int]]:
    """Before and after each axis, for strides of 1."""
    op = own.layer.op
    if op.get_attr("padding") == b"EXPLICIT":
        amounts = op.get_attr("explicit_paddings")
        return [(int(amounts[2 * axis]), int(amounts[2 * axis + 1])) for axis in own.spatial]
    if op.get_attr("padding") == b"VALID":
        return [(0, 0), (0, 0)]
    totals = [spacing * (extent - 1) for spacing, extent in zip(own.dilation, own.shape)]
    return [(total // 2, total - total // 2) for total in totals]


def _merged(own: OwnWeight, parts: Parts, statistics: Optional[Statistics], tap: Optional[Sequence[int]]) -> tf.Tensor:
    """The kernel that the layer equals with these statistics, as it reads it."""
    kernel = with_tap(chain(parts.first_end(statistics), parts.middle.read_value(), parts.last_end(statistics)), tap)
    return tf.transpose(kernel) if own.transposed else kernel


def _normalize(own: OwnWeight, parts: Parts, averages: Statistics, tap: Optional[Sequence[int]],
               training: Optional[State], made: Composition) -> Composition:
    """The training path, which readers of the layer move to, and the bias that belongs to each form."""
    layer, edge = own.layer, _bias_edge(own)
    if edge is not None:
        made = made._replace(bias_variable=variables_behind(layer.bias)[0], merged_bias=_bias(
            layer.bias, parts, averages, "merged_bias").name)
    statistics = averages
    if training is not None:
        readers = edges_from(layer.op.outputs[0])
        result, statistics = _train(own, parts, averages, tap, training)
        connect(readers, result)
        made = made._replace(result=result.name)
    if edge is not None:
        bias = _bias(layer.bias, parts, statistics, "bias")
        connect([edge], bias)
        made = made._replace(bias=bias.name)
    return made


def _bias(bias: tf.Tensor, parts: Parts, statistics: Statistics, name: str) -> tf.Tensor:
    """The layer's bias less what the normalization takes out."""
    shift = tf.matmul(statistics.middle_mean[None], parts.last_end(statistics))
    return tf.subtract(bias, tf.reshape(shift, bias.shape.as_list()), name=name)


def _train(own: OwnWeight, parts: Parts, averages: Statistics, tap: Optional[Sequence[int]],
           training: State) -> Tuple[tf.Tensor, Statistics]:
    """What the layer computes with the statistics of the batch, without its bias; the averages follow."""
    x = own.layer.input
    first_var, first_count = _variance_of_first(x, parts)
    chosen = averages._replace(first_var=_mix(training, first_var, averages.first_var))
    y = _run(own, x, absorbed(parts.first_end(chosen), parts.middle.read_value()))
    axes = list(range(y.shape.rank - 1))
    middle_mean, middle_var = tf.nn.moments(y, axes)
    batch = Statistics(first_var, middle_mean, middle_var)
    chosen = Statistics(*(_mix(training, now, average) for now, average in zip(batch, averages)))
    count = tf.cast(tf.size(y), tf.float32) / float(y.shape.as_list()[-1])
    updates = [_follow(variable, value, training) for variable, value in (
        (parts.first_var, _unbiased(first_var, first_count)), (parts.middle_mean, middle_mean),
        (parts.middle_var, _unbiased(middle_var, count)))]
    last = parts.last_end(chosen)
    y = tf.matmul(y, last) if y.shape.rank == 2 else tf.nn.conv2d(y, last[None, None], strides=[1, 1, 1, 1],
                                                                 padding="VALID")
    with tf.control_dependencies(updates):
        result = tf.identity(y if tap is None else y + x, name="result")
    result.set_shape(own.layer.op.outputs[0].shape)
    return result, chosen


def _variance_of_first(x: tf.Tensor, parts: Parts) -> Tuple[tf.Tensor, tf.Tensor]:
    """Variance of each channel of ``first`` applied to x, and the number of positions."""
    flat = tf.reshape(x, [-1, x.shape.as_list()[-1]])
    centred = flat - tf.reduce_mean(flat, axis=0)
    count = tf.cast(tf.shape(flat)[0], tf.float32)
    covariance = tf.matmul(centred, centred, transpose_a=True) / count
    first = parts.first.read_value()
    return tf.reduce_sum(first * tf.matmul(covariance, first), axis=0), count


def _run(own: OwnWeight, x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """The layer's own operation with another kernel [..., I, n]."""
    op = own.layer.op
    if own.layer.kind is LayerKind.MATMUL:
        return tf.matmul(x, kernel)
    explicit = list(op.get_attr("explicit_paddings")) if op.get_attr("padding") == b"EXPLICIT" else []
    return tf.raw_ops.Conv2D(input=x, filter=kernel, strides=list(op.get_attr("strides")), explicit_paddings=explicit,
                             padding=op.get_attr("padding").decode(), dilations=list(op.get_attr("dilations")))


def _mix(training: State, batch: tf.Tensor, average: tf.Tensor) -> tf.Tensor:
    if not isinstance(training, tf.Tensor):
        return batch
    # a choice without a branch: gradients through tf.cond depend on the version of control flow
    return training * batch + (1.0 - training) * average


def _unbiased(variance: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    return variance * (count / tf.maximum(count - 1.0, 1.0))


def _follow(variable: Any, value: tf.Tensor, training: State) -> tf.Operation:
    step = training * _MOMENTUM * (tf.stop_gradient(value) - variable.read_value())
    return tf.assign_add(variable, step)
