"""What is in a .mnn file: its operators with weights, how each is stored, which tensors lie on a grid.

MNN's own tool turns the file into JSON.  Weights make up nearly all of that text and only their number
matters here, so the numbers are dropped line by line before the rest is parsed.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from typing import Any, Callable, Dict, Iterable, Iterator, List, Match, NamedTuple, Optional, Tuple, TypeVar, Union

import numpy as np

from slimtrain.core import ConversionError, LayerState
from slimtrain.proto.process import quote, require_mnn, run_child

PathLike = Union[str, "os.PathLike[str]"]
Node = Dict[str, Any]
_Parsed = TypeVar("_Parsed")

# This module of the wheel is the converter itself.  The wrapper script around it would install a logger over
# the network and post statistics to it.
CONVERTER_MODULE = "_tools"
CONVERTER_CODE = "import sys, _tools; _tools.mnnconvert(sys.argv[1:])"

#: the widest distance between two weights that the converter writes
LONGEST_STEP_BITS = 8

_LONG_ARRAY = re.compile(r'"(weight|bias|buffer|alpha|index|float32s|int8s|uint8s|int32s)": \n$')
# Strings come first, so that a tensor called "nan" keeps its name.
_STRING_OR_NOT_FINITE = re.compile(r'"(?:[^"\\]|\\.)*"|-?\b(?:nan|inf)\b')
_JSON_SPELLING = {"nan": "NaN", "-nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}

_CONVOLUTIONS = ("Convolution", "ConvolutionDepthwise", "Deconvolution", "DeconvolutionDepthwise")
_PRODUCTS = ("MatMul", "BatchMatMul")
# Operators that only move numbers: they hand the grid of their input on.
_MOVES = ("ConvertTensor", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Permute", "Transpose")
# Operators whose integer kernels take a tensor with a zero point for one without (measured on MNN 3.6); convolutions,
# additions, concatenation and nearest upsampling compute with it as they should.
_WRONG_WITH_ZERO_POINTS = ("Pooling", "ReLU", "ReLU6", "Interp", "Resize")
# Encodings of "quanParameter" that are compact but not quantized: sparse floats and half floats.
_FLOAT_BITS = {0: 32, 3: 16}


class MnnLayer(NamedTuple):
    """An operator with weights of its own.

    ``name`` is the operator's, ``tensor`` its output's, ``kind`` the converter's word for its type;
    ``parameters`` counts weights without biases, ``bits`` is the width of a stored one, ``channels`` counts
    outputs (0: unknown), ``inputs`` input tensors; ``sparse`` tells whether zeros are left out of the file.
    """

    name: str
    tensor: str
    kind: str
    parameters: int
    state: LayerState
    bits: int
    channels: int
    inputs: int
    sparse: bool


class MnnModel(NamedTuple):
    """A converted model.

    ``layers`` are the operators with weights, in the order of execution; ``writers`` names the kind of
    operator that writes each tensor; ``steps`` is the scale of each tensor that lies on a grid, to the six
    decimals of the dump; ``wrong`` describes each operator that the runtime computes wrongly, because what it
    reads or writes has a zero point, or because it is padded in another way than where it comes from.
    """

    layers: Tuple[MnnLayer, ...]
    writers: Dict[str, str]
    steps: Dict[str, float]
    wrong: Tuple[str, ...] = ()


def inspect_model(path: PathLike, timeout: float = 600.0) -> MnnModel:
    """Read a .mnn file.

    Raises:
        ConversionError: no such file, MNN is missing, or the file is no .mnn model.
    """
    return _dumped(path, timeout, parse_dump)


def zeros_in(path: PathLike, timeout: float = 600.0) -> Dict[str, List[int]]:
    """Where zeros lie in the weights of every convolution that is stored in float, by the operator's name.

    Returns:
        the number of zeros; then, for steps of 1, 2, ... 8 bits, how many steps lead from weight to weight that is not
        zero. The dump has six decimals, so that a weight below 5e-7 counts as zero.

    Raises:
        ConversionError: as ``inspect_model``.
    """
    return _dumped(path, timeout, _zeros)


def _dumped(path: PathLike, timeout: float, parse: Callable[[Iterable[str], str], _Parsed]) -> _Parsed:
    require_mnn(CONVERTER_MODULE)
    source = os.path.abspath(os.fspath(path))
    if not os.path.isfile(source):
        raise ConversionError(f"no such model: {source}")
    with tempfile.TemporaryDirectory(prefix="slimtrain-") as folder:
        target = os.path.join(folder, "model.json")
        words = ["mnnconvert", "-f", "MNN", "--modelFile", source, "--JsonFile", target]
        output = run_child(["-c", CONVERTER_CODE, *words], folder, timeout, f"reading {source}")
        if not os.path.isfile(target) or not os.path.getsize(target):
            raise ConversionError(f"{source} is not a .mnn model: the converter wrote nothing{quote(output)}")
        with open(target, encoding="utf-8", errors="replace") as lines:
            return parse(lines, source)


def _zeros(lines: Iterable[str], source: str) -> Dict[str, List[int]]:
    text = _STRING_OR_NOT_FINITE.sub(_spell, "".join(_without_numbers(lines, _steps_between)))
    try:
        nodes = [node for graph in _graphs(json.loads(text)) for node in graph[0]]
        return {node.get("name", ""): (node.get("main") or {}).get("weight") or []
                for node in nodes if node["type"] in _CONVOLUTIONS}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{source}: cannot make sense of the converter's dump: {error!r}") from error


def parse_dump(lines: Iterable[str], source: str = "model") -> MnnModel:
    """The model in the converter's JSON, given line by line.

    Raises:
        ConversionError: the JSON has another form than the converter is known to write.
    """
    text = _STRING_OR_NOT_FINITE.sub(_spell, "".join(_without_numbers(lines)))
    layers: List[MnnLayer] = []
    writers: Dict[str, str] = {}
    steps: Dict[str, float] = {}
    wrong: List[str] = []
    try:
        for nodes, tensors, described in _graphs(json.loads(text)):
            layers += _layers(nodes, tensors)
            writers.update({tensors[index]: node["type"] for node in nodes for index in _outputs(node)})
            steps.update(_steps(nodes, tensors, described))
            wrong += [*_wrong(nodes, tensors, described), *_begins_elsewhere(nodes, tensors)]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConversionError(f"{source}: cannot make sense of the converter's dump: {error!r}") from error
    return MnnModel(tuple(layers), writers, steps, tuple(wrong))


def _length(line: str) -> str:
    return str(line.count(",") + 1 if line.strip(" []\n") else 0)


def _steps_between(line: str) -> str:
    values = np.array(line.strip(" [],\n").split(",") if line.strip(" [],\n") else [], dtype=np.float32)
    alive = np.flatnonzero(values)
    distances = np.diff(alive, prepend=-1)
    steps = [int(np.sum(-(-distances // (2**bits - 1)))) for bits in range(1, LONGEST_STEP_BITS + 1)]
    return json.dumps([values.size - alive.size, *steps])


def _without_numbers(lines: Iterable[str], replace: Callable[[str], str] = _length) -> Iterator[str]:
    """``lines`` with every array of weights replaced by something short."""
    is_array = False
    for line in lines:
        yield f"{replace(line)}\n" if is_array else line
        is_array = _LONG_ARRAY.search(line) is not None


def _spell(match: Match[str]) -> str:
    return _JSON_SPELLING.get(match.group(0), match.group(0))


def _graphs(net: Node) -> Iterator[Tuple[List[Node], List[str], List[Node]]]:
    """Operators, tensor names and tensor descriptions: of the model, and of its loops and branches."""
    yield net["oplists"], net["tensorName"], net.get("extraTensorDescribe", [])
    for graph in net.get("subgraphs", []):
        yield graph["nodes"], graph["tensors"], graph.get("extraTensorDescribe", [])


def _outputs(node: Node) -> List[int]:
    return list(node.get("outputIndexes", []))


def _layers(nodes: List[Node], tensors: List[str]) -> Iterator[MnnLayer]:
    constants: Dict[int, int] = {}
    for node in nodes:
        if node["type"] == "Const":
            constants.update({index: _elements(node["main"]) for index in _outputs(node)})
        size = _size(node, constants)
        if size is None:
            continue
        parameters, channels = size
        main = node.get("main") or {}
        state, bits = _storage(main)
        yield MnnLayer(
            name=node.get("name", ""),
            tensor=tensors[_outputs(node)[0]],
            kind=node["type"],
            parameters=parameters,
            state=state,
            bits=bits,
            channels=channels,
            inputs=len(node.get("inputIndexes", [])),
            sparse=bool(main.get("sparseParameter")),
        )


def _size(node: Node, constants: Dict[int, int]) -> Optional[Tuple[int, int]]:
    """Numbers of weights and of output channels; None for an operator without weights."""
    inputs = node.get("inputIndexes", [])
    if node["type"] in _CONVOLUTIONS:
        common = node["main"]["common"]
        return (_kernel_size(common) if len(inputs) == 1 else 0), common["outputCount"]
    if node["type"] == "InnerProduct":
        return node["main"]["weightSize"], node["main"]["outputCount"]
    if node["type"] in _PRODUCTS:
        # A product of two activations has no weights; a third input is a bias.
        weights = max([constants.get(index, 0) for index in inputs[:2]], default=0)
        return (weights, 0) if weights else None
    return None


def _kernel_size(common: Node) -> int:
    # Depthwise operators may leave the number of input channels out.
    inputs = max(common["inputCount"] // common["group"], 1)
    return int(common["outputCount"] * inputs * common["kernelX"] * common["kernelY"])


def _elements(blob: Node) -> int:
    count = 1
    for size in blob.get("dims", []):
        count *= size
    return count


def _storage(main: Node) -> Tuple[LayerState, int]:
    quantized = main.get("quanParameter")
    if main.get("symmetricQuan"):
        return LayerState.INT8, 8
    if not quantized:
        return LayerState.FLOAT, 32
    if quantized["type"] in _FLOAT_BITS:
        return LayerState.FLOAT, _FLOAT_BITS[quantized["type"]]
    return LayerState.WEIGHT_ONLY, quantized["aMaxOrBits"]


def _steps(nodes: List[Node], tensors: List[str], described: List[Node]) -> Dict[str, float]:
    steps = {entry["index"]: entry["quantInfo"]["scale"] for entry in described if entry.get("quantInfo")}
    for node in nodes:
        if node["type"] in _MOVES and node["inputIndexes"][0] in steps:
            steps.setdefault(_outputs(node)[0], steps[node["inputIndexes"][0]])
    return {tensors[index]: step for index, step in steps.items() if step > 0}


def _wrong(nodes: List[Node], tensors: List[str], described: List[Node]) -> Iterator[str]:
    infos = {entry["index"]: entry.get("quantInfo") or {} for entry in described}
    zeros = {index: int(info.get("zero", 0)) for index, info in infos.items()}
    for node in nodes:
        if node["type"] in _WRONG_WITH_ZERO_POINTS:
            for index in (*node.get("inputIndexes", []), *_outputs(node)):
                if zeros.get(index):
                    yield f"{node['type']} of {tensors[_outputs(node)[0]]} (zero point {zeros[index]})"
                    break


def _begins_elsewhere(nodes: List[Node], tensors: List[str]) -> Iterator[str]:
    """Convolutions for which SAME may ask for less than no padding: MNN then skips the first values, others none.

    What a slice cuts off before a convolution is taken to be just that: exported models have it so.
    """
    writers = {index: node for node in nodes for index in _outputs(node)}
    for node in nodes:
        common = node["main"]["common"] if node["type"] in ("Convolution", "ConvolutionDepthwise") else {}
        if common.get("padMode") != "SAME":
            continue
        source = writers.get(node["inputIndexes"][0], {})
        while source.get("type") == "ConvertTensor":
            source = writers.get(source["inputIndexes"][0], {})
        for axis in "YX" if source.get("type") != "StridedSlice" else "":
            extent = (common["kernel" + axis] - 1) * common["dilate" + axis] + 1
            if common["stride" + axis] - extent > 1:
                yield (f"{node['type']} of {tensors[_outputs(node)[0]]} (SAME padding for a kernel of {extent} with a "
                       f"stride of {common['stride' + axis]}; right for some sizes of its input only)")
                break
