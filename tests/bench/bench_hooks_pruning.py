"""Pruning in a TensorFlow session: what a step costs that only keeps zeros, and what pruning costs in accuracy.

    python tests/bench/bench_hooks_pruning.py [--rounds 12] [--seed 0] [--speed] [--accuracy] [--resource]

Speed: a ResNet-18 on 64x64 images, batch 8; steps with a hook and without take turns, the figures are ratios of
medians, of processor time and on the clock, which says less where others use the machine. Events run on one core and
are measured in its processor time. Accuracy: digits, a trained float net fine-tuned for 8 epochs with each hook, one
seed.
"""
import argparse
import functools
import os
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of numpy: threads that wait for each other would count as work

import numpy as np
import tensorflow.compat.v1 as tf
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import slimtrain.hooks as hooks
from slimtrain.core import save_sensitivity

HOOKS = ("SNIPLevelPruner", "SIMDOCPruner", "TaylorFOChannelPruner")
WARM_UP = 2
#: of processor time
LIMITS = {"finding ratios (s)": 0.15, "a pruning event (s)": 0.1, "a step that keeps zeros / float step": 1.03}
LEAST = {("SNIPLevelPruner", 0.5): 0.986, ("SNIPLevelPruner", 0.8): 0.984, ("SNIPLevelPruner", 0.9): 0.975,
         ("SIMDOCPruner", 0.5): 0.986, ("SIMDOCPruner", 0.8): 0.980, ("SIMDOCPruner", 0.9): 0.968,
         ("TaylorFOChannelPruner", 0.5): 0.985, ("TaylorFOChannelPruner", 0.8): 0.93}
TRAINING, BATCH = 1200, 32
STEPS_OF_EPOCH = TRAINING // BATCH


def conv(x, name, channels, size=3, stride=1, training=True):
    """A convolution with batch norm."""
    with tf.variable_scope(name):
        kernel = tf.get_variable("kernel", [size, size, x.shape.as_list()[-1], channels],
                                 initializer=tf.variance_scaling_initializer(2.0))
        x = tf.nn.conv2d(x, kernel, strides=[1, stride, stride, 1], padding="SAME", name="conv")
        return batch_norm(x, training)


def batch_norm(x, training=True):
    """With variables of the scope."""
    channels = x.shape.as_list()[-1]
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


def some_images(count):
    """Noise of 64x64, that could be fed with another."""
    images = np.random.RandomState(0).randn(count, 64, 64, 3).astype(np.float32)
    return tf.placeholder_with_default(images, images.shape)


def graph_of_training(hook_name):
    """A graph with the hook or without, in it the step that is counted, and the same without what hooks add to it."""
    graph = tf.Graph()
    with graph.as_default():
        tf.set_random_seed(0)
        scores = resnet18(some_images(8))
        hook = getattr(hooks, hook_name + "Hook")(prune_ratio_result_file="", sensitivity_steps=1)
        optimizer = tf.train.MomentumOptimizer(1e-3, 0.9)
        updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
        updates.append(optimizer.minimize(tf.reduce_mean(tf.square(scores - 1.0))))
        with tf.control_dependencies(updates):
            counted = tf.assign_add(tf.train.get_or_create_global_step(), 1).op
        plain = tf.group(*updates)
        hook.begin()
    return graph, plain, counted


def started(graph, threads):
    """A session with initialized variables."""
    with graph.as_default():
        init = tf.global_variables_initializer()
    session = tf.Session(graph=graph, config=tf.ConfigProto(intra_op_parallelism_threads=threads,
                                                            inter_op_parallelism_threads=threads))
    session.run(init)
    return session


def step_times(hook_name, rounds):
    """Median seconds of a step with hook and without, each on the clock and of all processors together.

    They take turns in one session, on the same variables: two sessions differ by several percent.
    """
    graph, *steps = graph_of_training(hook_name)
    times = []
    with started(graph, 2) as session:
        for number in range(WARM_UP + rounds):
            taken = {}
            for step in steps[::1 if number % 2 else -1]:
                begin = time.perf_counter(), time.process_time()
                session.run(step)
                taken[step] = time.perf_counter() - begin[0], time.process_time() - begin[1]
            times.append([taken[step] for step in steps])
    return np.median(times[WARM_UP:], axis=0)


def event_times(kind):
    """Processor seconds for finding ratios and for a pruning event (not the first one) on one core, medians of five."""
    times = []
    with tf.Graph().as_default() as graph, tempfile.TemporaryDirectory() as work:
        resnet18(some_images(2))
        path = os.path.join(work, "sensitivity.npy")
        random = np.random.RandomState(0)
        save_sensitivity(path, {v.op.name: random.exponential(size=v.shape.as_list()).astype(np.float32)
                                for v in tf.trainable_variables()})
        with started(graph, 1) as session:
            pruner = kind(path, graph, 0.5, total_pruning_iterations=6, prune_ratio_result_file="")
            pruner.do_pruning(session)
            for _ in range(5):
                moments = [time.process_time()]
                pruner.ratios(pruner.decide(pruner.given_scores, None, 1.0))
                moments.append(time.process_time())
                pruner.do_pruning(session)
                moments.append(time.process_time())
                times.append(np.diff(moments))
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
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", action="store_true", help="only that")
    parser.add_argument("--accuracy", action="store_true", help="only that")
    parser.add_argument("--resource", action="store_true", help="variables as TensorFlow 2 has them")
    options = parser.parse_args()
    tf.disable_v2_behavior()
    if options.resource:
        tf.enable_resource_variables()
    tf.logging.set_verbosity(tf.logging.ERROR)
    console = Console(width=100)
    if not options.accuracy:
        table = Table("hook", *("%s: %.2f" % limit for limit in LIMITS.items()), "on the clock", "a step",
                      title="TensorFlow %s, ResNet-18, at most wanted" % tf.__version__)
        for name in HOOKS:
            plain, pruned = step_times(name, options.rounds)
            on_the_clock, of_processors = pruned / plain
            figures = (*event_times(getattr(hooks, name)), of_processors, on_the_clock)
            table.add_row(name, *("%.3f" % figure for figure in figures), "%.0f ms" % (1e3 * pruned[0]))
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
