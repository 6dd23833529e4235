"""The singular values of decomposed layers and the ranks that were chosen: for pictures, and for those who go on."""
from __future__ import annotations

from typing import Any, Dict, Mapping, Sequence

from slimtrain.core.compression_report import ChosenSpectrum
from slimtrain.core.decompose import Spectrum
from slimtrain.core.ranks import RankPlan


def chosen_spectra(spectra: Mapping[str, Sequence[Spectrum]],
                   plans: Sequence[RankPlan]) -> Dict[str, ChosenSpectrum]:
    """What is drawn of each layer that was decomposed.

    Args:
        spectra: of each layer's unfoldings.
        plans: of all layers; those without ranks are left as they are.

    Returns:
        by layer name; Tucker-2 has two spectra, ``name (outputs)`` and ``name (inputs)``.
    """
    found = {}
    for plan in plans:
        each = spectra[plan.name] if plan.ranks else ()
        sides = (" (outputs)", " (inputs)") if len(each) > 1 else ("",)
        for side, spectrum, rank in zip(sides, each, plan.ranks):
            found[plan.name + side] = ChosenSpectrum(tuple(float(value) for value in spectrum.values), int(rank))
    return found


def spectra_to_json(spectra: Mapping[str, ChosenSpectrum]) -> Dict[str, Any]:
    """Spectra as JSON has them."""
    return {name: [list(spectrum.values), spectrum.rank] for name, spectrum in spectra.items()}


def spectra_from_json(content: Mapping[str, Any]) -> Dict[str, ChosenSpectrum]:
    """The inverse of :func:`spectra_to_json`."""
    return {name: ChosenSpectrum(tuple(values), rank) for name, (values, rank) in content.items()}
