"""What quantization does to each layer of a graph, on an example: ranges and what they cut, and the error it makes."""
from __future__ import annotations

from typing import Any, Dict, Mapping, Union

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import LayerStatistics, SeenLayer, quantization_statistics, range_of
from slimtrain.hooks.quantizer import GraphQuantizer
from slimtrain.hooks.weight_quantizer import WeightQuantizer


def layer_statistics(quantizer: Union[GraphQuantizer, WeightQuantizer], session: tf.Session,
                     feed_dict: Mapping[Any, np.ndarray]) -> LayerStatistics:
    """Run the float network and the simulation on an example, both at inference, and compare them layer by layer.

    The output of an int8 layer is what the device writes: with batch norm and activation where they are fused into it.
    Of one with weights of few bits it is the result with its bias.

    Args:
        quantizer: trained; neither its graph nor the session is changed.
        session: holds the trained variables.
        feed_dict: arrays by tensor or tensor name of the network's inputs.
    """
    if isinstance(quantizer, WeightQuantizer):
        return quantization_statistics(_stored(quantizer, session, feed_dict))
    return quantization_statistics(_quantized(quantizer, session, feed_dict))


def _quantized(quantizer: GraphQuantizer, session: tf.Session,
               feed_dict: Mapping[Any, np.ndarray]) -> Dict[str, SeenLayer]:
    layers = {layer.source.layer.name: layer for layer in quantizer.deployed_layers(session)}
    sources = {name: layer.source for name, layer in layers.items()}
    wanted: Dict[str, None] = {}  # a set in its order
    for source in sources.values():
        wanted.update({source.layer.input.name: None, source.call.fused: None})
    ends = [source.call.fused for source in sources.values()]
    plain = dict(zip(wanted, quantizer.run_float(session, list(wanted), feed_dict)))
    simulated = dict(zip(ends, quantizer.simulate(session, ends, feed_dict)))
    trained = session.run({name: (source.kernel, source.kernel_scale) for name, source in sources.items()})
    seen = {}
    for name, source in sources.items():
        kernel, scales = trained[name]
        seen[name] = SeenLayer(
            kernel, plain[source.layer.input.name], plain[source.call.fused], simulated[source.call.fused],
            range_of(float(np.max(scales)), source.kernel_grid),
            range_of(layers[name].params.input_scale, source.input_grid))
    return seen


def _stored(quantizer: WeightQuantizer, session: tf.Session,
            feed_dict: Mapping[Any, np.ndarray]) -> Dict[str, SeenLayer]:
    ends = [layer.linear.name for layer in quantizer.layers.values()]
    plain = quantizer.run_float(session, ends, feed_dict)
    simulated = quantizer.simulate(session, ends, feed_dict)
    kernels = session.run([layer.kernel for layer in quantizer.layers.values()])
    return {name: SeenLayer(kernel, None, before, after)
            for name, kernel, before, after in zip(quantizer.layers, kernels, plain, simulated)}
