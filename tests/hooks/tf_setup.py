"""TensorFlow for tests: one thread, quiet, and in the mode that ``SLIMTRAIN_TF_MODE`` names."""
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow.compat.v1 as tf

MODE = os.environ.get("SLIMTRAIN_TF_MODE", "reference")
if MODE not in ("reference", "resource"):
    raise ValueError("SLIMTRAIN_TF_MODE must be reference or resource, got {!r}".format(MODE))
IS_1 = tf.__version__.startswith("1.")
if MODE == "resource":
    tf.disable_eager_execution()
    tf.enable_resource_variables()
else:
    tf.disable_v2_behavior()
tf.logging.set_verbosity(tf.logging.ERROR)


def session(graph):
    """A session with one thread, so that sums have one order."""
    return tf.Session(graph=graph, config=one_thread())


def one_thread():
    return tf.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
