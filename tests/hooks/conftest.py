"""Fixtures of every test with TensorFlow."""
import pytest

from tf_setup import tf


@pytest.fixture(autouse=True)
def own_default_graph():
    """What a test leaves in the default graph must not reach the next test of the same process."""
    with tf.Graph().as_default():
        yield
