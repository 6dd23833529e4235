"""Scales for the tensors of a quantized ONNX model that is taken over: those of the file, where MNN can have them."""
from __future__ import annotations

from typing import Dict, List, Mapping, Sequence, Set, Tuple

import numpy as np

from slimtrain.core import LayerCall, Quantizer
from slimtrain.proto.deployed import DeployedLayer
from slimtrain.proto.onnx_deciding import TensorScale
from slimtrain.proto.onnx_graph import OnnxGraph
from slimtrain.proto.onnx_qdq_parts import FileGrid
from slimtrain.proto.onnx_rewrite import Rewritten
from slimtrain.proto.onnx_zero_points import with_zero_points


def choose_scales(structure: Rewritten, ranges: Mapping[str, FileGrid], keep_zero_points: bool) -> Tuple[
        Dict[Quantizer, TensorScale], List[str]]:
    """The scale and levels of each quantized tensor, and remarks where they are not those of the file.

    Args:
        structure: the model, its layers written as convolutions.
        ranges: the grids of the file, by tensor.
        keep_zero_points: where MNN computes exactly with them.
    """
    placement = structure.placement
    found: Dict[Quantizer, Dict[str, FileGrid]] = {}
    for name, owner in placement.on_grid.items():
        if name in ranges:
            found.setdefault(owner, {})[name] = ranges[name]
    kept = with_zero_points(OnnxGraph(structure.model), placement) if keep_zero_points else set()
    kept -= {call.output for call in placement.calls if call.output in found and _loses_its_zero_point(
        call, structure.layers, found[call.output])}
    tensors, remarks, widened = {}, [], []
    for owner, grids in found.items():
        wanted = _common(list(grids.values()))
        tensors[owner] = wanted.as_it_is() if wanted.is_symmetric or owner in kept else wanted.symmetric()
        if len(set(grids.values())) > 1:
            remarks.append("%s share one scale in MNN, in the file they have %d" % (
                ", ".join(sorted(grids)), len(set(grids.values()))))
        if not wanted.is_symmetric and owner not in kept:
            widened.append(min(grids))
    if widened:
        remarks.append("%d activations have unsigned levels or a zero point in the file, with which MNN does not "
                       "compute what reads them; they get the symmetric grid over the same range, whose steps are up "
                       "to twice as wide: %s" % (
                           len(widened), ", ".join(widened[:8]) + ("..." if len(widened) > 8 else "")))
    used: Set[Quantizer] = set(placement.quantizers.values())
    return {owner: value for owner, value in tensors.items() if owner in used}, remarks


def _common(grids: Sequence[FileGrid]) -> FileGrid:
    """One grid for tensors that share their scale: the widest, or one over all of them where none holds all."""
    low = min(grid.lower * grid.scale for grid in grids)
    high = max(grid.upper * grid.scale for grid in grids)
    for grid in sorted(grids):
        if grid.lower * grid.scale <= low and grid.upper * grid.scale >= high:
            return grid
    if all(grid.is_symmetric for grid in grids):
        return max(grids, key=lambda grid: max(-grid.lower, grid.upper) * grid.scale)
    scale = float(np.float32((high - low) / 255))
    lower = int(np.round(low / scale))
    return FileGrid(scale, lower, lower + 255)


def _loses_its_zero_point(call: LayerCall, layers: Mapping[str, DeployedLayer], grids: Mapping[str, FileGrid]) -> bool:
    """Whether the 6 of a ReLU6 cuts so much off a grid that it would need no zero point any more."""
    common = _common(list(grids.values()))
    relu6 = layers[call.tensor].activation == "relu6"
    return relu6 and not common.is_symmetric and common.is_symmetric_below_6
