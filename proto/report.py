"""Results for people (tables) and for programs (dictionaries that JSON can hold)."""

from __future__ import annotations

import sys
from typing import Any, Dict, Iterable, List, Sequence, Tuple

from google.protobuf.message import Message
from rich.table import Table
from rich.text import Text

from slimtrain.core import LayerCoverage
from slimtrain.proto.converter import Conversion
from slimtrain.proto.layers import PruneType
from slimtrain.proto.mnnfile import MnnModel
from slimtrain.proto.schema import CompressionAlgo
from slimtrain.proto.validation import is_full, layer_name
from slimtrain.proto.verify import Verification


def model_rows(model: MnnModel) -> List[Dict[str, Any]]:
    """One dictionary per layer of a .mnn model."""
    return [{"name": layer.name, "tensor": layer.tensor, "kind": layer.kind, "parameters": layer.parameters,
             "state": layer.state.value, "bits": layer.bits, "sparse": layer.sparse} for layer in model.layers]


def model_table(model: MnnModel) -> Table:
    """The layers of a .mnn model with their share of all weights."""
    total = sum(layer.parameters for layer in model.layers)
    rows = [(layer.name, layer.tensor, layer.kind, "{:,}".format(layer.parameters),
             _percent(layer.parameters, total), layer.state.value + (", sparse" if layer.sparse else ""),
             str(layer.bits)) for layer in model.layers]
    return _table(("layer", "output tensor", "kind", "weights", "share", "state", "bits"), rows)


def params_table(pipeline: Message) -> Table:
    """The layers that a parameter file speaks of, one row per spelling."""
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
    return {"path": conversion.path, "bytes": conversion.bytes, "coverage": conversion.coverage.fraction,
            "layers": [_layer_dict(layer) for layer in asked],
            "unasked": [_layer_dict(layer) for layer in conversion.unasked]}


def conversion_table(conversion: Conversion) -> Table:
    """Every layer with its share of all weights; what nobody asked for comes last."""
    groups = (("int8", conversion.coverage.layers), ("weight only", conversion.weight_only.layers),
              ("-", conversion.unasked))
    total = sum(layer.parameters for _, layers in groups for layer in layers)
    rows = [(layer.name, layer.kind, "{:,}".format(layer.parameters), _percent(layer.parameters, total),
             layer.state.value, asked, layer.reason) for asked, layers in groups for layer in layers]
    return _table(("layer", "kind", "weights", "share", "state", "asked for", "why not"), rows)


def verification_dict(result: Verification) -> Dict[str, Any]:
    """A verification; the largest float stands for infinity, which JSON cannot express."""
    outputs = [{key: _finite(value) for key, value in output._asdict().items()} for output in result.outputs]
    fields = {key: _finite(value) for key, value in result._asdict().items() if key != "outputs"}
    return dict(fields, outputs=outputs)


def verification_table(result: Verification) -> Table:
    """One row per output."""
    rows = [(output.name, "{:.1f}".format(output.sqnr_db), "{:.3g}".format(output.max_error),
             "not on a grid" if output.max_steps is None else "{:.3g}".format(output.max_steps))
            for output in result.outputs]
    return _table(("output", "SQNR (dB)", "max error", "in output steps"), rows)


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table()
    for header in headers:
        table.add_column(header, overflow="fold",
                         justify="right" if header in ("weights", "share", "bits", "SQNR (dB)") else "left")
    for row in rows:
        # Plain text: rich would take the brackets in "conv2[group 0]" for a style.
        table.add_row(*map(Text, row))
    return table


def _layer_dict(layer: LayerCoverage) -> Dict[str, Any]:
    return dict(layer._asdict(), state=layer.state.value)


def _percent(part: int, total: int) -> str:
    return "{:.1f} %".format(100.0 * part / total if total else 0.0)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and abs(value) == float("inf"):
        return sys.float_info.max if value > 0 else -sys.float_info.max
    return value


def _quantize_row(layer: Message) -> Tuple[str, str, str, str, str, str]:
    weight = layer.weight[0] if layer.weight else None
    if is_full(layer):
        return (layer_name(layer), layer.output[0].name if layer.output else "-", "int8",
                _side(layer.input), _side(layer.weight), _side(layer.output))
    bits = "{} bits{}".format(weight.bits, ", asymmetric" if weight.asymmetric else "") if weight else "-"
    return layer_name(layer), "operator {}".format(layer.op_name), "weight only", "", bits, ""


def _side(entries: Sequence[Any]) -> str:
    if not entries or not entries[0].scales:
        return "missing"
    entry = entries[0]
    low, high = min(entry.scales), max(entry.scales)
    scales = "{:.4g}".format(low) if len(entry.scales) == 1 else "{} x {:.3g}..{:.3g}".format(
        len(entry.scales), low, high)
    return "{} in [{}, {}]".format(scales, entry.clamp_min, entry.clamp_max)


def _prune_rows(params: Message) -> Iterable[Tuple[str, str, str, str, str, str]]:
    kind = "prune " + PruneType(params.type).name
    for level in (params.level_pruner_params, params.simd_oc_pruner_params):
        for index, tensor in enumerate(level.weight_tensor_names):
            name = level.layer_names[index] if index < len(level.layer_names) else tensor
            share = "{:.1%} zeros".format(level.prune_ratios[index]) if index < len(level.prune_ratios) else ""
            yield name, tensor, kind, "", share, ""
