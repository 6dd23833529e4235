"""How the converter stores what the parameters say nothing about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Tuple

_TAKEN = (
    "-f",
    "--framework",
    "--modelFile",
    "--MNNModel",
    "--JsonFile",
    "--compressionParamsFile",
    "--fp16",
    "--weightQuantBits",
    "--weightQuantAsymmetric",
    "--weightQuantBlock",
    "--hqq",
    "--detectSparseSpeedUp",
)


@dataclass(frozen=True)
class ConvertOptions:
    """Storage of all layers without parameters of their own.

    Attributes:
        weight_bits: weight-only quantization to 2..8 bits; 0 for none.
        asymmetric: with ``weight_bits``: a minimum and a scale per channel. Zero is then not on the grid,
            which is wrong for a pruned model.
        weight_block: with ``weight_bits``: input channels per scale, a multiple of 16; 0 for one scale per
            output channel.
        hqq: with ``weight_bits`` and ``asymmetric``: half-quadratic optimization of the grid.
        fp16: store floats as the nearest half floats. MNN then drops ``weight_bits``, so the two exclude each
            other.
        sparse: leave zeros out of the file where that makes it smaller. Without ``weight_bits`` that takes
            more than 60 % of zeros (30 % in blocks of 4 channels); full int8 layers are always stored dense.
        extra: further options of ``mnnconvert``, word by word.

    Raises:
        ValueError: values out of range, and combinations that MNN would silently ignore.
        TypeError: numbers that are no integers, ``extra`` as one string.
    """

    weight_bits: int = 0
    asymmetric: bool = False
    weight_block: int = 0
    hqq: bool = False
    fp16: bool = False
    sparse: bool = False
    extra: Tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_values()
        self._check_combinations()

    def arguments(self) -> List[str]:
        """The options as words for ``mnnconvert``."""
        words = ["--fp16"] if self.fp16 else []
        if self.weight_bits:
            # "=0" is the one spelling that asks for symmetric; without the option the converter is
            # asymmetric.
            words += ["--weightQuantBits", str(self.weight_bits)]
            words += [f"--weightQuantAsymmetric={int(self.asymmetric)}"]
        if self.weight_block:
            words += ["--weightQuantBlock", str(self.weight_block)]
        if self.hqq:
            words += ["--hqq"]
        if self.sparse:
            words += ["--detectSparseSpeedUp"]
        return words + list(self.extra)

    def _check_values(self) -> None:
        for name in ("weight_bits", "weight_block"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name} must be an integer, got {getattr(self, name)!r}")
        if self.weight_bits != 0 and self.weight_bits not in range(2, 9):
            raise ValueError(f"weight_bits must be 0 or 2..8, got {self.weight_bits!r}")
        if self.weight_block < 0 or self.weight_block % 16:
            raise ValueError(f"weight_block must be 0 or a multiple of 16, got {self.weight_block!r}")
        if isinstance(self.extra, str):
            raise TypeError(f"extra must be a tuple of words, got the string {self.extra!r}")
        taken = [word for word in self.extra if word.split("=")[0] in _TAKEN]
        if taken:
            raise ValueError(f"extra repeats what has an argument of its own: {', '.join(taken)}")

    def _check_combinations(self) -> None:
        if not self.weight_bits and (self.asymmetric or self.weight_block or self.hqq):
            raise ValueError(
                "asymmetric, weight_block and hqq say how to quantize weights: weight_bits is missing"
            )
        if self.weight_bits and self.fp16:
            raise ValueError("weight_bits and fp16 exclude each other: MNN would store half floats only")
        if self.hqq and not self.asymmetric:
            raise ValueError("hqq has asymmetric grids only: asymmetric is missing")
