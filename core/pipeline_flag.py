"""The flag ``--compress`` for command lines made with argparse, or with what builds on it, as LightningCLI."""
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


def compress_argument(text: str) -> Pipeline:
    """The ``type`` of such a flag.

    Raises:
        argparse.ArgumentTypeError: it is no pipeline; argparse shows the message.
    """
    try:
        return load_pipeline(text)
    except PipelineError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
