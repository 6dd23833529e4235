"""Results for people (tables) and for programs (dictionaries that JSON can hold)."""

from __future__ import annotations

import sys
from typing import Any, Dict, Iterator, List, Sequence, Tuple

from rich.table import Table
from rich.text import Text

from slimtrain.core import LayerCoverage
from slimtrain.proto.algorithms import PruneType
from slimtrain.proto.converter import Conversion
from slimtrain.proto.mnnfile import MnnModel
from slimtrain.proto.schema import CompressionAlgo, Message
from slimtrain.proto.validation import is_full, layer_name
from slimtrain.proto.verification import Verification

_RIGHT = ("weights", "share", "bits", "SQNR (dB)", "max error", "in output steps")


def model_rows(model: MnnModel) -> List[Dict[str, Any]]:
    """One dictionary per layer of a .mnn model."""
    return [dict(layer._asdict(), state=layer.state.value) for layer in model.layers]


def model_table(model: MnnModel) -> Table:
    """The layers of a .mnn model with their share of all weights."""
    total = sum(layer.parameters for layer in model.layers)
    rows = [
        (
            layer.name,
            layer.tensor,
            layer.kind,
            f"{layer.parameters:,}",
            _share(layer.parameters, total),
            layer.state.value + (", sparse" if layer.sparse else ""),
            str(layer.bits),
        )
        for layer in model.layers
    ]
    return _table(("layer", "output tensor", "kind", "weights", "share", "state", "bits"), rows)


def params_table(pipeline: Message) -> Table:
    """What a parameter file says, one row per spelling of a quantized layer and per pruned weight."""
    rows: List[Sequence[str]] = []
    for algorithm in pipeline.algo:
        if algorithm.type == CompressionAlgo.PRUNE:
            rows += _prune_rows(algorithm.prune_params)
        else:
            rows += [_quantize_row(layer) for layer in algorithm.quant_params.layer]
    return _table(("layer", "found by", "algorithm", "input", "weight", "output"), rows)


def conversion_dict(conversion: Conversion) -> Dict[str, Any]:
    """A conversion: file, bytes, coverage, and every layer."""
    asked = conversion.coverage.layers + conversion.weight_only.layers
    return {
        "path": conversion.path,
        "bytes": conversion.bytes,
        "coverage": conversion.coverage.fraction,
        "layers": [_layer_dict(layer) for layer in asked],
        "unasked": [_layer_dict(layer) for layer in conversion.unasked],
    }


def conversion_table(conversion: Conversion) -> Table:
    """Every layer with its share of all weights; what nobody asked for comes last."""
    groups = (
        ("int8", conversion.coverage.layers),
        ("weight only", conversion.weight_only.layers),
        ("-", conversion.unasked),
    )
    total = sum(layer.parameters for _, layers in groups for layer in layers)
    rows = [
        (
            layer.name,
            layer.kind,
            f"{layer.parameters:,}",
            _share(layer.parameters, total),
            layer.state.value,
            asked,
            layer.reason,
        )
        for asked, layers in groups
        for layer in layers
    ]
    return _table(("layer", "kind", "weights", "share", "state", "asked for", "why not"), rows)


def verification_dict(result: Verification) -> Dict[str, Any]:
    """A verification; the largest float stands for infinity, which JSON cannot express."""
    fields = {key: _finite(value) for key, value in result._asdict().items() if key != "outputs"}
    fields["outputs"] = [
        {key: _finite(value) for key, value in output._asdict().items()} for output in result.outputs
    ]
    return fields


def verification_table(result: Verification) -> Table:
    """One row per output."""
    rows = [
        (
            output.name,
            f"{output.sqnr_db:.1f}",
            f"{output.max_error:.3g}",
            "on no grid" if output.max_steps is None else f"{output.max_steps:.3g}",
        )
        for output in result.outputs
    ]
    return _table(("output", "SQNR (dB)", "max error", "in output steps"), rows)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table()
    for header in headers:
        table.add_column(header, overflow="fold", justify="right" if header in _RIGHT else "left")
    for row in rows:
        # As plain text: rich would take the brackets in "conv2[group 0]" for a style.
        table.add_row(*map(Text, row))
    return table


def _layer_dict(layer: LayerCoverage) -> Dict[str, Any]:
    return dict(layer._asdict(), state=layer.state.value)


def _share(part: int, total: int) -> str:
    return f"{part / max(total, 1):.1%}"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and abs(value) == float("inf"):
        return sys.float_info.max if value > 0 else -sys.float_info.max
    return value


def _quantize_row(layer: Message) -> Tuple[str, ...]:
    name = layer_name(layer)
    if is_full(layer):
        tensor = layer.output[0].name if layer.output else "nothing"
        return name, tensor, "int8", _side(layer.input), _side(layer.weight), _side(layer.output)
    weight = layer.weight[0] if layer.weight else None
    kind = f"{weight.bits} bits{', asymmetric' if weight.asymmetric else ''}" if weight else "missing"
    return name, f"operator {layer.op_name}", "weight only", "", kind, ""


def _side(entries: Sequence[Any]) -> str:
    if not entries or not entries[0].scales:
        return "missing"
    entry = entries[0]
    low, high = min(entry.scales), max(entry.scales)
    steps = f"{low:.4g}" if len(entry.scales) == 1 else f"{len(entry.scales)} x {low:.3g}..{high:.3g}"
    return f"{steps} in [{entry.clamp_min}, {entry.clamp_max}]"


def _prune_rows(params: Message) -> Iterator[Tuple[str, ...]]:
    kind = f"prune {PruneType(params.type).name}"
    for level in (params.level_pruner_params, params.simd_oc_pruner_params):
        # Other writers may leave lists out.
        count = len(level.weight_tensor_names)
        layers = list(level.layer_names) + [""] * count
        ratios = [f"{ratio:.1%} zeros" for ratio in level.prune_ratios] + [""] * count
        for tensor, layer, ratio in zip(level.weight_tensor_names, layers, ratios):
            yield layer or tensor, tensor, kind, "", ratio, ""
