"""What each torch function does to the values that flow through it, in the vocabulary of ``slimtrain.core.placement``.

Functions are known by name, so that ``torch.relu``, ``Tensor.relu_`` and ``torch.nn.functional.relu`` are one entry.
"""
from __future__ import annotations

import copy
import functools
import numbers
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor

from slimtrain.core import OpKind

LAYER_FUNCTIONS = frozenset({"conv1d", "conv2d", "linear"})

_ARITHMETIC = frozenset(
    operator.format(name)
    for name in ("add", "mul", "div", "true_divide")
    for operator in ("{}", "{}_", "__{}__", "__r{}__", "__i{}__")
) | {"__truediv__", "__itruediv__"}

_KINDS: Dict[OpKind, Tuple[str, ...]] = {
    OpKind.BATCH_NORM: ("batch_norm",),
    OpKind.RELU: ("relu", "relu_"),
    OpKind.RELU6: ("relu6",),
    OpKind.NON_NEGATIVE: ("sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_", "softmax", "abs", "abs_", "exp",
                          "exp_", "softplus", "square"),
    OpKind.CONCAT: ("cat", "concat", "concatenate"),
    OpKind.COMBINE: ("mean", "sum", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d",
                     "adaptive_avg_pool2d"),
    OpKind.VIEW: ("reshape", "view", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim", "t", "T",
                  "mT", "squeeze", "squeeze_", "unsqueeze", "unsqueeze_", "contiguous", "chunk", "split",
                  "tensor_split", "unbind", "narrow", "select", "index_select", "__getitem__", "expand", "clone",
                  "roll", "flip", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "to", "detach", "dropout",
                  "dropout1d", "dropout2d", "view_as", "reshape_as"),
    OpKind.MAX_POOL: ("max_pool1d", "max_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d"),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}


# questions about a tensor, which read none of its values
_METADATA = frozenset({"dim", "size", "stride", "numel", "nelement", "element_size", "is_contiguous",
                       "is_floating_point", "is_complex", "type", "get_device", "data_ptr", "storage_offset", "__len__",
                       "__repr__", "__format__", "__hash__", "register_hook", "requires_grad_", "is_pinned",
                       "untyped_storage"})


@functools.lru_cache(maxsize=1024)
def reads_values(function: Callable[..., Any]) -> bool:
    """Whether a torch function computes with values; ``x.shape`` and ``x.dim()`` do not."""
    name = function_name(function)
    if getattr(function, "__name__", "") in ("__get__", "__set__", "__delete__"):
        return name in _KIND_OF or name in ("H", "mH", "real", "data")
    return name not in _METADATA


def counts(function: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether a torch function only adds to an integer counter, as every batch norm does."""
    return function is Tensor.add_ and isinstance(args[0], Tensor) and not args[0].is_floating_point()


def function_name(function: Callable[..., Any]) -> str:
    """Name a torch function; a property such as ``Tensor.T`` by the property."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return str(getattr(getattr(function, "__self__", None), "__name__", ""))
    return name


def operation_kind(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], constants: bool) -> OpKind:
    """Classify one call; ``constants`` tells that it also reads a tensor from outside the network."""
    if name in ("hardtanh", "hardtanh_", "clamp", "clamp_", "clip"):
        return _clip_kind(name, args, kwargs)
    if name == "pad":
        return OpKind.VIEW if not argument(args, kwargs, 3, "value", 0.0) else OpKind.OTHER
    if name in ("interpolate", "upsample"):
        return OpKind.VIEW if argument(args, kwargs, 3, "mode", "nearest") == "nearest" else OpKind.RESIZE
    if name == "batch_norm":
        # without running statistics there is nothing that a converter could fold
        return OpKind.BATCH_NORM if argument(args, kwargs, 1, "running_mean") is not None else OpKind.OTHER
    if _keeps_values(name, args):
        return OpKind.VIEW  # exporters drop it
    kind = OpKind.COMBINE if name in _ARITHMETIC else _KIND_OF.get(name, OpKind.OTHER)
    if kind is OpKind.CONCAT and constants:
        return OpKind.OTHER  # the converter has no description of a constant that it could spread
    if kind is OpKind.COMBINE and (constants or (name in _ARITHMETIC and _has_negative(args, kwargs))):
        return OpKind.OTHER
    return kind


def _keeps_values(name: str, args: Sequence[Any]) -> bool:
    """Whether an operation multiplies or divides by the number one, or adds or subtracts zero."""
    if len(args) != 2 or not isinstance(args[1], numbers.Real):
        return False
    if name.strip("_") in ("add", "radd", "iadd", "sub", "isub"):
        return bool(args[1] == 0)
    scales = name.strip("_") in ("mul", "rmul", "imul", "div", "truediv", "true_divide", "itruediv")
    return scales and bool(args[1] == 1)


def _clip_kind(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> OpKind:
    default = -1.0 if name.startswith("hardtanh") else None
    low = argument(args, kwargs, 1, "min_val" if name.startswith("hardtanh") else "min", default)
    high = argument(args, kwargs, 2, "max_val" if name.startswith("hardtanh") else "max",
                    1.0 if default is not None else None)
    if isinstance(low, numbers.Real) and bool(low >= 0):  # type: ignore[operator]
        return OpKind.RELU6 if low == 0 and isinstance(high, numbers.Real) and high == 6 else OpKind.NON_NEGATIVE
    return OpKind.OTHER


class Mean(NamedTuple):
    """A mean over all places of an image, or of any other last axes."""

    axes: int        #: how many
    keeps_axes: bool


def mean_of(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Optional[Mean]:
    """The mean that a torch function takes of its first argument; None for anything else."""
    name, x = function_name(function), argument(args, kwargs, 0, "input")
    if name in ("adaptive_avg_pool1d", "adaptive_avg_pool2d"):
        size = argument(args, kwargs, 1, "output_size")
        ones = size if isinstance(size, (tuple, list)) else (size,)
        return Mean(int(name[-2]), True) if all(length == 1 for length in ones) else None
    if name != "mean" or "dtype" in kwargs or "out" in kwargs:
        return None
    dims = argument(args, kwargs, 1, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    if not 0 < len(dims) < x.dim() or sorted(dim % x.dim() for dim in dims) != list(range(x.dim()))[-len(dims):]:
        return None
    return Mean(len(dims), bool(argument(args, kwargs, 2, "keepdim", False)))


def works_in_place(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an activation writes its result into its input."""
    name = function_name(function)
    return name.endswith("_") or bool(argument(args, kwargs, 3 if name == "hardtanh" else 1, "inplace", False))


def _has_negative(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(value, numbers.Real) and value < 0 for value in (*args, *kwargs.values()))


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str, default: Any = None) -> Any:
    """The argument that a torch function was given by position or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def tensors_in(values: Any) -> List[Tensor]:
    """The tensors among call arguments or results, in order, looking into tuples, lists and dicts."""
    found: List[Tensor] = []
    _collect(values, found)
    return found


def _collect(value: Any, found: List[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list, dict)):
        _collect_items(value.values() if isinstance(value, dict) else value, found)


def _collect_items(items: Iterable[Any], found: List[Tensor]) -> None:
    for item in items:
        if isinstance(item, Tensor):  # before it is a call: most are, and this runs for every operation of a model
            found.append(item)
        elif isinstance(item, (tuple, list, dict)):
            _collect(item, found)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Replace every tensor inside tuples, lists and dicts; what holds no replaced tensor is returned as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in value]
        if all(new is old for new, old in zip(items, value)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        pairs = {key: map_tensors(function, item) for key, item in value.items()}
        if all(new is value[key] for key, new in pairs.items()):
            return value
        copied = copy.copy(value)
        copied.update(pairs)
        return copied
    return value


def weight_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Optional[Any]:
    """The weight given to a convolution or linear function."""
    return argument(args, kwargs, 1, "weight")
