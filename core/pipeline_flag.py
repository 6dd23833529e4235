"""The flag ``--compress``, for argparse and what builds on it (LightningCLI), and for absl (``tf.app.flags``)."""
from __future__ import annotations

import argparse
from typing import Any

from slimtrain.core.pipeline import Pipeline, PipelineError
from slimtrain.core.pipeline_text import load_pipeline

HELP = ("what to compress: a pipeline file (compress.yaml), or one line like "
        "'prune:simd_oc,sparsity=0.6;quantize:lsq,bits=8'")


def add_compress_flag(parser: Any, name: str = "--compress") -> None:
    """Add a flag whose value is a :class:`slimtrain.core.Pipeline`, or None where it is not given.

    Args:
        parser: an ``argparse.ArgumentParser``, or a group of one.
        name: of the flag.
    """
    parser.add_argument(name, type=compress_argument, default=None, metavar="PIPELINE", help=HELP)


def define_compress_flag(flags: Any, name: str = "compress") -> None:
    """Define a flag whose value is the text of a pipeline, checked when flags are parsed; None where it is not given.

    Args:
        flags: the module ``absl.flags``, or ``tf.app.flags``, which is the same.
        name: of the flag.
    """
    flags.DEFINE_string(name, None, HELP)

    def is_pipeline(text: Any) -> bool:
        if text:
            try:
                load_pipeline(text)
            except PipelineError as error:
                raise flags.ValidationError(str(error)) from error
        return True

    flags.register_validator(name, is_pipeline)


def compress_argument(text: str) -> Pipeline:
    """The ``type`` of such a flag.

    Raises:
        argparse.ArgumentTypeError: it is no pipeline; argparse shows the message.
    """
    try:
        return load_pipeline(text)
    except PipelineError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
