"""How much a frozen graph minds each width of each layer: one layer quantized at a time, all others float."""
from __future__ import annotations

from typing import Any, Callable, Dict, List, Sequence, Tuple, Union

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import LayerState, WeightMode, largest_level, select, usable_block
from slimtrain.core.bit_choice import BitSensitivity
from slimtrain.hooks.frozen import PathLike, feeds_of, frozen_graph
from slimtrain.hooks.graph import Edge, connect, find_tensor
from slimtrain.hooks.layers import Layer
from slimtrain.hooks.offline_quantizer import OfflineQuantizer
from slimtrain.hooks.operations import read_network
from slimtrain.hooks.weight_fake_quant import core_shape, stored_kernel
from slimtrain.proto.bit_sensitivity import NetworkRun, WeightSize, check_examples, measure_layers

#: a batch: what is fed (arrays by name of a placeholder, or one array for the only one), and what the loss compares the
#: network's output with
Example = Tuple[Any, Any]
#: from the network's output (a list, where it has several) and a target to the mean over the batch
Loss = Callable[[Any, Any], float]


def weight_sensitivity(graph: Union[PathLike, Any], examples: Sequence[Example], loss: Loss,
                       bits: Sequence[int] = (8, 6, 4, 3, 2), *, mode: Union[str, WeightMode] = WeightMode.SYMMETRIC,
                       skip_quant_layers: Sequence[str] = (), block_size: int = 0,
                       output_names: Sequence[str]) -> BitSensitivity:
    """Store the weights of one layer at a time in few bits, and see what the network makes of it.

    Runs the graph ``1 + layers x widths`` times over all examples. ``WeightQuantizer`` with ``layer_bits`` and
    ``skip_quant_layers`` of the plan that ``choose`` gives then stores the whole network.

    Args:
        graph: a frozen ``GraphDef`` of the network as it infers, or the path of one (.pb); it is left as it is.
        examples: (input, target) pairs, best some hundred samples that the network was not trained with.
        loss: from the output and a target, numpy arrays, to a number, the mean over the batch.
        bits: the widths to try, 2 to 8.
        mode, skip_quant_layers, block_size: as for :class:`slimtrain.hooks.WeightQuantizer`.
        output_names: what leaves the network.

    Returns:
        the measurements, that of a layer left float among them.

    Raises:
        ValueError: no examples or widths; bits outside 2..8, an unknown mode or layer name, a bad block size.
        ConversionError: the file is no frozen graph.
    """
    check_examples(examples, bits)
    mode = WeightMode(mode)
    for width in bits:
        largest_level(width, mode)
    usable_block((1, block_size), block_size)
    network, layers = _opened(frozen_graph(graph), output_names, skip_quant_layers)
    with network.as_default():
        # a weight that two layers share is stored for each of them
        places = {name: tf.placeholder_with_default(layer.kernel, layer.kernel.shape)
                  for name, layer in layers.items()}
    for name, layer in layers.items():
        connect([Edge(layer.op, 1)], places[name])
    outputs = [find_tensor(network, name) for name in output_names]
    with tf.Session(graph=network) as session:
        kernels = session.run({name: layer.kernel for name, layer in layers.items()})

        def run(stored: Dict[Any, np.ndarray]) -> NetworkRun:
            return _run(lambda feeds: session.run(outputs, {**feeds, **stored}), network, examples, loss)

        def quantized(name: str, width: int) -> NetworkRun:
            block = usable_block(core_shape(layers[name]), block_size)
            return run({places[name]: stored_kernel(kernels[name], layers[name], width, mode, block)[1]})

        return measure_layers(_sizes(layers), run({}), quantized, bits, LayerState.WEIGHT_ONLY)


def int8_sensitivity(graph: Union[PathLike, Any], examples: Sequence[Example], loss: Loss, bits: Sequence[int] = (8,),
                     *, skip_quant_layers: Sequence[str] = (), output_names: Sequence[str]) -> BitSensitivity:
    """Run one layer at a time in int8, its scales calibrated on the examples, and see what the network makes of it.

    The file of a fully quantized layer holds 8 bits, whatever the width of its levels. So what there is to choose is
    which layers to skip: those whose ``skip_quant_layers`` the plan lists hurt more than they save.

    Args:
        graph, examples, loss, output_names: as :func:`weight_sensitivity`.
        bits: widths of weights and activations to measure; a plan takes the widest, as narrower ones save nothing.
        skip_quant_layers: as for :class:`slimtrain.hooks.OfflineQuantizer`.

    Raises:
        ValueError: no examples or widths; as ``OfflineQuantizer``.
        ConversionError: the file is no frozen graph.
    """
    check_examples(examples, bits)
    graph_def = frozen_graph(graph)
    network, layers = _opened(graph_def, output_names, skip_quant_layers)
    outputs = [find_tensor(network, name) for name in output_names]

    def quantized(name: str, width: int) -> NetworkRun:
        others = [other for other in layers if other != name] + list(skip_quant_layers)
        quantizer = OfflineQuantizer(graph_def, others, width, output_names=output_names)
        quantizer.calibrate([inputs for inputs, _ in examples])
        return _run(lambda feeds: quantizer.simulate(output_names, feeds), network, examples, loss)

    with tf.Session(graph=network) as session:
        whole = _run(lambda feeds: session.run(outputs, feeds), network, examples, loss)
    return measure_layers(_sizes(layers), whole, quantized, bits, LayerState.INT8)


# -- inside


def _opened(graph_def: Any, output_names: Sequence[str],
            skipped: Sequence[str]) -> Tuple[tf.Graph, Dict[str, Layer]]:
    """A graph of its own, and the layers that can be quantized."""
    if isinstance(output_names, str):
        raise TypeError("output_names must be a sequence of names, got the string {!r}".format(output_names))
    graph = tf.Graph()
    with graph.as_default():
        tf.import_graph_def(graph_def, name="")
        found = read_network(graph, output_names).layers
    left = set(select(list(found), list(skipped)))
    layers = {name: layer for name, layer in found.items() if not layer.reason and name not in left}
    if not layers:
        raise ValueError("there is nothing to measure: {}".format("; ".join(
            "{}: {}".format(name, layer.reason or "skipped") for name, layer in found.items())
            or "the graph has no convolution or matrix product with a constant weight"))
    return graph, layers


def _sizes(layers: Dict[str, Layer]) -> Dict[str, WeightSize]:
    return {name: WeightSize(layer.parameters, layer.channels) for name, layer in layers.items()}


def _run(compute: Callable[[Dict[str, np.ndarray]], List[np.ndarray]], graph: tf.Graph, examples: Sequence[Example],
         loss: Loss) -> NetworkRun:
    outputs: List[np.ndarray] = []
    losses: List[float] = []
    counts: List[int] = []
    for inputs, target in examples:
        results = compute(feeds_of(graph, inputs))
        outputs += [np.asarray(result, np.float64).ravel() for result in results]
        losses.append(float(loss(results[0] if len(results) == 1 else results, target)))
        counts.append(len(results[0]))
    return NetworkRun(np.concatenate(outputs), float(np.average(losses, weights=counts)))
