"""The Callback class of whichever Lightning package the user has: ``pytorch_lightning`` or ``lightning.pytorch``.

The two are separate class hierarchies. Where both are imported already, a callback of ours belongs to both.
"""
from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any, List

_PACKAGES = ("pytorch_lightning", "lightning.pytorch")


def _packages() -> List[Any]:
    names: List[str] = [name for name in _PACKAGES if name in sys.modules]
    if not names:
        names = [name for name in _PACKAGES if importlib.util.find_spec(name.partition(".")[0]) is not None][:1]
    if not names:
        raise ImportError("the callbacks need Lightning: pip install pytorch-lightning")
    return [importlib.import_module(name) for name in names]


def _base(name: str) -> Any:
    bases = tuple(getattr(package, name) for package in _packages())
    return bases[0] if len(bases) == 1 else type(name, bases, {})


Callback: Any = _base("Callback")
CombinedLoader: Any = importlib.import_module(_packages()[0].__name__ + ".utilities").CombinedLoader
