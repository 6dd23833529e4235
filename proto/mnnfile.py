"""What is in a .mnn file: its operators with weights, how each is stored, and who writes which tensor.

MNN's own tool turns the file into JSON.  Weights make up nearly all of that text and only their number is of interest,
so the numbers are dropped line by line before the rest is parsed.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple, Union

from slimtrain.core import ConversionError, LayerState
from slimtrain.proto.process import require_mnn, run_child, tail

PathLike = Union[str, "os.PathLike[str]"]

# Through this module the wheel's converter runs without its wrapper script, which would install and call a logger
# of its maker over the network.
CONVERTER_MODULE = "_tools"
CONVERTER_CODE = "import sys, _tools; _tools.mnnconvert(sys.argv[1:])"
_WHOLE_ARRAYS = re.compile(r'"(weight|bias|buffer|alpha|index|float32s|int8s|uint8s|int32s|external)": \n$')
# Strings first, so that a tensor called "nan" keeps its name.
_STRING_OR_NOT_FINITE = re.compile(r'"(?:[^"\\]|\\.)*"|(-?)\b(nan|inf)\b')
_JSON_SPELLING = {"nan": "NaN", "inf": "Infinity"}
# IDSTQuan.type of weights that are compressed, but not quantized: sparse floats, half floats.
_FLOAT_BITS = {0: 32, 3: 16}
_MOVES = ("ConvertTensor", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Permute", "Transpose")
_CONVOLUTIONS = ("Convolution", "ConvolutionDepthwise", "Deconvolution", "DeconvolutionDepthwise")


class MnnLayer(NamedTuple):
    """An operator with weights of its own.

    ``name`` is the operator's, ``tensor`` that of its output; ``kind`` the converter's word for its type;
    ``parameters`` counts weights without biases; ``bits`` is how wide one is stored; ``scales`` is the number of weight
    scales or, for blocks and minima, values stored in their place; ``inputs`` counts the operator's input tensors;
    ``sparse`` tells whether zeros are left out of the file.
    """

    name: str
    tensor: str
    kind: str
    parameters: int
    state: LayerState
    bits: int
    channels: int
    scales: int
    inputs: int
    sparse: bool


class MnnModel(NamedTuple):
    """A converted model.

    ``layers``: operators with weights in the order of execution.  ``writers``: the kind of operator that writes each
    tensor.  ``steps``: the scale of every tensor known to lie on a grid, to six decimals (all that the dump prints).
    """

    layers: Tuple[MnnLayer, ...]
    writers: Dict[str, str]
    steps: Dict[str, float]


def inspect_model(path: PathLike, timeout: float = 600.0) -> MnnModel:
    """Read a .mnn file.

    Raises:
        ConversionError: no such file, MNN is missing, or the file is no .mnn model.
    """
    require_mnn(CONVERTER_MODULE)
    source = os.path.abspath(os.fspath(path))
    if not os.path.isfile(source):
        raise ConversionError("no such model: {}".format(source))
    with tempfile.TemporaryDirectory(prefix="slimtrain-") as folder:
        target = os.path.join(folder, "model.json")
        output = run_child(["-c", CONVERTER_CODE, "mnnconvert", "-f", "MNN", "--modelFile", source,
                            "--JsonFile", target], folder, timeout, "reading {}".format(source))
        if not os.path.isfile(target) or not os.path.getsize(target):
            raise ConversionError("{} is not a .mnn model; the converter said:\n{}".format(source, tail(output)))
        with open(target, encoding="utf-8", errors="replace") as lines:
            return parse_dump(lines, source)


def parse_dump(lines: Iterable[str], source: str = "model") -> MnnModel:
    """The model in the converter's JSON, given line by line.

    Raises:
        ConversionError: another form than this converter is known to write.
    """
    text = _STRING_OR_NOT_FINITE.sub(_spell, "".join(_without_numbers(lines)))
    try:
        net = json.loads(text)
        graphs = [(net["oplists"], net["tensorName"], net.get("extraTensorDescribe", []))]
        graphs += [(graph["nodes"], graph["tensors"], graph.get("extraTensorDescribe", []))
                   for graph in net.get("subgraphs", ())]
        layers: List[MnnLayer] = []
        writers: Dict[str, str] = {}
        steps: Dict[str, float] = {}
        for nodes, tensors, described in graphs:
            layers += _layers(nodes, tensors)
            writers.update({tensors[index]: node["type"] for node in nodes for index in node.get("outputIndexes", ())})
            steps.update(_steps(nodes, tensors, described))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConversionError("{}: cannot read the converter's JSON of this model: {!r}".format(
            source, error)) from error
    return MnnModel(tuple(layers), writers, steps)


def _without_numbers(lines: Iterable[str]) -> Iterable[str]:
    """``lines`` with every array of ``_WHOLE_ARRAYS`` replaced by its length."""
    previous = ""
    for line in lines:
        if _WHOLE_ARRAYS.search(previous) and line.startswith("[") and line.rstrip().endswith("]"):
            line = "{}\n".format(line.count(",") + 1 if line.strip(" []\n") else 0)
        previous = line
        yield line


def _spell(match: Any) -> str:
    return match.group(1) + _JSON_SPELLING[match.group(2)] if match.group(2) else match.group(0)


def _layers(nodes: List[Dict[str, Any]], tensors: List[str]) -> List[MnnLayer]:
    layers = []
    constants: Dict[int, int] = {}
    for node in nodes:
        if node["type"] == "Const" and node.get("outputIndexes"):
            constants[node["outputIndexes"][0]] = _elements(node["main"])
        layer = _layer(node, tensors, constants)
        if layer is not None:
            layers.append(layer)
    return layers


def _steps(nodes: List[Dict[str, Any]], tensors: List[str], described: List[Dict[str, Any]]) -> Dict[str, float]:
    """Scales by tensor, handed on by operators that only move numbers: a linear layer ends with a Reshape."""
    steps = {tensors[entry["index"]]: entry["quantInfo"]["scale"] for entry in described if entry.get("quantInfo")}
    for node in nodes:
        if node["type"] in _MOVES and tensors[node["inputIndexes"][0]] in steps:
            steps.setdefault(tensors[node["outputIndexes"][0]], steps[tensors[node["inputIndexes"][0]]])
    return {tensor: step for tensor, step in steps.items() if step > 0}


def _elements(blob: Dict[str, Any]) -> int:
    count = 1
    for size in blob.get("dims", []):
        count *= size
    return count


def _layer(node: Dict[str, Any], tensors: List[str], constants: Dict[int, int]) -> Optional[MnnLayer]:
    inputs = node.get("inputIndexes", [])
    main = node.get("main") or {}
    if node["type"] in _CONVOLUTIONS:
        common = main["common"]
        parameters = _weights_of(main) if len(inputs) == 1 else 0
        channels = common["outputCount"]
    elif node["type"] == "InnerProduct":
        parameters, channels = main["weightSize"], main["outputCount"]
    elif node["type"] in ("MatMul", "BatchMatMul"):
        # A product of two activations has no weights; the larger constant is the weight, the other may be a bias.
        parameters, channels = max([constants.get(index, 0) for index in inputs[:2]] + [0]), 0
        if not parameters:
            return None
    else:
        return None
    state, bits = _storage(main)
    sparse = bool(main.get("sparseParameter"))
    return MnnLayer(name=node.get("name", ""), tensor=tensors[node["outputIndexes"][0]], kind=node["type"],
                    parameters=parameters, state=state, bits=bits, channels=channels,
                    scales=(main.get("quanParameter") or {}).get("alpha", 0), inputs=len(inputs), sparse=sparse)


def _weights_of(main: Dict[str, Any]) -> int:
    common = main["common"]
    kernel = common["kernelX"] * common["kernelY"]
    # Depthwise operators that come from TensorFlow leave the number of input channels out.
    inputs = common["inputCount"] // common["group"] if common["inputCount"] else 1
    return int(common["outputCount"] * max(inputs, 1) * kernel)


def _storage(main: Dict[str, Any]) -> Tuple[LayerState, int]:
    quantized = main.get("quanParameter")
    if main.get("symmetricQuan"):
        return LayerState.INT8, 8
    if not quantized:
        return LayerState.FLOAT, 32
    if quantized["type"] in _FLOAT_BITS:
        return LayerState.FLOAT, _FLOAT_BITS[quantized["type"]]
    return LayerState.WEIGHT_ONLY, quantized["aMaxOrBits"]
