"""The version, as a constant: Python 3.7 has no ``importlib.metadata``, and a source tree has no metadata at all."""

VERSION = "0.1.0"
