"""Numbers that change in training, remembered in bounded memory."""
from __future__ import annotations

from typing import Any, Dict, List, Mapping, Tuple

from slimtrain.core.compression_report import Curve

_MOST = 200


class History:
    """Curves of numbers over steps; where they become long, every second point goes."""

    def __init__(self, most: int = _MOST) -> None:
        if most < 2:
            raise ValueError("most must be at least 2, got %r" % (most,))
        self._most = most
        self._stride = 1
        self._points: List[Tuple[int, Dict[str, float]]] = []

    def wants(self, step: int) -> bool:
        """Whether the numbers of this step would be remembered; ask before they are computed."""
        return step % self._stride == 0 and (not self._points or self._points[-1][0] < step)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Remember numbers by name, at a step that is wanted; others are ignored."""
        if not self.wants(step):
            return
        self._points.append((step, dict(numbers)))
        while len(self._points) > self._most:
            self._stride *= 2
            self._points = [point for point in self._points if point[0] % self._stride == 0]

    def curves(self) -> Dict[str, Curve]:
        """A curve for each name."""
        curves: Dict[str, Curve] = {}
        for name in {name: None for _, numbers in self._points for name in numbers}:
            points = [(step, numbers[name]) for step, numbers in self._points if name in numbers]
            steps, values = zip(*points)
            curves[name] = Curve(steps, values)
        return curves

    def state_dict(self) -> Dict[str, Any]:
        """Plain lists, numbers and dicts of them."""
        return {"stride": self._stride, "points": [[step, dict(numbers)] for step, numbers in self._points]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._stride = int(state["stride"])
        self._points = [(int(step), dict(numbers)) for step, numbers in state["points"]]
