"""The mathematics and policy of slimtrain on numpy arrays: pure functions, state as values, no framework."""

from slimtrain.core.batchnorm import fold_batch_norm, fold_factor
from slimtrain.core.coverage import Coverage, LayerCoverage, LayerState
from slimtrain.core.errors import ConversionError, CoverageError, ParameterFileError, SlimtrainError
from slimtrain.core.files import replace_all, write_whole
from slimtrain.core.grid import (
    Grid,
    activation_grid,
    capped_grid,
    dequantize,
    fake_quantize,
    quantize,
    round_half_away,
    weight_grid,
)
from slimtrain.core.lsq import lsq_gradient
from slimtrain.core.metrics import max_steps, sqnr_db
from slimtrain.core.placement import LayerCall, Op, OpKind, Placement, Quantizer, Role, place
from slimtrain.core.scales import SMALLEST_SCALE, lsq_scale, max_abs_scale, mse_scale
from slimtrain.core.selection import select
from slimtrain.core.simulator import (
    Activation,
    IntegerConv,
    accumulate,
    input_levels,
    same_padding,
    simulate_conv,
    simulate_linear,
)

__all__ = [
    "Activation",
    "ConversionError",
    "Coverage",
    "CoverageError",
    "Grid",
    "IntegerConv",
    "LayerCall",
    "LayerCoverage",
    "LayerState",
    "Op",
    "OpKind",
    "ParameterFileError",
    "Placement",
    "Quantizer",
    "Role",
    "SMALLEST_SCALE",
    "SlimtrainError",
    "accumulate",
    "activation_grid",
    "capped_grid",
    "dequantize",
    "fake_quantize",
    "fold_batch_norm",
    "fold_factor",
    "input_levels",
    "lsq_gradient",
    "lsq_scale",
    "max_abs_scale",
    "max_steps",
    "mse_scale",
    "place",
    "quantize",
    "replace_all",
    "round_half_away",
    "same_padding",
    "select",
    "simulate_conv",
    "simulate_linear",
    "sqnr_db",
    "weight_grid",
    "write_whole",
]
