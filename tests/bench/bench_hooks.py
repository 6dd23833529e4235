"""Time of a training step with each quantizer over that of the float step, in one process, interleaved.

    python tests/bench/bench_hooks.py [--rounds 25] [--json FILE]

The network is eight 3x3 convolutions with batch norm and ReLU, batch 8, 64x64. Steps of all graphs take turns, so that
whatever else the machine does hits all of them; the figures are ratios of medians, of wall time and of the time that
the process itself computed.
"""
import argparse
import json
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow.compat.v1 as tf

import slimtrain.hooks as hooks

QUANTIZERS = ("LSQ", "EMA", "OAQ")
CHANNELS = (16, 16, 32, 32, 32, 64, 64, 64)
LIMITS = {"1": {"LSQ": 1.45, "EMA": 1.45, "OAQ": 1.6}, "2": {"LSQ": 1.35, "EMA": 1.35, "OAQ": 1.6}}


def network(x):
    for index, channels in enumerate(CHANNELS):
        shape = [3, 3, x.shape.as_list()[-1], channels]
        kernel = tf.get_variable("k%d" % index, shape, initializer=tf.variance_scaling_initializer(2.0))
        x = tf.nn.conv2d(x, kernel, strides=1 if index % 3 else 2, padding="SAME") if index else tf.nn.conv2d(
            x, kernel, strides=1, padding="SAME")
        gamma = tf.get_variable("g%d" % index, [channels], initializer=tf.ones_initializer())
        beta = tf.get_variable("b%d" % index, [channels], initializer=tf.zeros_initializer())
        moving = [tf.get_variable("%s%d" % (name, index), [channels], trainable=False) for name in ("mean", "variance")]
        x, *statistics = tf.nn.fused_batch_norm(x, gamma, beta, is_training=True)[:3]
        for average, batch in zip(moving, statistics):
            tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, tf.assign_sub(average, (average.read_value() - batch) * 0.1))
        x = tf.nn.relu(x)
    return tf.reduce_mean(x, [1, 2])


def stepper(name):
    """A function that makes one training step; ``name`` is a quantizer or empty."""
    graph = tf.Graph()
    with graph.as_default():
        images = np.random.RandomState(0).randn(8, 64, 64, 3).astype(np.float32)
        features = network(tf.placeholder_with_default(images, images.shape))
        loss = tf.reduce_mean(tf.square(features - 1.0))
        quantizer = getattr(hooks, name + "Quantizer")(graph, True) if name else None
        with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
            train = tf.train.MomentumOptimizer(1e-3, 0.9).minimize(loss)
        init = tf.global_variables_initializer()
    threads = tf.ConfigProto(intra_op_parallelism_threads=2, inter_op_parallelism_threads=2)
    session = tf.Session(graph=graph, config=threads)
    session.run(init)

    def step():
        session.run(train)
        if quantizer is not None:
            quantizer.update(session)

    return step


def measure(rounds):
    """Median seconds of a step by name, wall and own; the float step is called "float"."""
    steps = {"float": stepper("")}
    steps.update((name, stepper(name)) for name in QUANTIZERS)
    times = {name: [] for name in steps}
    for number in range(rounds + 3):
        for name, step in steps.items():
            begin = time.perf_counter(), time.process_time()
            step()
            if number >= 3:
                times[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return {name: np.median(values, axis=0) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json")
    options = parser.parse_args()
    if os.environ.get("SLIMTRAIN_TF_MODE") == "resource":
        tf.disable_eager_execution()
    else:
        tf.disable_v2_behavior()
    seconds = measure(options.rounds)
    limits = LIMITS[tf.__version__[0]]
    ratios = {name: seconds[name] / seconds["float"] for name in QUANTIZERS}
    result = {"tensorflow": tf.__version__, "float_ms": seconds["float"][0] * 1e3,
              "ratios": {name: float(ratio[0]) for name, ratio in ratios.items()},
              "own_time_ratios": {name: float(ratio[1]) for name, ratio in ratios.items()}, "limits": limits}
    for name, ratio in ratios.items():
        print("TensorFlow {} {}: {:.2f} x the float step (at most {:.2f} wanted), {:.2f} x its own time".format(
            tf.__version__, name, ratio[0], limits[name], ratio[1]))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
