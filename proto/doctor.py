"""What is installed, which parts of slimtrain work with it, and what to install for the rest."""

from __future__ import annotations

import sys
import tempfile
from typing import List, NamedTuple, Optional, Tuple

import click
from rich.table import Table
from rich.text import Text

from slimtrain.core import ConversionError
from slimtrain.proto.printing import CHECK_FAILED, fail, print_table
from slimtrain.proto.process import INSTALL_HINT, run_child
from slimtrain.proto.version import VERSION

if sys.version_info >= (3, 8):
    from importlib.metadata import PackageNotFoundError, version
else:
    from importlib_metadata import PackageNotFoundError, version

_PACKAGES = (
    "numpy", "protobuf", "PyYAML", "click", "rich", "MNN", "onnx", "onnxruntime", "torch", "pytorch-lightning",
    "lightning", "tensorflow", "tensorflow-cpu", "matplotlib",
)  # fmt: skip
_SECONDS = 120


class Part(NamedTuple):
    """A part of slimtrain, by what a user does with it."""

    name: str
    code: str     #: a program that ends well where the part works
    install: str  #: the command that brings what it lacks


_PARTS = (
    Part("parameter files, pipelines", "import slimtrain.core, slimtrain.proto", "pip install slimtrain"),
    Part("converting, running, verifying", "import MNN, _tools, slimtrain.proto", INSTALL_HINT),
    Part(
        "PyTorch: plain loops",
        "import onnx, torch, slimtrain.callbacks",
        "pip install 'slimtrain[torch]'",
    ),
    Part(
        "PyTorch: Lightning callbacks",
        "from slimtrain.callbacks import LSQQuantizerCallback; LSQQuantizerCallback()",
        "pip install 'slimtrain[torch]'",
    ),
    Part("TensorFlow: objects and hooks", "import slimtrain.hooks", "pip install 'slimtrain[tf]'"),
)


class Finding(NamedTuple):
    """Whether a part works."""

    part: Part
    problem: str  #: the last line of what went wrong; "" where it works


def installed() -> List[Tuple[str, Optional[str]]]:
    """The packages that matter, with their versions; None where one is missing."""
    return [(name, _version(name)) for name in _PACKAGES]


def examine(part: Part) -> Finding:
    """Try a part in an interpreter of its own: a broken package may end the whole process."""
    try:
        with tempfile.TemporaryDirectory(prefix="slimtrain-") as folder:
            run_child(["-c", part.code], folder, _SECONDS, "import")
    except ConversionError as error:
        return Finding(part, str(error).strip().splitlines()[-1])
    return Finding(part, "")


@click.command("doctor")
def doctor() -> None:
    """Show what is installed, which parts work, and what to install for the rest."""
    packages = Table("package", "version", title=f"slimtrain {VERSION}, Python {sys.version.split()[0]}")
    for name, found in installed():
        packages.add_row(name, found or "-")
    print_table(packages)
    parts = Table("part", "works", "problem", "to mend it")
    findings = [examine(part) for part in _PARTS]
    for part, problem in findings:
        # as Text: rich would take the brackets of an extra for markup
        parts.add_row(part.name, "no" if problem else "yes", Text(problem), Text(part.install if problem else ""))
    print_table(parts)
    if findings[0].problem:
        fail("slimtrain itself does not work here", CHECK_FAILED)


def _version(name: str) -> Optional[str]:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
