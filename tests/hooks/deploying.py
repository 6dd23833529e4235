"""Train a small network for a few steps, export it, and run it every way there is."""
from typing import NamedTuple

import numpy as np

import slimtrain.hooks as hooks
from slimtrain.proto import convert, run_model
from tf_setup import session, tf


class Trained(NamedTuple):
    stem: str            #: of the exported files
    checkpoint: str
    output: str          #: name of the output tensor
    quantizer: object    #: of the training graph


def build(net, quantizer, training, size=12, **arguments):
    """A quantized graph: (graph, input, output, quantizer)."""
    graph = tf.Graph()
    with graph.as_default():
        x = tf.placeholder(tf.float32, [None, size, size, 3], name="x")
        y = net(x, training)
        made = getattr(hooks, quantizer + "Quantizer")(graph, training, output_names=[y.name], **arguments)
    return graph, x, y, made


def train(net, quantizer, folder, steps=6, **arguments):
    graph, x, y, made = build(net, quantizer, True, **arguments)
    with graph.as_default():
        loss = tf.reduce_mean(tf.square(y - 1.0))
        with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
            step = tf.train.GradientDescentOptimizer(1e-3).minimize(loss)
        saver, init = tf.train.Saver(), tf.global_variables_initializer()
    with session(graph) as run:
        run.run(init)
        made.init(run)
        for number in range(steps):
            run.run(step, {x: np.random.RandomState(number).randn(4, 12, 12, 3)})
            made.update(run)
        checkpoint = saver.save(run, str(folder / "trained"))
        made.export(str(folder / "net"), run)
    return Trained(str(folder / "net"), checkpoint, y.name, made)


def images(count=2, size=12):
    return np.random.RandomState(99).randn(count, size, size, 3).astype(np.float32)


def deployed(stem, x):
    """Coverage, and the one output of the converted model."""
    conversion = convert(stem + ".pb", stem + ".mnn", stem + ".compress_params.bin")
    (output,) = run_model(stem + ".mnn", {"x": x}).values()
    return conversion.coverage, output
