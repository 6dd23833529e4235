"""Every Python block of README and docs that is for TensorFlow runs."""
import numpy as np
import pytest

import tf_nets
from doc_blocks import code_of, pages_with
from tf_setup import tf


def build_model():
    """(loss, output) of a small network in the default graph, as a user has it."""
    x = tf.placeholder(tf.float32, [None, 8, 8, 3], name="image")
    label = tf.placeholder(tf.int64, [None], name="label")
    y = tf.nn.relu(tf_nets.conv(x, "c1", 8, seed=1))
    logits = tf.identity(tf_nets.dense(tf.reduce_mean(y, [1, 2]), "fc", 5, seed=2), name="logits")
    return tf.losses.sparse_softmax_cross_entropy(label, logits), logits


def names():
    """What the pages speak of as given."""
    random = np.random.RandomState(0)
    batches = [(random.rand(4, 8, 8, 3), random.randint(5, size=4)) for _ in range(3)]
    return {"build_model": build_model, "batches": batches, "__name__": "page",
            "feed": lambda images, labels: {"image:0": images, "label:0": labels}}


@pytest.mark.parametrize("page", pages_with("slimtrain.hooks"))
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = code_of(page, "slimtrain.hooks").replace("tf.disable_eager_execution()\n", "")  # tf_setup chose the mode
    exec(compile(code, page, "exec"), names())
