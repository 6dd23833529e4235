"""Quantization-aware training of a digits classifier in a ``MonitoredTrainingSession``, down to int8 in MNN.

A small residual network is trained in float, then for a few epochs with ``LSQQuantizerHook``, which leaves a frozen
graph and its ``compress_params.bin`` behind. MNN converts and runs them; the table at the end says what that changed.

    python examples/digits_monitored_session.py [--out out/demo-tf]

Runs on TensorFlow 1.15 and on 2.x.
"""
import argparse
import json
import os
import shutil
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow.compat.v1 as tf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits

from slimtrain.core import sqnr_db
from slimtrain.hooks import LSQQuantizer, LSQQuantizerHook
from slimtrain.proto import convert, measure_latency, read_params, run_model

BATCH, FLOAT_STEPS, QAT_STEPS, SEED = 64, 500, 200, 7
OUTPUT = "logits/scores"


def load_images():
    """Digits as float32 [N, 8, 8, 1] in 0..1: training images and labels, test images and labels."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    order = np.random.RandomState(SEED).permutation(len(images))
    images, labels = images[order], digits.target[order]
    return images[360:], labels[360:], images[:360], labels[:360]


def conv(x, name, channels, size=3, stride=1):
    """A convolution without bias."""
    shape = [size, size, x.shape.as_list()[-1], channels]
    kernel = tf.get_variable(name + "/kernel", shape, initializer=tf.variance_scaling_initializer(2.0, seed=SEED))
    return tf.nn.conv2d(x, kernel, strides=[1, stride, stride, 1], padding="SAME", name=name + "/conv")


def depthwise(x, name, stride=1):
    """A 3x3 depthwise convolution without bias."""
    kernel = tf.get_variable(name + "/kernel", [3, 3, x.shape.as_list()[-1], 1],
                             initializer=tf.random_normal_initializer(0.0, 0.4, seed=SEED))
    return tf.nn.depthwise_conv2d(x, kernel, [1, stride, stride, 1], "SAME", name=name + "/depthwise")


def batch_norm(x, name, training, momentum=0.9):
    """Fused batch norm; in training its moving averages are updated through ``UPDATE_OPS``."""
    channels = x.shape.as_list()[-1]
    with tf.variable_scope(name):
        gamma = tf.get_variable("gamma", [channels], initializer=tf.ones_initializer())
        beta = tf.get_variable("beta", [channels], initializer=tf.zeros_initializer())
        mean = tf.get_variable("moving_mean", [channels], initializer=tf.zeros_initializer(), trainable=False)
        variance = tf.get_variable("moving_variance", [channels], initializer=tf.ones_initializer(), trainable=False)
        if not training:
            return tf.nn.fused_batch_norm(x, gamma, beta, mean, variance, is_training=False, name="norm")[0]
        y, batch_mean, batch_variance = tf.nn.fused_batch_norm(x, gamma, beta, is_training=True, name="norm")
        for average, batch in ((mean, batch_mean), (variance, batch_variance)):
            tf.add_to_collection(tf.GraphKeys.UPDATE_OPS,
                                 tf.assign_sub(average, (average.read_value() - batch) * (1 - momentum)))
    return y


def dense(x, name, units):
    """A matrix product with bias."""
    kernel = tf.get_variable(name + "/kernel", [x.shape.as_list()[-1], units],
                             initializer=tf.variance_scaling_initializer(2.0, seed=SEED))
    bias = tf.get_variable(name + "/bias", [units], initializer=tf.zeros_initializer())
    return tf.nn.bias_add(tf.matmul(x, kernel, name=name + "/matmul"), bias, name=name + "/scores")


def network(x, training):
    """A residual block, a depthwise-separable block with ReLU6, and two dense layers."""
    y = tf.nn.relu(batch_norm(conv(x, "stem", 16), "stem_norm", training))
    z = tf.nn.relu(batch_norm(conv(y, "left", 16), "left_norm", training))
    y = tf.nn.relu(batch_norm(conv(z, "right", 16), "right_norm", training) + y)
    y = tf.nn.relu6(batch_norm(conv(y, "expand", 32, 1), "expand_norm", training))
    y = tf.nn.relu6(batch_norm(depthwise(y, "separate", 2), "separate_norm", training))
    y = batch_norm(conv(y, "project", 32, 1), "project_norm", training)
    y = tf.reshape(tf.nn.relu(y), [-1, 4 * 4 * 32])
    return dense(tf.nn.relu(dense(y, "hidden", 128)), "logits", 10)


def train(folder, images, labels, steps, rate, progress, title, make_hooks=None):
    """Train in a monitored session; returns the last checkpoint."""
    with tf.Graph().as_default():
        tf.set_random_seed(SEED)
        x = tf.placeholder(tf.float32, [None, 8, 8, 1], name="image")
        wanted = tf.placeholder(tf.int64, [None], name="label")
        logits = network(x, training=True)
        hooks = make_hooks() if make_hooks else []  # before the optimizer: gradients go through what it inserts
        loss = tf.losses.sparse_softmax_cross_entropy(wanted, logits)
        step = tf.train.get_or_create_global_step()
        with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
            decayed = tf.train.cosine_decay(rate, step, steps)
            update = tf.train.AdamOptimizer(decayed).minimize(loss, global_step=step)
        bar = progress.add_task(title, total=steps)
        random = np.random.RandomState(SEED)
        with tf.train.MonitoredTrainingSession(checkpoint_dir=folder, hooks=hooks, save_checkpoint_steps=100,
                                               save_summaries_steps=None, save_summaries_secs=None,
                                               log_step_count_steps=None) as session:
            for _ in range(steps):
                chosen = random.randint(len(images), size=BATCH)
                session.run(update, {x: images[chosen], wanted: labels[chosen]})
                progress.advance(bar)
    return tf.train.latest_checkpoint(folder)


def test(checkpoint, images, labels, quantized):
    """Restore into a test graph: (accuracy, scores, scores in integer arithmetic if ``quantized``)."""
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None, 8, 8, 1], name="image")
        logits = network(x, training=False)
        quantizer = LSQQuantizer(graph, is_training=False, output_names=[OUTPUT]) if quantized else None
        with tf.Session() as session:
            tf.train.Saver().restore(session, checkpoint)
            scores = session.run(logits, {x: images})
            simulated = quantizer.simulate(session, [OUTPUT], {x: images})[0] if quantizer else None
            return accuracy(scores, labels), scores, simulated


def export_float(checkpoint, path):
    """A frozen graph of the float network."""
    with tf.Graph().as_default() as graph:
        network(tf.placeholder(tf.float32, [None, 8, 8, 1], name="image"), training=False)
        with tf.Session() as session:
            tf.train.Saver().restore(session, checkpoint)
            frozen = tf.graph_util.convert_variables_to_constants(session, graph.as_graph_def(), [OUTPUT])
    with open(path, "wb") as file:
        file.write(frozen.SerializeToString())


def accuracy(scores, labels):
    """Share of the images whose highest score is that of their label."""
    return float((np.argmax(scores, axis=1) == labels).mean())


def deploy(stem, images, labels, params=None):
    """Convert and run in MNN: scores and figures."""
    conversion = convert(stem + ".pb", stem + ".mnn", params)
    (scores,) = run_model(stem + ".mnn", {"image": images}).values()
    return scores, {"accuracy": accuracy(scores, labels), "bytes": os.path.getsize(stem + ".mnn"),
                    "ms": measure_latency(stem + ".mnn", {"image": images[:1]}),
                    "coverage": conversion.coverage.fraction}


def draw(path, params, scores, simulated):
    """A picture: the steps of each layer, and what int8 scores differ by from the simulated ones."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    layers = {layer.input[0].name: layer for layer in read_params(params).algo[0].quant_params.layer}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    left.bar(range(len(layers)), [layer.output[0].scales[0] for layer in layers.values()])
    left.set_xticks(range(len(layers)))
    left.set_xticklabels(list(layers), rotation=60, ha="right", fontsize=7)
    left.set_title("output step of each layer")
    right.hist((scores - simulated).ravel(), bins=41)
    right.set_title("MNN int8 minus simulation, logits")
    figure.tight_layout()
    figure.savefig(path)


def main():
    """Train, export, convert, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=os.path.join("out", "demo-tf"))
    out = parser.parse_args().out
    tf.disable_v2_behavior()
    tf.logging.set_verbosity(tf.logging.ERROR)
    os.makedirs(out, exist_ok=True)
    started, work = time.time(), tempfile.mkdtemp(prefix="digits-")
    images, labels, test_images, test_labels = load_images()
    with Progress() as progress:
        float_checkpoint = train(os.path.join(work, "float"), images, labels, FLOAT_STEPS, 3e-3, progress, "float")
        qat_checkpoint = train(
            os.path.join(work, "int8"), images, labels, QAT_STEPS, 5e-4, progress, "fine-tuning in int8",
            lambda: [LSQQuantizerHook(is_training=True, output_names=[OUTPUT], export_dir=out,
                                      init_checkpoint=float_checkpoint)])
    export_float(float_checkpoint, os.path.join(out, "float.pb"))
    float_accuracy, _, _ = test(float_checkpoint, test_images, test_labels, quantized=False)
    fake_accuracy, fake, simulated = test(qat_checkpoint, test_images, test_labels, quantized=True)
    _, float_mnn = deploy(os.path.join(out, "float"), test_images, test_labels)
    params = os.path.join(out, "model.compress_params.bin")
    scores, int8_mnn = deploy(os.path.join(out, "model"), test_images, test_labels, params)
    report = {
        "tensorflow": tf.__version__, "coverage": int8_mnn["coverage"],
        "sqnr_db": min(sqnr_db(simulated, scores), 300.0), "sqnr_fake_quant_db": min(sqnr_db(fake, scores), 300.0),
        "accuracy": {"float": float_accuracy, "fake_quant": fake_accuracy, "mnn_float": float_mnn["accuracy"],
                     "mnn_int8": int8_mnn["accuracy"]},
        "bytes": {"mnn_float": float_mnn["bytes"], "mnn_int8": int8_mnn["bytes"]},
        "ms": {"mnn_float": float_mnn["ms"], "mnn_int8": int8_mnn["ms"]}, "seconds": time.time() - started}
    with open(os.path.join(out, "report.json"), "w") as file:
        json.dump(report, file, indent=2)
    draw(os.path.join(out, "report.png"), params, scores, simulated)
    shutil.rmtree(work)
    show(report, out)


def show(report, out):
    """Print the table."""
    table = Table(title="digits, TensorFlow {tensorflow}: coverage {coverage:.0%}, MNN int8 against its simulation "
                        "{sqnr_db:.0f} dB".format(**report))
    for title in ("", "accuracy", "bytes", "ms"):
        table.add_column(title, justify="right" if title else "left")
    for key, title in (("float", "TensorFlow float"), ("fake_quant", "TensorFlow fake quant"),
                       ("mnn_float", "MNN float"), ("mnn_int8", "MNN int8")):
        table.add_row(title, "{:.4f}".format(report["accuracy"][key]), str(report["bytes"].get(key, "")),
                      "{:.3f}".format(report["ms"][key]) if key in report["ms"] else "")
    Console().print(table)
    Console().print("written: {0}/report.json, {0}/report.png, {0}/model.mnn".format(out))


if __name__ == "__main__":
    main()
