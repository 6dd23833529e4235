"""Child interpreters for MNN's native code: a crash there ends the child and comes back as an error."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from typing import Dict, Sequence

from slimtrain.core import ConversionError

INSTALL_HINT = "python -m pip install 'MNN>=3.6'"
_LONGEST_QUOTE = 2000


class ChildCrashError(ConversionError):
    """A signal ended the child: native code broke down, it did not report an error."""


def require_mnn(module: str) -> None:
    """Raise ``ConversionError`` with the way to install MNN unless ``module`` is found; import nothing."""
    if importlib.util.find_spec(module) is None:
        raise ConversionError(
            f"MNN is not installed for {sys.executable} (no module {module}): run {INSTALL_HINT}"
        )


def run_child(arguments: Sequence[str], folder: str, timeout: float, task: str) -> str:
    """Run this interpreter with ``arguments`` in ``folder`` and return what it printed.

    Args:
        arguments: those after the name of the interpreter.
        folder: working folder of the child, a private one: native code leaves files there.
        timeout: seconds.
        task: what the child does, for errors: "converting model.onnx".

    Raises:
        ChildCrashError: ended by a signal.
        ConversionError: an exit status other than 0, or no end within ``timeout``.
    """
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=_environment(),
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise ConversionError(f"{task}: stopped, not done after {timeout:g} s") from error
    output = done.stdout.decode("utf-8", errors="replace")
    if done.returncode < 0:
        raise ChildCrashError(f"{task}: native code crashed with {_signal(-done.returncode)}{quote(output)}")
    if done.returncode:
        raise ConversionError(f"{task}: failed with exit status {done.returncode}{quote(output)}")
    return output


def quote(output: str) -> str:
    """The end of what a child printed, as the rest of an error message."""
    text = output.strip()[-_LONGEST_QUOTE:]
    return f"; it said:\n{text}" if text else ", without a word"


def _environment() -> Dict[str, str]:
    # What this process can import the child must find from another folder, also where sys.path is relative.
    return dict(os.environ, PYTHONPATH=os.pathsep.join(os.path.abspath(path) for path in sys.path))


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
