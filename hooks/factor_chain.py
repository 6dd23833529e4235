"""A layer of a graph as a chain of smaller ones: the operations, their variables, and the weight that they equal."""
from __future__ import annotations

from typing import Any, List, Sequence

import tensorflow.compat.v1 as tf

from slimtrain.core import axis_owners
from slimtrain.hooks.compositions import Composition, remember, replace_variable
from slimtrain.hooks.graph import connect, edges_from
from slimtrain.hooks.layers import LayerKind
from slimtrain.hooks.own_weights import OwnWeight, make_part

#: scope of all operations of chains
SCOPE = "low_rank"
#: scope of the products of factors
_PRODUCTS = "low_rank_product"


def replace_layer(own: OwnWeight, factors: Sequence[Any]) -> List[Any]:
    """Put a chain in the place of a layer; whoever read the layer's result reads the chain's.

    The layer's operation stays, for those who fetch it by name: it computes the same with the product of the factors.

    Args:
        own: the layer.
        factors: the initial values, arrays or tensors, as the layer reads its kernel: [h, w, I, O], [I, O] or [O, I].

    Returns:
        the factors' variables.

    Raises:
        RuntimeError: the layer was decomposed before.
    """
    graph, op = own.layer.op.graph, own.layer.op
    trained = any(item is own.variable for item in graph.get_collection(tf.GraphKeys.TRAINABLE_VARIABLES))
    with graph.as_default(), tf.control_dependencies(None), tf.name_scope(None):
        variables = [make_part(own, "factor_{}".format(index), value, trained) for index, value in enumerate(factors)]
        shapes = [variable.shape.as_list() for variable in variables]
        with tf.device(own.variable.device), tf.name_scope("{}/{}/".format(_PRODUCTS, own.variable.op.name)):
            kernel = tf.identity(own.as_variable(_product([v.read_value() for v in variables], own.transposed)),
                                 name="kernel")
            kernel.set_shape(own.variable.shape)
        with tf.device(op.device), tf.name_scope("{}/{}/".format(SCOPE, op.name)):
            edges = edges_from(op.outputs[0])
            result = _run(own, [v.read_value() for v in variables], shapes)
            result.set_shape(op.outputs[0].shape)
        connect(edges, result)
        replace_variable(own.variable, kernel, variables)
    remember(graph, Composition(op.name, own.variable.op.name, kernel.name, shapes, result.name))
    return variables


def core_shapes(own: OwnWeight, shapes: Sequence[Sequence[int]]) -> List[Any]:
    """Shapes of factors as ``slimtrain.core`` has them: [O, I, *extents].

    Raises:
        ValueError: they are no chain for the layer.
    """
    wanted = to_core_shape(own.shape, own.transposed)
    if not shapes or any(len(shape) != len(own.shape) for shape in shapes):
        raise ValueError("layer {!r} cannot have factors of shapes {}".format(own.layer.name, list(shapes)))
    turned = [to_core_shape(shape, own.transposed) for shape in shapes]
    owners = axis_owners(turned)
    extents = tuple(turned[owner][2 + axis] for axis, owner in enumerate(owners))
    fits = all(before[0] == after[1] for before, after in zip(turned, turned[1:])) and all(
        shape[2 + axis] == 1 for axis, owner in enumerate(owners)
        for index, shape in enumerate(turned) if index != owner)
    if not fits or (turned[-1][0], turned[0][1]) + extents != wanted:
        raise ValueError("layer {!r} has a weight of shape {}, for which factors of shapes {} are no chain".format(
            own.layer.name, own.shape, [list(shape) for shape in shapes]))
    return turned


def to_core_shape(shape: Sequence[int], transposed: bool) -> Any:
    """As ``own_weights.to_core`` for the shape alone."""
    if len(shape) == 2:
        return tuple(shape) if transposed else (shape[1], shape[0])
    return (shape[3], shape[2], shape[0], shape[1])


def _run(own: OwnWeight, factors: Sequence[tf.Tensor], shapes: Sequence[Sequence[int]]) -> tf.Tensor:
    """What the chain computes from the layer's input."""
    op, values = own.layer.op, own.layer.input
    if own.layer.kind is LayerKind.MATMUL:
        for index, factor in enumerate(factors):
            values = tf.matmul(values, factor, transpose_a=op.get_attr("transpose_a") and index == 0,
                               transpose_b=own.transposed, name="{}".format(index))
        return values
    owners = axis_owners(core_shapes(own, shapes))
    for index, factor in enumerate(factors):
        owns = [owner == index for owner in owners]
        values = tf.raw_ops.Conv2D(
            input=values, filter=factor, strides=_along(own, own.stride, owns),
            dilations=_along(own, own.dilation, owns), padding=op.get_attr("padding").decode(),
            explicit_paddings=_explicit(own, owns), data_format=op.get_attr("data_format").decode(),
            name="{}".format(index))
    return values


def _along(own: OwnWeight, values: Sequence[int], owns: Sequence[bool]) -> List[int]:
    """One number for each axis of the input, 1 where another link is in charge."""
    numbers = [1, 1, 1, 1]
    for axis, value, mine in zip(own.spatial, values, owns):
        numbers[axis] = int(value) if mine else 1
    return numbers


def _explicit(own: OwnWeight, owns: Sequence[bool]) -> List[int]:
    if own.layer.op.get_attr("padding") != b"EXPLICIT":
        return []
    amounts = list(own.layer.op.get_attr("explicit_paddings"))
    for axis, mine in zip(own.spatial, owns):
        if not mine:
            amounts[2 * axis:2 * axis + 2] = [0, 0]
    return amounts


def _product(factors: Sequence[tf.Tensor], transposed: bool) -> tf.Tensor:
    """The kernel that the factors equal, as the layer reads it."""
    product = factors[0]
    for factor in factors[1:]:  # where one has a single position, it meets all of the other's
        product = tf.matmul(factor, product) if transposed else tf.matmul(product, factor)
    return product
