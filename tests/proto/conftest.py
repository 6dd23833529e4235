"""Models that several modules convert; made once, frameworks are slow to load."""

import pytest

from integer_pointwise import deploy
from sample_models import float_chain
from slimtrain.proto import convert


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A float model of three convolutions: a ``sample_models.Sample``."""
    return float_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="session")
def float_mnn(chain, tmp_path_factory):
    """The chain converted without parameters; its path."""
    path = str(tmp_path_factory.mktemp("float") / "chain.mnn")
    convert(chain.path, path)
    return path


@pytest.fixture(scope="session")
def deployed(tmp_path_factory):
    """An int8 model and what it must compute: an ``integer_pointwise.Deployed``."""
    return deploy(tmp_path_factory.mktemp("pointwise"))
