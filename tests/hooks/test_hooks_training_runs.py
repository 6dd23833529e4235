"""Which runs train: those that compute gradients or change what is learned, whatever form the fetches have."""
import collections

import numpy as np
import pytest

import tf_nets
from slimtrain.hooks import LSQQuantizer
from slimtrain.hooks.training_runs import TrainingRuns
from tf_setup import tf


@pytest.fixture(scope="module")
def trained():
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [2, 8, 8, 3], name="x")
        y = tf.reduce_mean(tf_nets.batch_norm(tf_nets.conv(x, "c", 4), "bn", True), name="y")
        LSQQuantizer(graph)
        step = tf.train.get_or_create_global_step()
        gradients = tf.gradients(y, tf.trainable_variables())
        update = tf.train.AdamOptimizer().apply_gradients(zip(gradients, tf.trainable_variables()), global_step=step)
        kernel = tf.trainable_variables()[0]
        search = tf.assign_add(kernel, tf.random_normal(kernel.shape))  # an evolution strategy has no gradients
        averages = tf.group(*tf.get_collection(tf.GraphKeys.UPDATE_OPS))
        counted = tf.assign_add(step, 1)
        ragged = tf.RaggedTensor.from_row_splits(tf.reshape(y, [1]), [0, 1])
        rows = tf.IndexedSlices(gradients[0], tf.range(3))
        yield graph, dict(y=y, step=step, update=update, gradients=gradients, kernel=kernel, search=search,
                          averages=averages, counted=counted, ragged=ragged, rows=rows)


Pair = collections.namedtuple("Pair", "one other")


@pytest.mark.parametrize("fetch, wanted", [
    (lambda made: made["update"], True),
    (lambda made: [made["y"], made["update"]], True),
    (lambda made: {"loss": made["y"], "train": (made["step"], made["update"])}, True),
    (lambda made: Pair(made["y"], {"deep": [made["update"]]}), True),
    (lambda made: made["update"].name, True),
    (lambda made: made["gradients"], True),
    (lambda made: made["search"], True),
    (lambda made: made["counted"], True),
    (lambda made: made["y"], False),
    (lambda made: "y:0", False),
    (lambda made: "y", False),
    (lambda made: [made["y"], made["step"], made["kernel"]], False),
    (lambda made: made["averages"], False),
    (lambda made: tf.SparseTensorValue(made["y"], made["y"], made["y"]), False),
    (lambda made: made["ragged"], False),
    (lambda made: made["rows"], True),
    (lambda made: [], False),
    (lambda made: None, False),
])
def test_what_trains(trained, fetch, wanted):
    graph, made = trained
    runs = TrainingRuns(graph)
    for _ in range(2):
        assert runs.trains(fetch(made)) is wanted


def test_replicas_that_hand_in_gradients_train():
    with tf.Graph().as_default() as graph:
        y = tf.reduce_mean(tf_nets.conv(tf.placeholder(tf.float32, [2, 8, 8, 3]), "c", 4))
        LSQQuantizer(graph)
        optimizer = tf.train.SyncReplicasOptimizer(tf.train.GradientDescentOptimizer(0.1), 2)
        update = optimizer.minimize(y, global_step=tf.train.get_or_create_global_step())
        assert TrainingRuns(graph).trains(update)
        assert not TrainingRuns(graph).trains(y)


def test_a_fetch_of_another_graph_is_refused_as_a_session_does(trained):
    with tf.Graph().as_default():
        foreign = tf.constant(np.float32(1))
    with pytest.raises((ValueError, KeyError)):
        TrainingRuns(trained[0]).trains(foreign)
