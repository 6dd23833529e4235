"""The mathematics and policy of slimtrain on numpy arrays: pure functions, state as values, no framework."""

from slimtrain.core.batchnorm import fold_batch_norm, fold_factor
from slimtrain.core.chain import (
    Affine,
    Chain,
    add_identity,
    axis_owners,
    chain_error,
    chain_multiply_adds,
    chain_parameters,
    compose_chain,
    identity_tap,
    merge_chain,
)
from slimtrain.core.channel_choice import ChannelChoice, choose_channels
from slimtrain.core.channels import ChannelClasses, ChannelGraph, ChannelGroup, LayerChannels
from slimtrain.core.coverage import Coverage, LayerCoverage, LayerState
from slimtrain.core.decompose import (
    Analysis,
    Factorization,
    Spectrum,
    analyse_weight,
    chain_shapes,
    full_ranks,
    natural_factorization,
    truncate_weight,
)
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
from slimtrain.core.prune_ratios import OVERALL, read_prune_ratios, write_prune_ratios
from slimtrain.core.ranking import global_keep, layer_keep, sparsity_of
from slimtrain.core.scales import SMALLEST_SCALE, lsq_scale, max_abs_scale, mse_scale
from slimtrain.core.schedule import PruningSchedule, Ramp, schedule_between, step_of
from slimtrain.core.selection import select
from slimtrain.core.sensitivity import (
    Sensitivity,
    accumulate_sensitivity,
    load_sensitivity,
    mean_share,
    save_sensitivity,
)
from slimtrain.core.simulator import (
    Activation,
    IntegerConv,
    accumulate,
    has_small_groups,
    input_levels,
    same_padding,
    simulate_conv,
    simulate_linear,
)
from slimtrain.core.vbmf import Evbmf, evbmf
from slimtrain.core.weight_only import (
    StoredWeight,
    WeightMode,
    largest_level,
    stored_weight,
    usable_block,
)

__all__ = [
    "Activation",
    "Affine",
    "Analysis",
    "Chain",
    "ChannelChoice",
    "ChannelClasses",
    "ChannelGraph",
    "ChannelGroup",
    "ConversionError",
    "Coverage",
    "CoverageError",
    "Evbmf",
    "Factorization",
    "Grid",
    "IntegerConv",
    "LayerCall",
    "LayerChannels",
    "LayerCoverage",
    "LayerState",
    "OVERALL",
    "Op",
    "OpKind",
    "ParameterFileError",
    "Placement",
    "PruningSchedule",
    "Quantizer",
    "Ramp",
    "Role",
    "SMALLEST_SCALE",
    "Sensitivity",
    "SlimtrainError",
    "Spectrum",
    "StoredWeight",
    "WeightMode",
    "accumulate",
    "accumulate_sensitivity",
    "activation_grid",
    "add_identity",
    "analyse_weight",
    "axis_owners",
    "capped_grid",
    "chain_error",
    "chain_multiply_adds",
    "chain_parameters",
    "chain_shapes",
    "choose_channels",
    "compose_chain",
    "dequantize",
    "evbmf",
    "fake_quantize",
    "fold_batch_norm",
    "fold_factor",
    "full_ranks",
    "global_keep",
    "has_small_groups",
    "identity_tap",
    "input_levels",
    "largest_level",
    "layer_keep",
    "load_sensitivity",
    "lsq_gradient",
    "lsq_scale",
    "max_abs_scale",
    "max_steps",
    "mean_share",
    "merge_chain",
    "mse_scale",
    "natural_factorization",
    "place",
    "quantize",
    "read_prune_ratios",
    "replace_all",
    "round_half_away",
    "same_padding",
    "save_sensitivity",
    "schedule_between",
    "select",
    "simulate_conv",
    "simulate_linear",
    "sparsity_of",
    "sqnr_db",
    "step_of",
    "stored_weight",
    "truncate_weight",
    "usable_block",
    "weight_grid",
    "write_prune_ratios",
    "write_whole",
]
