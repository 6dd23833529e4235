"""The stages of a compression pipeline as values: one frozen dataclass for each algorithm, with its arguments.

The arguments are those of the objects, callbacks and hooks under the same names, so a stage says what each of them is
constructed with, in PyTorch and in TensorFlow alike.
"""
from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Dict, Mapping, Optional, Tuple, Type

from slimtrain.core.fields import (
    Choice,
    Flag,
    Fraction,
    Integer,
    LayerBits,
    Names,
    Number,
    Text,
    When,
    check_fields,
    declare,
    require,
)
from slimtrain.core.schedule import Moment, Ramp, check_window
from slimtrain.core.weight_only import WeightMode


class Kind(Enum):
    """What a stage does, in the order in which stages make sense."""

    OVER_PARAMETERIZE = "over_parameterize"
    LOW_RANK = "low_rank"
    PRUNE = "prune"
    QUANTIZE = "quantize"
    EXPORT = "export"


@dataclass(frozen=True)
class Stage:
    """One stage; the base of all.

    Raises:
        TypeError, ValueError: a bad argument; the message begins with its name.
    """

    KIND: ClassVar[Kind]
    ALGORITHM: ClassVar[str]  #: its short name in a configuration
    OBJECT: ClassVar[str]     #: the name of its class in callbacks/ and hooks/, without ``Callback`` and ``Hook``

    def __post_init__(self) -> None:
        check_fields(self)

    def arguments(self) -> Dict[str, Any]:
        """The arguments of its object, as plain values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


_SKIP = Names("names or patterns (features.*) of layers to leave")
_DEBUG = Flag("log each layer as it is decided")
_BITS = "bits of weights and activations"


@dataclass(frozen=True)
class OverParameterize(Stage):
    """Linear over-parameterization: train an expanded model, merge it back."""

    KIND = Kind.OVER_PARAMETERIZE
    ALGORITHM = "lop"
    OBJECT = "LOP"

    expand_rate: int = require(Integer(2, 64, "times that the channels are expanded"))
    add_batchnorm: bool = declare(True, Flag("normalize in between"))
    add_bypass: bool = declare(True, Flag("add a layer's input to its output where they have one shape"))
    skip_layers: Tuple[str, ...] = declare((), _SKIP)
    expand_pointwise: bool = declare(False, Flag("expand 1x1 convolutions too"))
    expand_linear: bool = declare(False, Flag("expand linear layers too"))
    keep_weights: bool = declare(False, Flag("start from the model's weights instead of random ones"))


@dataclass(frozen=True)
class LowRank(Stage):
    """Tucker-2 for convolutions, SVD for linear layers and 1x1 convolutions."""

    KIND = Kind.LOW_RANK
    ALGORITHM = "tucker"
    OBJECT = "LowRankDecomposition"

    skip_layers: Tuple[str, ...] = declare((), _SKIP)
    align_channels: int = declare(8, Integer(1, 1024, "ranks are multiples of it"))
    tucker_minimal_ratio: float = declare(0.25, Fraction("least share of the channels that Tucker-2 keeps", zero=False))
    reserved_singular_value_ratio: float = declare(
        0.5, Fraction("share of the sum of the singular values that SVD keeps", zero=False))


@dataclass(frozen=True)
class Prune(Stage):
    """What all pruning stages have in common."""

    KIND = Kind.PRUNE

    sparsity: float = declare(0.5, Fraction("share of the weights to prune", one=False))
    total_pruning_iterations: int = declare(10, Integer(1, None, "number of pruning events"))
    config_file: Optional[str] = declare(None, Text("YAML file of ratios by weight, of an earlier run", optional=True))
    debug_info: bool = declare(False, _DEBUG)
    prune_finetune_iterations: Optional[int] = declare(
        None, Integer(0, None, "optimizer steps without pruning between two events", optional=True))
    max_prune_ratio: float = declare(0.99, Fraction("no layer loses a larger share", zero=False))
    skip_layers: Tuple[str, ...] = declare((), _SKIP)
    sensitivity_steps: int = declare(10, Integer(1, None, "optimizer steps whose gradients count for an event"))
    ramp: Ramp = declare(Ramp.CUBIC, Choice(Ramp, "how sparsity grows from event to event"))
    begin: Moment = declare(0.0, When("the first pruning event"))
    end: Moment = declare(1 / 3, When("the moment by which pruning is over"))
    result_file: str = declare("", Text("where the ratios found are written; empty for no file"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.begin, self.end)


@dataclass(frozen=True)
class PruneSNIP(Prune):
    """Single weights."""

    ALGORITHM = "snip"
    OBJECT = "SNIPLevelPruner"

    skip_first: bool = declare(False, Flag("leave the first prunable layer alone"))
    skip_last: bool = declare(False, Flag("leave the last prunable layer alone"))


@dataclass(frozen=True)
class PruneSIMDOC(Prune):
    """Blocks of four output channels."""

    ALGORITHM = "simd_oc"
    OBJECT = "SIMDOCPruner"

    skip_first: bool = declare(False, Flag("leave the first prunable layer alone"))
    skip_last: bool = declare(False, Flag("leave the last prunable layer alone"))


@dataclass(frozen=True)
class PruneTaylorFO(Prune):
    """Whole channels."""

    ALGORITHM = "taylor_fo"
    OBJECT = "TaylorFOChannelPruner"

    align_channels: int = declare(4, Integer(1, 1024, "channels that are left are a multiple of it"))


@dataclass(frozen=True)
class Quantize(Stage):
    """What quantization-aware training has in common."""

    KIND = Kind.QUANTIZE

    skip_quant_layers: Tuple[str, ...] = declare((), _SKIP)
    bits: int = declare(8, Integer(2, 8, _BITS))
    debug_info: bool = declare(False, _DEBUG)
    retain_sparsity: Optional[bool] = declare(
        None, Flag("weights that are zero stay zero; where it is left out, after pruning only", optional=True))
    weight_bits: Optional[int] = declare(None, Integer(2, 8, "of weights, instead of bits", optional=True))
    activation_bits: Optional[int] = declare(None, Integer(2, 8, "of activations, instead of bits", optional=True))
    unsigned_activations: bool = declare(
        True, Flag("below 8 bits, activations that are never negative have the range 0..2^bits - 1"))
    begin: Moment = declare(0.0, When("until then the network is trained in float, and then its scales start"))
    end: Moment = declare(1.0, When("from then on scales stay as they are, while weights go on learning"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.begin, self.end)


@dataclass(frozen=True)
class QuantizeLSQ(Quantize):
    """Learned step sizes."""

    ALGORITHM = "lsq"
    OBJECT = "LSQQuantizer"


@dataclass(frozen=True)
class QuantizeEMA(Quantize):
    """Ranges by moving averages."""

    ALGORITHM = "ema"
    OBJECT = "EMAQuantizer"


@dataclass(frozen=True)
class QuantizeOAQ(Quantize):
    """Levels narrowed until sums fit 16 bits."""

    ALGORITHM = "oaq"
    OBJECT = "OAQQuantizer"

    min_clamp_value: int = declare(0, Integer(0, 127, "a layer narrower than this is quantized plainly"))


@dataclass(frozen=True)
class QuantizeWAQ(Quantize):
    """Transformed weights and activations of Winograd's convolution."""

    ALGORITHM = "waq"
    OBJECT = "WAQQuantizer"

    min_sqnr_db: float = declare(
        25.0, Number(0.0, 300.0, "how near a transformed layer must be to plain int8 before training, in dB"))


@dataclass(frozen=True)
class QuantizeWeights(Stage):
    """Weights only; activations stay float."""

    KIND = Kind.QUANTIZE
    ALGORITHM = "weight"
    OBJECT = "WeightQuantizer"

    bits: int = declare(8, Integer(2, 8, "bits of weights"))
    debug_info: bool = declare(False, _DEBUG)
    mode: WeightMode = declare(WeightMode.SYMMETRIC, Choice(WeightMode, "whether channels have a minimum of their own"))
    layer_bits: Mapping[str, int] = declare(None, LayerBits("bits of layers by name or pattern", optional=True))
    skip_quant_layers: Tuple[str, ...] = declare((), _SKIP)
    block_size: int = declare(0, Integer(0, 4096, "input channels that share a scale, a multiple of 16; 0 for all"))
    begin: Moment = declare(0.0, When("until then the network is trained in float"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.begin, 1.0)
        if self.block_size % 16:
            raise ValueError("block_size must be a multiple of 16, got %r" % self.block_size)


@dataclass(frozen=True)
class Export(Stage):
    """Where the files go."""

    KIND = Kind.EXPORT
    ALGORITHM = ""
    OBJECT = ""

    to: str = declare("", Text("path without suffix; empty for a name in the folder of the logs or checkpoints"))
    checkpoints: bool = declare(False, Flag("also export beside every checkpoint"))


_STAGES: Tuple[Type[Stage], ...] = (
    OverParameterize, LowRank, PruneSNIP, PruneSIMDOC, PruneTaylorFO, QuantizeLSQ, QuantizeEMA, QuantizeOAQ,
    QuantizeWAQ, QuantizeWeights, Export)

#: kind -> short name of the algorithm -> class
STAGES: Mapping[Kind, Mapping[str, Type[Stage]]] = {
    kind: {stage.ALGORITHM: stage for stage in _STAGES if stage.KIND is kind} for kind in Kind}
