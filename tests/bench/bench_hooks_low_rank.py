"""Low rank and over-parameterization of TensorFlow graphs: how long they take, and what they cost or bring in accuracy.

    python tests/bench/bench_hooks_low_rank.py [--rounds 3] [--seed 0] [--speed] [--accuracy]

Speed: a ResNet-18 and a MobileNetV2 are decomposed with the default ranks, and the ResNet-18 is expanded at rate 4 and
merged back, from its graph to the frozen one; the initialization of variables does not count. Accuracy: digits, one
seed; 8 epochs of fine-tuning from a trained float net with the default ranks and with a budget of 16.5 % of the
parameters, and 20 epochs from scratch with over-parameterization. What the hooks exported is tested.
"""
import argparse
import functools
import os
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow.compat.v1 as tf
from rich.console import Console
from rich.table import Table

from bench_hooks_pruning import batch_norm, conv, data, dense, fit, resnet18
from slimtrain.core import BudgetRanks
from slimtrain.hooks import LOP, LOPHook, LowRankDecomposition, LowRankDecompositionHook, get_op_weight_values

LONGEST = {"decompose ResNet-18": 3.0, "decompose MobileNetV2": 1.0, "expand ResNet-18 and merge it": 3.0,
           "of it, expand": None, "of it, merge": None}
LEAST = {"low rank, defaults": 0.982, "low rank, 16.5 %": 0.982, "LOP, rate 4": 0.990}


def mobilenet(x):
    """MobileNetV2 with 3.5 million weights."""
    x = tf.nn.relu6(conv(x, "stem", 32, 3, 2))
    settings = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
                (6, 320, 1, 1))
    for stage, (expansion, channels, count, stride) in enumerate(settings):
        for index in range(count):
            x = inverted_residual(x, "stage%d_%d" % (stage, index), expansion, channels, 1 if index else stride)
    return dense(tf.reduce_mean(tf.nn.relu6(conv(x, "last", 1280, 1)), [1, 2]), "head", 1000)


def inverted_residual(x, name, expansion, channels, stride):
    """Wider, depthwise, narrower; with the input added where it has the shape."""
    inputs = x.shape.as_list()[-1]
    y = x if expansion == 1 else tf.nn.relu6(conv(x, name + "/wide", inputs * expansion, 1))
    with tf.variable_scope(name + "/depthwise"):
        kernel = tf.get_variable("kernel", [3, 3, inputs * expansion, 1],
                                 initializer=tf.variance_scaling_initializer(2.0))
        y = tf.nn.relu6(batch_norm(tf.nn.depthwise_conv2d(y, kernel, [1, stride, stride, 1], "SAME")))
    y = conv(y, name + "/narrow", channels, 1)
    return x + y if stride == 1 and inputs == channels else y


def graph_of(network):
    """The graph of a network and the name of its output."""
    graph = tf.Graph()
    with graph.as_default():
        scores = network(tf.placeholder(tf.float32, [1, 64, 64, 3], name="x"))
    return graph, scores.name


def initialized(graph):
    """A session."""
    with graph.as_default():
        init = tf.global_variables_initializer()
    session = tf.Session(graph=graph)
    session.run(init)
    return session


def decompose(network, weights):
    """Seconds to decide on the ranks and to edit the graph."""
    graph, _ = graph_of(network)
    begin = time.perf_counter()
    LowRankDecomposition(graph, weights).apply()
    return time.perf_counter() - begin


def expand_and_merge():
    """Seconds to edit the graph, and to freeze the merged one from a session."""
    graph, output = graph_of(resnet18)
    begin = time.perf_counter()
    lop = LOP(graph, is_training=True)
    lop.linear_expand_layers(4, None)
    expanded = time.perf_counter() - begin
    with initialized(graph) as session:
        begin = time.perf_counter()
        lop.linear_merge_layers(session, [output])
        return expanded, time.perf_counter() - begin


def speed(rounds):
    """Median seconds by name."""
    with tempfile.TemporaryDirectory() as work:
        files = {network: os.path.join(work, network.__name__ + ".npy") for network in (resnet18, mobilenet)}
        for network, weights in files.items():
            with initialized(graph_of(network)[0]) as session:
                get_op_weight_values(session, weights)
        times = [[*(decompose(*file) for file in files.items()), *expand_and_merge()] for _ in range(rounds)]
    times = [[resnet, small, expand + merge, expand, merge] for resnet, small, expand, merge in times]
    return dict(zip(LONGEST, np.median(times, axis=0)))


def tested(folder):
    """Accuracy of the exported net, and the number of its weights."""
    _, _, images, labels = data()
    exported = tf.GraphDef()
    with open(os.path.join(folder, "model.pb"), "rb") as file:
        exported.ParseFromString(file.read())
    kernels = [node.attr["value"].tensor for node in exported.node if node.op == "Const" and "kernel" in node.name]
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(exported, name="")
        with tf.Session(graph=graph) as session:
            scores = session.run("scores:0", {"x:0": images})
    return float((scores.argmax(1) == labels).mean()), sum(tf.make_ndarray(kernel).size for kernel in kernels)


def hook_for(make, folder, train_steps, **options):
    return make(output_names=["scores"], export_dir=folder, **options)


def accuracies(seed):
    """Rows (name, accuracy, weights)."""
    with tempfile.TemporaryDirectory() as work:
        dense = os.path.join(work, "float")
        fit(seed, 20, 0.05, dense)
        tight = {"rank_rule": BudgetRanks(0.165), "tucker_minimal_ratio": 0.0, "align_channels": 4}
        runs = {"low rank, defaults": (LowRankDecompositionHook, 8, 0.01, {"weight_npy_file": dense}),
                "low rank, 16.5 %": (LowRankDecompositionHook, 8, 0.01, {"weight_npy_file": dense, **tight}),
                "LOP, rate 4": (LOPHook, 20, 0.05, {"expand_rate": 4, "is_training": True})}
        for number, (name, (make, epochs, rate, options)) in enumerate(runs.items()):
            folder = os.path.join(work, str(number))
            fit(seed, epochs, rate, folder, functools.partial(hook_for, make, folder, **options))
            yield (name, *tested(folder))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", action="store_true", help="only that")
    parser.add_argument("--accuracy", action="store_true", help="only that")
    options = parser.parse_args()
    tf.disable_v2_behavior()
    tf.logging.set_verbosity(tf.logging.ERROR)
    console = Console(width=100)
    if not options.accuracy:
        table = Table("", "seconds", "at most", title="TensorFlow " + tf.__version__)
        for name, seconds in speed(options.rounds).items():
            table.add_row(name, "%.2f" % seconds, "" if LONGEST[name] is None else "%.1f" % LONGEST[name])
        console.print(table)
    if not options.speed:
        console.print("TensorFlow %s, digits, seed %d" % (tf.__version__, options.seed))
        for name, accuracy, weights in accuracies(options.seed):  # minutes: each as soon as it is known
            wanted = "(at least %.3f wanted)" % LEAST[name] if name in LEAST else ""
            console.print("%-20s accuracy %.4f, %d weights %s" % (name, accuracy, weights, wanted))


if __name__ == "__main__":
    main()
