"""Pruning of a digits classifier in a ``MonitoredTrainingSession``, down to a small file for MNN.

A small residual network is trained in float; then a pruner hook takes weights, blocks or channels out of it while it
trains on. MNN converts and runs what the hook exported; a table says what that changed, and a picture shows for each
layer how sensitive its weights are and how many of them are gone.

    python examples/digits_pruning_session.py [--pruner SIMDOCPruner] [--sparsity 0.8] [--out out/pruning-tf]

Runs on TensorFlow 1.15 and on 2.x.
"""
import argparse
import json
import os
import shutil
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow.compat.v1 as tf
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import slimtrain.hooks as hooks
from slimtrain.core import sqnr_db
from slimtrain.proto import ConvertOptions, convert, run_model

BATCH, SEED = 64, 7
OUTPUT = "logits/scores"
PRUNERS = ("SNIPLevelPruner", "SIMDOCPruner", "TaylorFOChannelPruner")


def load_images():
    """Digits as float32 [N, 8, 8, 1] in 0..1: training images and labels, test images and labels."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    order = np.random.RandomState(SEED).permutation(len(images))
    images, labels = images[order], digits.target[order]
    return images[360:], labels[360:], images[:360], labels[:360]


def conv(x, name, channels, size=3, stride=1):
    """A convolution with bias."""
    shape = [size, size, x.shape.as_list()[-1], channels]
    kernel = tf.get_variable(name + "/kernel", shape, initializer=tf.variance_scaling_initializer(2.0, seed=SEED))
    bias = tf.get_variable(name + "/bias", [channels], initializer=tf.zeros_initializer())
    y = tf.nn.conv2d(x, kernel, strides=[1, stride, stride, 1], padding="SAME", name=name + "/conv")
    return tf.nn.bias_add(y, bias, name=name + "/biased")


def dense(x, name, units):
    """A matrix product with bias."""
    kernel = tf.get_variable(name + "/kernel", [x.shape.as_list()[-1], units],
                             initializer=tf.variance_scaling_initializer(2.0, seed=SEED))
    bias = tf.get_variable(name + "/bias", [units], initializer=tf.zeros_initializer())
    return tf.nn.bias_add(tf.matmul(x, kernel, name=name + "/matmul"), bias, name=name + "/scores")


def network(x):
    """A residual block, a wide layer, and two dense layers."""
    y = tf.nn.relu(conv(x, "stem", 32))
    y = tf.nn.relu(y + conv(tf.nn.relu(conv(y, "left", 32)), "right", 32))
    y = tf.nn.relu(conv(y, "wide", 64, stride=2))
    y = tf.nn.relu(dense(tf.reshape(y, [-1, 4 * 4 * 64]), "hidden", 64))
    return dense(y, "logits", 10)


def train(folder, data, steps, rate, make_hook=None):
    """Train in a monitored session; returns the pruner's report, if there is a pruner."""
    images, labels = data
    rows = []
    with tf.Graph().as_default():
        tf.set_random_seed(SEED)
        x = tf.placeholder(tf.float32, [None, 8, 8, 1], name="image")
        wanted = tf.placeholder(tf.int64, [None], name="label")
        logits = network(x)
        made = [make_hook(train_steps=steps)] if make_hook else []
        loss = tf.losses.sparse_softmax_cross_entropy(wanted, logits)
        step = tf.train.get_or_create_global_step()
        update = tf.train.AdamOptimizer(tf.train.cosine_decay(rate, step, steps)).minimize(loss, global_step=step)

        class Report(tf.train.SessionRunHook):
            def end(self, session):
                rows.extend(made[0].pruner.report(session) if made else [])

        random = np.random.RandomState(SEED)
        with tf.train.MonitoredTrainingSession(
                checkpoint_dir=folder, hooks=made + [Report()], save_checkpoint_steps=steps,
                save_summaries_steps=20, log_step_count_steps=None) as session:
            for _ in range(steps):
                chosen = random.randint(len(images), size=BATCH)
                session.run(update, {x: images[chosen], wanted: labels[chosen]})
    return rows


def freeze(checkpoint, path):
    """A frozen graph of the float network."""
    with tf.Graph().as_default() as graph:
        network(tf.placeholder(tf.float32, [None, 8, 8, 1], name="image"))
        with tf.Session() as session:
            tf.train.Saver().restore(session, tf.train.latest_checkpoint(checkpoint))
            frozen = tf.graph_util.convert_variables_to_constants(session, graph.as_graph_def(), [OUTPUT])
    with open(path, "wb") as file:
        file.write(frozen.SerializeToString())


def run_frozen(path, images):
    """The scores of a frozen graph in TensorFlow."""
    graph_def = tf.GraphDef()
    with open(path, "rb") as file:
        graph_def.ParseFromString(file.read())
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        with tf.Session(graph=graph) as session:
            return session.run(OUTPUT + ":0", {"image:0": images})


def deploy(stem, images, labels, params=None):
    """Convert with 8-bit weights, without storing zeros, and run: figures."""
    conversion = convert(stem + ".pb", stem + ".mnn", params, ConvertOptions(weight_bits=8, sparse=params is not None))
    (scores,) = run_model(stem + ".mnn", {"image": images}).values()
    wanted = run_frozen(stem + ".pb", images)
    return {"accuracy": float((scores.argmax(1) == labels).mean()), "bytes": conversion.bytes,
            "accuracy_tensorflow": float((wanted.argmax(1) == labels).mean()), "sqnr_db": sqnr_db(wanted, scores)}


def draw(path, rows, checkpoint):
    """For each layer the spread of its sensitivities, and the share of its weights that is gone."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    reader = tf.train.load_checkpoint(checkpoint)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    names = [row.name.split("/")[0] for row in rows]
    spreads = []
    for name in names:
        scores = reader.get_tensor("MNN_PRUNE/{}/kernel/sensitivity".format(name)).ravel()
        spreads.append(np.log10(scores[scores > 0]))
    left.violinplot(spreads, showmedians=True)
    left.set_xticks(range(1, len(names) + 1))
    left.set_xticklabels(names)
    left.set_title("sensitivity where it is not zero, log10 |w dL/dw|")
    right.bar(names, [row.ratio for row in rows])
    right.set_ylim(0, 1)
    right.set_title("share of weights pruned")
    figure.tight_layout()
    figure.savefig(path)


def main():
    """Train, prune, export, convert, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pruner", choices=PRUNERS, default="SIMDOCPruner")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=400, help="of each of the two trainings")
    parser.add_argument("--out", default=os.path.join("out", "pruning-tf"))
    options = parser.parse_args()
    tf.disable_v2_behavior()
    tf.logging.set_verbosity(tf.logging.ERROR)
    os.makedirs(options.out, exist_ok=True)
    work = tempfile.mkdtemp(prefix="digits-")
    images, labels, test_images, test_labels = load_images()
    dense_checkpoint, checkpoint = os.path.join(work, "float"), os.path.join(options.out, "checkpoint")
    shutil.rmtree(checkpoint, ignore_errors=True)
    train(dense_checkpoint, (images, labels), options.steps, 2e-3)
    freeze(dense_checkpoint, os.path.join(options.out, "float.pb"))

    def make_hook(train_steps):
        return getattr(hooks, options.pruner + "Hook")(
            sparsity=options.sparsity, total_pruning_iterations=5, prune_finetune_iterations=None, end=0.5,
            train_steps=train_steps, prune_ratio_result_file=os.path.join(options.out, "found_prune_ratios.yml"),
            output_names=[OUTPUT], export_dir=options.out, init_checkpoint=dense_checkpoint)

    rows = train(checkpoint, (images, labels), options.steps, 5e-4, make_hook)
    params = os.path.join(options.out, "model.compress_params.bin")
    total = sum(row.parameters for row in rows)
    report = {
        "tensorflow": tf.__version__, "pruner": options.pruner, "asked": options.sparsity,
        "sparsity": sum(row.ratio * row.parameters for row in rows) / total,
        "float": deploy(os.path.join(options.out, "float"), test_images, test_labels),
        "pruned": deploy(os.path.join(options.out, "model"), test_images, test_labels, params),
        "layers": [row._asdict() for row in rows]}
    draw(os.path.join(options.out, "report.png"), rows, checkpoint)
    with open(os.path.join(options.out, "report.json"), "w") as file:
        json.dump(report, file, indent=2)
    shutil.rmtree(work)
    show(report, options.out)


def show(report, out):
    """Print the tables."""
    title = "digits, TensorFlow {tensorflow}, {pruner}: {sparsity:.1%} of the weights are gone"
    table = Table(title=title.format(**report))
    for title in ("", "accuracy", "accuracy in MNN", "bytes of the .mnn", "dB"):
        table.add_column(title, justify="right" if title else "left")
    for key in ("float", "pruned"):
        row = report[key]
        table.add_row(key, "{accuracy_tensorflow:.4f}".format(**row), "{accuracy:.4f}".format(**row), str(row["bytes"]),
                      "{sqnr_db:.0f}".format(**row))
    layers = Table("layer", "weights", "pruned", "why not more")
    for row in report["layers"]:
        layers.add_row(row["name"], str(row["parameters"]), "{:.1%}".format(row["ratio"]), row["reason"])
    Console().print(table)
    Console().print(layers)
    Console().print("written: {0}/report.json, {0}/report.png, {0}/model.mnn".format(out))


if __name__ == "__main__":
    main()
