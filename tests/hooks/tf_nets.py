"""Networks of the tests, written with variables and functions that exist in every TensorFlow."""
import numpy as np

from tf_setup import tf


def variable(name, shape, seed, scale=None):
    values = np.random.RandomState(seed).randn(*shape) * (scale or np.prod(shape[:-1]) ** -0.5)
    return tf.get_variable(name, initializer=values.astype(np.float32))


def batch_norm(x, name, training, seed=0, momentum=0.9):
    """Batch norm as ``tf.layers`` builds it with a Python bool."""
    channels, random = x.shape.as_list()[-1], np.random.RandomState(seed)
    with tf.variable_scope(name):
        gamma = tf.get_variable("gamma", initializer=random.uniform(-1.5, 1.5, channels).astype(np.float32))
        beta = tf.get_variable("beta", initializer=(random.randn(channels) * 0.5).astype(np.float32))
        mean = tf.get_variable("moving_mean", initializer=np.zeros(channels, np.float32), trainable=False)
        var = tf.get_variable("moving_variance", initializer=np.ones(channels, np.float32), trainable=False)
        if not training:
            return tf.nn.fused_batch_norm(x, gamma, beta, mean, var, is_training=False, name="norm")[0]
        y, batch_mean, batch_var = tf.nn.fused_batch_norm(x, gamma, beta, is_training=True, name="norm")
        for average, batch in ((mean, batch_mean), (var, batch_var)):
            update = tf.assign_sub(average, (average.read_value() - batch) * (1 - momentum))
            tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, update)
        return y


def conv(x, name, outputs, kernel=3, stride=1, padding="SAME", bias=True, seed=0):
    w = variable(name + "/kernel", [kernel, kernel, x.shape.as_list()[-1], outputs], seed)
    y = tf.nn.conv2d(x, w, strides=[1, stride, stride, 1], padding=padding, name=name + "/conv")
    return tf.nn.bias_add(y, variable(name + "/bias", [outputs], seed + 1, 0.1), name=name + "/biased") if bias else y


def depthwise(x, name, kernel=3, stride=1, bias=False, seed=0):
    channels = x.shape.as_list()[-1]
    w = variable(name + "/kernel", [kernel, kernel, channels, 1], seed, 0.4)
    y = tf.nn.depthwise_conv2d(x, w, [1, stride, stride, 1], "SAME", name=name + "/depthwise")
    return tf.nn.bias_add(y, variable(name + "/bias", [channels], seed + 1, 0.3), name=name + "/biased") if bias else y


def dense(x, name, outputs, seed=0):
    w = variable(name + "/kernel", [x.shape.as_list()[-1], outputs], seed)
    return tf.nn.bias_add(tf.matmul(x, w, name=name + "/matmul"), variable(name + "/bias", [outputs], seed + 1, 0.1),
                          name=name + "/biased")


def plain_net(x, training):
    y = tf.nn.relu(conv(x, "c1", 8, seed=1), name="r1")
    y = tf.nn.relu(conv(y, "c2", 8, stride=2, seed=3), name="r2")
    return conv(y, "c3", 6, padding="VALID", seed=5)


def mobile_net(x, training, classes=130):
    """Batch norm, depthwise, ReLU6, a residual sum, and a product of 512 features with more than 65536 weights."""
    y = tf.nn.relu6(batch_norm(conv(x, "c1", 8, stride=2, bias=False, seed=1), "b1", training, 2))
    y = tf.nn.relu6(batch_norm(depthwise(y, "d1", seed=3), "bd1", training, 4))
    short = batch_norm(conv(y, "p1", 8, 1, bias=False, seed=5), "bp1", training, 6)
    y = tf.nn.relu6(batch_norm(conv(short, "e2", 16, 1, bias=False, seed=7), "be2", training, 8))
    y = depthwise(y, "d2", seed=9, bias=True)
    y = batch_norm(conv(y, "p2", 8, 1, bias=False, seed=11), "bp2", training, 12)
    y = tf.nn.relu(tf.add(y, short))
    y = tf.nn.relu(conv(y, "last", 512, 1, seed=13))
    y = tf.reduce_mean(y, [1, 2])
    return tf.nn.relu(dense(y, "fc", classes, seed=15))


def wide_net(x, training):
    return mobile_net(x, training, 1000)


def pool_net(x, training):
    y = conv(x, "c1", 8, seed=1)
    y = tf.nn.max_pool(y, 2, 2, "SAME")
    y = conv(y, "c2", 8, seed=3)
    y = tf.nn.avg_pool(y, 2, 2, "SAME") + tf.nn.max_pool(y, 3, 2, "SAME")
    y = tf.nn.relu(conv(y, "c3", 8, seed=5))
    size = y.shape.as_list()[1]
    y = tf.nn.avg_pool(y, size, 1, "VALID")
    y = tf.nn.relu(dense(tf.reshape(y, [-1, 8]), "f1", 12, seed=7))
    return dense(y, "f2", 5, seed=9)
