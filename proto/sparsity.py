"""How large a converted model becomes when its zeros are left out, told before it is converted.

MNN stores a sparse layer as the values that are not zero, each with its distance from the one before. Beside integers
distances are as wide as suits the layer best, where a longer gap takes a zero in between, and a layer stays dense where
that is smaller. Floats have 32 bits each for value and distance, and are stored so above a share of zeros that depends
on the block of output channels alone: for blocks of 4 that comes long before it pays. Full int8 layers are always
dense. What a grid of few bits rounds to zero comes on top: a file may be a little smaller than expected.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from slimtrain.core import LayerState
from slimtrain.proto.converter import PathLike, convert
from slimtrain.proto.mnnfile import MnnLayer, inspect_model, zeros_in
from slimtrain.proto.options import ConvertOptions
from slimtrain.proto.params import read_params

# Shares of zeros above which MNN stores float weights sparsely, by output channels per block.
_FLOAT_THRESHOLDS = {1: 0.6, 2: 0.5, 3: 0.4}
_LOWEST_FLOAT_THRESHOLD = 0.3
_SPARSE_FLOAT_BYTES = 8
_HARDLY_ANY = 0.05


class SparseLayer(NamedTuple):
    """One layer: its weights, the share of zeros among them, the bytes of weights dense and as expected."""

    name: str
    parameters: int
    zeros: float
    dense: int
    expected: int
    reason: str  #: why zeros gain nothing; "" where they do, or where there are hardly any


class SparseEstimate(NamedTuple):
    """A model: bytes of its dense file, bytes expected of the sparse one."""

    dense: int
    expected: int
    layers: Tuple[SparseLayer, ...]

    @property
    def zeros(self) -> float:
        """The share of zeros among all weights."""
        total = sum(layer.parameters for layer in self.layers)
        return sum(layer.zeros * layer.parameters for layer in self.layers) / max(total, 1)

    def notes(self) -> List[str]:
        """Where zeros gain nothing, one sentence for each reason; empty where all of them do."""
        total = max(sum(layer.parameters for layer in self.layers), 1)
        notes = []
        for reason in dict.fromkeys(layer.reason for layer in self.layers if layer.reason):
            layers = [layer for layer in self.layers if layer.reason == reason]
            share = sum(layer.parameters for layer in layers) / total
            notes.append(f"the zeros of {len(layers)} layers ({share:.1%} of all weights) gain nothing: {reason}")
        if self.expected > self.dense:
            notes.append(f"without --sparse the file is smaller: {self.dense:,} bytes, expected are {self.expected:,}")
        return notes

    def to_dict(self) -> Dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "dense_bytes": self.dense,
            "expected_bytes": self.expected,
            "zeros": self.zeros,
            "layers": [layer._asdict() for layer in self.layers],
            "notes": self.notes(),
        }


def estimate_sparse(
    model_path: PathLike,
    params_path: Optional[PathLike],
    options: ConvertOptions,
    allow_partial: bool = False,
) -> SparseEstimate:
    """Expect the size of a model, from its dense conversion and its zeros.

    Args:
        model_path, params_path, options, allow_partial: as ``convert``; whether ``options`` ask for sparse storage
            does not matter.

    Raises:
        ConversionError, CoverageError, ParameterFileError: as ``convert``.
    """
    dense_options = ConvertOptions(
        options.weight_bits, options.asymmetric, options.weight_block, options.hqq, options.fp16, False, options.extra
    )
    block = _block(params_path)
    with tempfile.TemporaryDirectory(prefix="slimtrain-") as folder:
        plain, dense = (os.path.join(folder, name) for name in ("plain.mnn", "dense.mnn"))
        convert(model_path, plain)
        size = convert(model_path, dense, params_path, dense_options, allow_partial).bytes
        zeros = zeros_in(plain)
        layers = tuple(_expect(layer, zeros.get(layer.name, ()), block) for layer in inspect_model(dense).layers)
    return SparseEstimate(size, size - sum(layer.dense - layer.expected for layer in layers), layers)


def _expect(layer: MnnLayer, found: Sequence[int], block: int) -> SparseLayer:
    zeros, steps = (found[0], found[1:]) if found else (0, ())
    share = zeros / max(layer.parameters, 1)
    dense = expected = layer.parameters * layer.bits // 8
    reason = ""
    if layer.state is LayerState.INT8:
        reason = "full int8 layers are always stored dense"
    elif layer.state is LayerState.WEIGHT_ONLY:
        sizes = [count * (layer.bits + bits) // 8 for bits, count in enumerate(steps, 1)]
        expected = min([dense, *sizes])
        reason = f"too few zeros for weights of {layer.bits} bits"
    elif layer.bits == 32:
        threshold = _FLOAT_THRESHOLDS.get(block, _LOWEST_FLOAT_THRESHOLD)
        expected = (layer.parameters - zeros) * _SPARSE_FLOAT_BYTES if share > threshold else dense
        reason = f"floats take {_SPARSE_FLOAT_BYTES} bytes without zeros and 4 with them; give weight bits"
    else:
        reason = "half floats are always stored dense"
    gains_nothing = expected >= dense and share > _HARDLY_ANY
    return SparseLayer(layer.name, layer.parameters, share, dense, expected, reason if gains_nothing else "")


def _block(params_path: Optional[PathLike]) -> int:
    """Output channels per block of zeros, as the parameters have it."""
    if params_path is None:
        return 1
    blocks: Dict[int, int] = {}
    for algorithm in read_params(params_path).algo:
        for size in algorithm.prune_params.simd_oc_pruner_params.oc_blocks:
            blocks[int(size)] = blocks.get(int(size), 0) + 1
    return max(blocks, key=lambda size: blocks[size]) if blocks else 1
