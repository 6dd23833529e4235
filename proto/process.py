"""Child interpreters for MNN's native code: a crash there ends the child, and reaches the caller as one clear error."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from typing import Dict, Sequence

from slimtrain.core import ConversionError

INSTALL_HINT = "python -m pip install 'MNN>=3.6'"
_TAIL = 2000


class ChildCrash(ConversionError):
    """A child was ended by a signal: native code failed, it did not report an error."""


def require_mnn(module: str) -> None:
    """Raise ``ConversionError`` with the line that installs MNN, unless ``module`` can be found; imports nothing."""
    if importlib.util.find_spec(module) is None:
        raise ConversionError("MNN is not installed for {} (no module {}): run {}".format(
            sys.executable, module, INSTALL_HINT))


def run_child(arguments: Sequence[str], folder: str, timeout: float, task: str) -> str:
    """Run this interpreter with ``arguments`` in ``folder`` and return what it printed.

    Args:
        arguments: after the name of the interpreter.
        folder: working folder of the child, of its own: native code may leave files there.
        timeout: seconds.
        task: what the child does, for errors: "converting model.onnx".

    Raises:
        ChildCrash: ended by a signal.
        ConversionError: an exit status other than 0, or no end within ``timeout``.
    """
    command = [sys.executable] + list(arguments)
    try:
        done = subprocess.run(command, cwd=folder, env=_environment(), timeout=timeout, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired as error:
        raise ConversionError("{}: not done after {:g} s, stopped".format(task, timeout)) from error
    output = done.stdout.decode("utf-8", errors="replace")
    if done.returncode < 0:
        raise ChildCrash("{}: native code crashed with {}{}".format(
            task, _signal_name(-done.returncode), _quote(output)))
    if done.returncode:
        raise ConversionError("{}: failed with exit status {}{}".format(task, done.returncode, _quote(output)))
    return output


def tail(text: str) -> str:
    """The end of a child's output, short enough for an error message."""
    return text.strip()[-_TAIL:]


def _quote(output: str) -> str:
    return "; it said:\n{}".format(tail(output)) if output.strip() else ""


def _environment() -> Dict[str, str]:
    # The child must find what this process can import, also where sys.path holds relative entries: its folder differs.
    paths = [os.path.abspath(path) for path in sys.path]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(paths))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "signal {}".format(number)
