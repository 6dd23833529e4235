"""The Callback class of whichever Lightning package the user has: ``pytorch_lightning`` or ``lightning.pytorch``.

The two are separate class hierarchies. Where both are imported already, a callback of ours belongs to both.
"""
from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any, List

_PACKAGES = ("pytorch_lightning", "lightning.pytorch")


def _callback_base() -> Any:
    packages: List[str] = [name for name in _PACKAGES if name in sys.modules]
    if not packages:
        packages = [name for name in _PACKAGES if importlib.util.find_spec(name.partition(".")[0]) is not None][:1]
    if not packages:
        raise ImportError("the callbacks need Lightning: pip install pytorch-lightning")
    bases = tuple(importlib.import_module(name).Callback for name in packages)
    return bases[0] if len(bases) == 1 else type("Callback", bases, {})


Callback: Any = _callback_base()
