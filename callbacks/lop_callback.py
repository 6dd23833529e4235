"""Linear over-parameterization inside a Lightning Trainer."""
from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional

from torch import nn

from slimtrain.callbacks.callback import compressions, find_target
from slimtrain.callbacks.expansion import merged_view
from slimtrain.callbacks.lop import LOP
from slimtrain.callbacks.plain_callback import PlainCallback


class LOPCallback(PlainCallback):
    """Trains the Trainer's model expanded, and saves and writes it as the small model that it equals.

    Every checkpoint's ``state_dict`` is the small model's, under the user's own names, so that
    ``MyModel.load_from_checkpoint`` gives it; the expanded weights are in the callback's state, and a resumed run goes
    on with them.

    Args:
        expand_rate: channels in between over channels of the layer; 2 to 16 are usual.
        add_batchnorm: normalize in between.
        add_bypass: add a layer's input to its output where they have one shape.
        skip_layers: names or patterns (``features.*``) of layers to leave.
        expand_pointwise: expand 1x1 convolutions too.
        expand_linear: expand linear layers too.
        keep_weights: start from the model's weights; otherwise expanded layers start at random.
        module: dotted path of the submodule to expand; "" for the whole model.
        export_to: path without suffix of what is written at the end of ``fit``; None for the model's name in the
            Trainer's log folder, "" for no export.
    """

    restructures = True

    def __init__(self, expand_rate: int, add_batchnorm: bool = True, add_bypass: bool = True, *,
                 skip_layers: Optional[List[str]] = None, expand_pointwise: bool = False, expand_linear: bool = False,
                 keep_weights: bool = False, module: str = "", export_to: Optional[str] = None) -> None:
        super().__init__(module, export_to)
        LOP.check(expand_rate)
        self._arguments: Dict[str, Any] = dict(
            expand_rate=expand_rate, add_batchnorm=add_batchnorm, add_bypass=add_bypass,
            skip_layers=tuple(skip_layers or ()), expand_pointwise=expand_pointwise, expand_linear=expand_linear,
            keep_weights=keep_weights)
        self._lop: Optional[LOP] = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.configure_model()
        mine = find_target(pl_module, self.module)
        for other in compressions(trainer):
            if other is not self and _overlap(mine, find_target(pl_module, other.module)):
                raise RuntimeError(
                    "%s and LOPCallback cannot train one model at the same time: the weights of an expanded layer are "
                    "computed from its factors. Train with LOPCallback first, call its merge(), and give the small "
                    "model to a Trainer with %s" % ((type(other).__name__,) * 2))
        super().setup(trainer, pl_module, stage)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self.state_key not in checkpoint["callbacks"] and trainer.state.fn == "fit":
            raise RuntimeError(
                "the checkpoint is that of a model that was not expanded, whose optimizer knows other parameters: load "
                "it into the model (%s.load_from_checkpoint), and train that with LOPCallback(keep_weights=True)" %
                type(pl_module).__name__)

    @property
    def lop(self) -> LOP:
        """The object on the model, with its report.

        Raises:
            RuntimeError: the callback has not been set up yet.
        """
        if self._lop is None:
            raise RuntimeError("the callback has no model yet: run trainer.fit, validate or test first")
        return self._lop

    def attach(self, model: nn.Module) -> None:
        self._lop = LOP(model)
        self._lop.linear_expand_layers(compress_params_file=None, in_place=True, **self._arguments)

    def deployed_model(self) -> nn.Module:
        return merged_view(super().deployed_model())

    def merge(self) -> nn.Module:
        """Merge the trained model in place: its training is over, and it is the small model from now on."""
        return self.lop.linear_merge_layers(in_place=True)

    def compression_state(self) -> Dict[str, Any]:
        return {"algorithm": "LOP", "layers": self.lop.state_dict()}

    def load_compression_state(self, state: Mapping[str, Any]) -> None:
        self.lop.load_state_dict(state["layers"])


def _overlap(first: str, second: str) -> bool:
    """Whether one of two dotted paths leads into the other."""
    longer, shorter = sorted((first, second), key=len, reverse=True)
    return not shorter or longer == shorter or longer.startswith(shorter + ".")
