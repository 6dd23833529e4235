"""Pruning in a TensorFlow session: what a step costs that only keeps zeros, and what pruning costs in accuracy.

    python tests/bench/bench_hooks_pruning.py [--rounds 15] [--seed 0] [--speed] [--accuracy]

Speed: a ResNet-18 on 64x64 images, batch 8; steps of the float graph and of a pruned one take turns, the figures are
ratios of medians; processor time says more than the clock where others use the machine. Accuracy: digits, a trained
float net fine-tuned for 8 epochs with each hook, one seed.
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
from sklearn.datasets import load_digits

import slimtrain.hooks as hooks

HOOKS = ("SNIPLevelPruner", "SIMDOCPruner", "TaylorFOChannelPruner")
WORST_STEP = 1.03
LEAST = {("SNIPLevelPruner", 0.5): 0.986, ("SNIPLevelPruner", 0.8): 0.984, ("SNIPLevelPruner", 0.9): 0.975,
         ("SIMDOCPruner", 0.5): 0.986, ("SIMDOCPruner", 0.8): 0.980, ("SIMDOCPruner", 0.9): 0.968,
         ("TaylorFOChannelPruner", 0.5): 0.985, ("TaylorFOChannelPruner", 0.8): 0.93}
TRAINING, BATCH = 1200, 32
STEPS_OF_EPOCH = TRAINING // BATCH


def conv(x, name, channels, size=3, stride=1, training=True):
    """A convolution with batch norm."""
    inputs = x.shape.as_list()[-1]
    with tf.variable_scope(name):
        kernel = tf.get_variable("kernel", [size, size, inputs, channels],
                                 initializer=tf.variance_scaling_initializer(2.0))
        x = tf.nn.conv2d(x, kernel, strides=[1, stride, stride, 1], padding="SAME", name="conv")
        gamma = tf.get_variable("gamma", [channels], initializer=tf.ones_initializer())
        beta = tf.get_variable("beta", [channels], initializer=tf.zeros_initializer())
        mean = tf.get_variable("mean", [channels], initializer=tf.zeros_initializer(), trainable=False)
        variance = tf.get_variable("variance", [channels], initializer=tf.ones_initializer(), trainable=False)
        if not training:
            return tf.nn.fused_batch_norm(x, gamma, beta, mean, variance, is_training=False)[0]
        x, *statistics = tf.nn.fused_batch_norm(x, gamma, beta, is_training=True)[:3]
        for average, value in zip((mean, variance), statistics):
            tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, tf.assign_sub(average, (average.read_value() - value) * 0.1))
    return x


def dense(x, name, units):
    """A product with bias."""
    with tf.variable_scope(name):
        shape = [x.shape.as_list()[-1], units]
        kernel = tf.get_variable("kernel", shape, initializer=tf.variance_scaling_initializer())
        bias = tf.get_variable("bias", [units], initializer=tf.zeros_initializer())
        return tf.matmul(x, kernel, name="matmul") + bias


# --- speed ------------------------------------------------------------------------------------------------


def resnet18(x):
    """ResNet-18 with 11 million weights."""
    x = tf.nn.max_pool(tf.nn.relu(conv(x, "stem", 64, 7, 2)), 3, 2, "SAME")
    for index, (channels, stride) in enumerate(zip((64, 64, 128, 128, 256, 256, 512, 512), (1, 1, 2, 1, 2, 1, 2, 1))):
        name = "block%d" % index
        y = conv(tf.nn.relu(conv(x, name + "a", channels, 3, stride)), name + "b", channels)
        same = stride == 1 and x.shape.as_list()[-1] == channels
        x = tf.nn.relu(y + (x if same else conv(x, name + "s", channels, 1, stride)))
    return dense(tf.reduce_mean(x, [1, 2]), "head", 1000)


class Stepper:
    """Makes training steps of a graph, with a pruner hook or without."""

    def __init__(self, name):
        graph = tf.Graph()
        with graph.as_default():
            tf.set_random_seed(0)
            images = np.random.RandomState(0).randn(8, 64, 64, 3).astype(np.float32)
            scores = resnet18(tf.placeholder_with_default(images, images.shape))
            hook = getattr(hooks, name + "Hook")(prune_ratio_result_file="", sensitivity_steps=1) if name else None
            step = tf.train.get_or_create_global_step()
            with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
                self.train = tf.train.MomentumOptimizer(1e-3, 0.9).minimize(
                    tf.reduce_mean(tf.square(scores - 1.0)), global_step=step)
            if hook is not None:
                hook.begin()
            init = tf.global_variables_initializer()
        threads = tf.ConfigProto(intra_op_parallelism_threads=2, inter_op_parallelism_threads=2)
        self.session = tf.Session(graph=graph, config=threads)
        self.session.run(init)

    def seconds(self):
        """Of one step: on the clock, and of all processors together."""
        begin = time.perf_counter(), time.process_time()
        self.session.run(self.train)
        return time.perf_counter() - begin[0], time.process_time() - begin[1]


def speed(name, rounds):
    """Median seconds of a step, float and pruned, each on the clock and of processors; the two take turns."""
    steppers = Stepper(""), Stepper(name)
    for stepper in steppers:  # the first run plans the graph; for a pruner it is also the event
        stepper.seconds()
    times = [[stepper.seconds() for stepper in steppers] for _ in range(rounds)]
    for stepper in steppers:
        stepper.session.close()
    return np.median(times, axis=0)


# --- accuracy ---------------------------------------------------------------------------------------------


def data():
    """1200 training and 597 test images [N, 8, 8, 1] in 0..1 with their labels."""
    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    images, labels = (digits.images[order, :, :, None] / 16).astype(np.float32), digits.target[order]
    return images[:TRAINING], labels[:TRAINING], images[TRAINING:], labels[TRAINING:]


def digits_net(x, training):
    """Four 3x3 convolutions with batch norm and ReLU, 61 thousand weights."""
    for index, (channels, stride) in enumerate(((16, 1), (32, 2), (64, 1), (64, 2))):
        x = tf.nn.relu(conv(x, "c%d" % index, channels, 3, stride, training))
    return tf.identity(dense(tf.reduce_mean(x, [1, 2]), "head", 10), name="scores")


def fit(seed, epochs, rate, folder, make_hook=None):
    """Train by SGD with momentum, weight decay and a cosine schedule; returns the sparsity."""
    images, labels, _, _ = data()
    steps = epochs * STEPS_OF_EPOCH
    with tf.Graph().as_default():
        tf.set_random_seed(seed)
        x, wanted = tf.placeholder(tf.float32, [None, 8, 8, 1], name="x"), tf.placeholder(tf.int64, [None])
        scores = digits_net(x, True)
        hook = make_hook(train_steps=steps) if make_hook else None
        loss = tf.losses.sparse_softmax_cross_entropy(wanted, scores)
        loss += 5e-5 * tf.add_n([tf.reduce_sum(tf.square(v)) for v in tf.trainable_variables()])
        step = tf.train.get_or_create_global_step()
        with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
            train = tf.train.MomentumOptimizer(tf.train.cosine_decay(rate, step, steps), 0.9).minimize(
                loss, global_step=step)
        random = np.random.RandomState(seed)
        with tf.train.MonitoredTrainingSession(
                checkpoint_dir=folder, hooks=[hook] if hook else [], save_checkpoint_steps=steps,
                save_summaries_steps=None, save_summaries_secs=None, log_step_count_steps=None,
                config=tf.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)) as run:
            for _ in range(epochs):
                order = random.permutation(TRAINING)
                for start in range(0, STEPS_OF_EPOCH * BATCH, BATCH):
                    chosen = order[start:start + BATCH]
                    run.run(train, {x: images[chosen], wanted: labels[chosen]})
            sparsity = run.run(hook.pruner.sparsity) if hasattr(hook, "pruner") else 0.0
    return float(sparsity)


def accuracy_of(folder):
    """Of the net in a checkpoint."""
    _, _, images, labels = data()
    with tf.Graph().as_default():
        x = tf.placeholder(tf.float32, [None, 8, 8, 1])
        scores = digits_net(x, False)
        with tf.Session() as run:
            tf.train.Saver().restore(run, tf.train.latest_checkpoint(folder))
            return float((run.run(scores, {x: images}).argmax(1) == labels).mean())


def accuracies(seed):
    """Rows (algorithm, asked, reached, accuracy); the first is the float net."""
    with tempfile.TemporaryDirectory() as work:
        start = os.path.join(work, "float")
        fit(seed, 20, 0.05, start)
        yield "float", 0.0, 0.0, accuracy_of(start)
        for name in HOOKS:
            for sparsity in (0.5, 0.8, 0.9):
                folder = os.path.join(work, "%s %g" % (name, sparsity))
                make_hook = functools.partial(
                    getattr(hooks, name + "Hook"), sparsity=sparsity, total_pruning_iterations=10,
                    prune_finetune_iterations=None, end=1 / 3, prune_ratio_result_file="", output_names=["scores"],
                    export_dir=folder, init_checkpoint=start)
                reached = fit(seed, 8, 0.01, folder, make_hook)
                yield name, sparsity, reached, accuracy_of(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", action="store_true", help="only that")
    parser.add_argument("--accuracy", action="store_true", help="only that")
    options = parser.parse_args()
    tf.disable_v2_behavior()
    tf.logging.set_verbosity(tf.logging.ERROR)
    console = Console(width=100)
    if not options.accuracy:
        table = Table("hook", "a step", "of the float step", "of its processor time",
                      title="TensorFlow %s, ResNet-18: at most %.2f wanted" % (tf.__version__, WORST_STEP))
        for name in HOOKS:
            plain, pruned = speed(name, options.rounds)
            table.add_row(name, "%.0f ms" % (pruned[0] * 1e3), *("%.3f" % ratio for ratio in pruned / plain))
        console.print(table)
    if not options.speed:
        console.print("TensorFlow %s, digits, seed %d" % (tf.__version__, options.seed))
        for name, sparsity, reached, accuracy in accuracies(options.seed):  # minutes: each as soon as it is known
            least = LEAST.get((name, sparsity))
            wanted = "" if least is None else "(at least %.3f wanted)" % least
            console.print("%-22s asked %.2f reached %.4f accuracy %.4f %s" % (
                name, sparsity, reached, accuracy, wanted))


if __name__ == "__main__":
    main()
