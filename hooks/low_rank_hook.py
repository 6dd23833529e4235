"""Low-rank decomposition in front of a monitored session."""
from __future__ import annotations

import json
import logging
import os
from typing import Any, Collection, Dict, Optional, Sequence, Tuple

import tensorflow.compat.v1 as tf

from slimtrain.core import (
    ChosenSpectrum,
    FactorizedLayer,
    RankRule,
    chosen_spectra,
    spectra_from_json,
    spectra_to_json,
    write_whole,
)
from slimtrain.hooks.float_network import FloatHook
from slimtrain.hooks.low_rank import LowRankDecomposition, PathLike, log_report
from slimtrain.hooks.low_rank_structure import apply_structure, structure_in, structure_of

logger = logging.getLogger(__name__)

#: the file with the structure and the report, beside the exported files or the checkpoints
STRUCTURE_FILE = "low_rank.json"


class LowRankDecompositionHook(FloatHook):
    """``LowRankDecomposition`` as a hook; the arguments it shares mean the same.

    Construct it after the model, and before the optimizer and the session: the optimizer then trains the factors. A
    fresh run starts from the trained weights. A resumed run takes the structure from its own checkpoint, in a process
    for evaluation :func:`apply_structure` does so.

    Args:
        graph: the forward graph; None for the default graph.
        weight_npy_file: the trained weights: a file of :func:`get_op_weight_values`, or a checkpoint. Every process
            needs it until ``checkpoint_dir`` holds a checkpoint.
        checkpoint_dir: the session's own: a decomposed checkpoint there decides on the structure.
        output_names: what leaves the network; without it nothing is exported.
        export_dir: where ``model.pb`` and ``model.compress_params.bin`` go at the end, and a pair for every checkpoint;
            None for the folder of the checkpoints.
        is_chief: whether this process exports, as given to the session.

    Raises:
        TypeError, RuntimeError, ValueError, SlimtrainError: as ``LowRankDecomposition``; neither weights nor a
            checkpoint; a checkpoint of a network that was not decomposed.
    """

    def __init__(self, graph: Optional[tf.Graph] = None, weight_npy_file: Optional[PathLike] = None,
                 skip_layers: Collection[str] = (), align_channels: int = 8, tucker_minimal_ratio: float = 0.25,
                 reserved_singular_value_ratio: float = 0.5, *, rank_rule: Optional[RankRule] = None,
                 separable: Collection[str] = (), refinements: int = 2, checkpoint_dir: Optional[str] = None,
                 output_names: Optional[Sequence[str]] = None, export_dir: Optional[str] = None,
                 is_chief: bool = True) -> None:
        graph = graph if graph is not None else tf.get_default_graph()
        LowRankDecomposition.check(align_channels, tucker_minimal_ratio, reserved_singular_value_ratio, refinements)
        #: of the decomposition; empty in a resumed run, where the file ``low_rank.json`` has it
        self.report: Tuple[FactorizedLayer, ...] = ()
        self._spectra: Dict[str, ChosenSpectrum] = {}
        saved = tf.train.latest_checkpoint(checkpoint_dir) if checkpoint_dir else None
        if saved is not None:
            _resume(graph, saved)
        elif weight_npy_file is None:
            raise ValueError("weight_npy_file is missing: give the trained weights, a file of get_op_weight_values or "
                             "a checkpoint")
        else:
            decomposition = LowRankDecomposition(
                graph, weight_npy_file, skip_layers, align_channels, tucker_minimal_ratio,
                reserved_singular_value_ratio, rank_rule=rank_rule, separable=separable, refinements=refinements)
            decomposition.apply()
            self.report = decomposition.report
            self._spectra = chosen_spectra(decomposition.spectra, decomposition.plans)
            log_report(self.report)
        super().__init__(graph, export_dir, output_names, is_chief)
        self._folder = export_dir or checkpoint_dir

    def spectra(self) -> Dict[str, ChosenSpectrum]:
        """Those of the dense weights, before they were decomposed; a resumed run finds them in ``low_rank.json``."""
        path = os.path.join(self._folder or "", STRUCTURE_FILE)
        if self._spectra or not os.path.exists(path):
            return dict(self._spectra)
        with open(path, encoding="utf-8") as file:
            return spectra_from_json(json.load(file).get("spectra", {}))

    def after_create_session(self, session: tf.Session, coord: Any) -> None:
        """Write the structure and the report beside the files."""
        if self._is_chief and self._folder and self.report:
            content = {"structure": structure_of(self.graph), "report": [line._asdict() for line in self.report],
                       "spectra": spectra_to_json(self._spectra)}
            os.makedirs(self._folder, exist_ok=True)
            write_whole(os.path.join(self._folder, STRUCTURE_FILE),
                        json.dumps(content, indent=1, sort_keys=True).encode("utf-8"))


def _resume(graph: tf.Graph, checkpoint: str) -> None:
    structure = structure_in(checkpoint, graph)
    if not structure:
        raise RuntimeError("{!r} in checkpoint_dir is of a network that was not decomposed, and cannot be resumed "
                           "from: give the session another folder, and this checkpoint as weight_npy_file".format(
                               checkpoint))
    logger.info("the structure is that of %s", checkpoint)
    apply_structure(graph, structure)
