"""The version as a constant: Python 3.7 has no ``importlib.metadata``, a source tree no metadata at all."""

VERSION = "0.1.0"
