"""Networks with channels that depend on each other, and a short training with a pruner hook."""
import os

import numpy as np

import tf_nets
from tf_setup import one_thread, session, tf


def flat_net(x, training):
    """Pools, a residual sum, features counted by hand for a product, a scale per channel."""
    y = tf.nn.relu(tf_nets.batch_norm(tf_nets.conv(x, "c1", 16, bias=False, seed=1), "b1", training, 2))
    z = tf.nn.relu(tf_nets.conv(y, "c2", 16, seed=3))
    y = tf.nn.max_pool(y + tf_nets.conv(z, "c3", 16, seed=5), 2, 2, "SAME")
    y = tf_nets.conv(y, "c4", 12, 1, seed=7) * tf.get_variable("scale", initializer=np.ones(12, np.float32))
    y = tf.reshape(tf.nn.avg_pool(y, 2, 2, "VALID"), [-1, 3 * 3 * 12])
    return tf_nets.dense(tf.nn.relu(tf_nets.dense(y, "f1", 20, seed=9)), "f2", 5, seed=11)


def shuffle_net(x, training):
    """A split in two, a depthwise branch, a channel shuffle."""
    y = tf.nn.relu(tf_nets.conv(x, "c1", 32, stride=2, seed=1))
    a, b = tf.split(y, 2, 3)
    b = tf.nn.relu(tf_nets.conv(b, "c2", 16, 1, seed=3))
    b = tf_nets.batch_norm(tf_nets.depthwise(b, "d", seed=4), "bn", training)
    y = tf.concat([a, tf.nn.relu6(b)], 3)
    y = tf.reshape(tf.transpose(tf.reshape(y, [-1, 6, 6, 2, 16]), [0, 1, 2, 4, 3]), [-1, 6, 6, 32])
    y = tf.reduce_mean(tf.nn.relu(tf_nets.conv(y, "c3", 24, seed=5)), [1, 2])
    return tf_nets.dense(y, "f", 5, seed=9)


def dense_net(x, training):
    """Concatenations that several layers read."""
    y = tf.nn.relu(tf_nets.conv(x, "c1", 12, stride=2, seed=1))
    y = tf.concat([y, tf.nn.relu(tf_nets.conv(y, "c2", 12, seed=3))], 3)
    y = tf.concat([y, tf.nn.relu(tf_nets.conv(y, "c3", 12, seed=5))], 3)
    y = tf_nets.batch_norm(tf_nets.conv(y, "c4", 16, 1, bias=False, seed=7), "b4", training, 8)
    return tf_nets.conv(tf.pad(tf.nn.relu(y), [[0, 0], [1, 1], [1, 1], [0, 0]]), "c5", 6, padding="VALID", seed=9)


def images(number, count=4):
    return np.random.RandomState(number).randn(count, 12, 12, 3).astype(np.float32)


def prune(net, hook_class, folder, steps=4, **arguments):
    """Train some steps: (values of all variables, name of the output, hook, stem of the export)."""
    with tf.Graph().as_default():
        x = tf.placeholder(tf.float32, [None, 12, 12, 3], name="x")
        y = net(x, True)
        hook = hook_class(output_names=[y.name], export_dir=str(folder), sensitivity_steps=2,
                          prune_ratio_result_file="", **arguments)
        step = tf.train.get_or_create_global_step()
        with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
            train = tf.train.MomentumOptimizer(0.01, 0.9).minimize(tf.reduce_mean(tf.square(y - 1.0)),
                                                                   global_step=step)
        with tf.train.MonitoredTrainingSession(hooks=[hook], config=one_thread()) as run:
            for number in range(steps):
                run.run(train, {x: images(number)})
            values = run.run({v.op.name: v for v in tf.global_variables()})
    return values, y.name, hook, os.path.join(str(folder), "model")


def inference(net, values, x):
    """The outputs of the network built for inference, with these values of its variables."""
    with tf.Graph().as_default() as graph:
        image = tf.placeholder(tf.float32, [None, 12, 12, 3], name="x")
        y = net(image, False)
        with session(graph) as run:
            run.run(tf.global_variables_initializer())
            for variable in tf.global_variables():
                variable.load(values[variable.op.name], run)
            return run.run(y, {image: x})


def read_graph(path):
    graph_def = tf.GraphDef()
    with open(path, "rb") as file:
        graph_def.ParseFromString(file.read())
    return graph_def


def run_graph(graph_def, output, x):
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        with session(graph) as run:
            return run.run(output, {"x:0": x})


def weights_in(graph_def):
    """Number of float values in constants of two or more dimensions."""
    arrays = [tf.make_ndarray(node.attr["value"].tensor) for node in graph_def.node if node.op == "Const"]
    return sum(array.size for array in arrays if array.ndim >= 2 and array.dtype == np.float32)
