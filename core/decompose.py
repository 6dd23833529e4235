"""Low-rank factors of convolution kernels and weight matrices, from eigenvectors of small Gram matrices.

A singular value decomposition of an unfolding [O, I * k * k] costs many times the eigendecomposition of its Gram
matrix [O, O], and only the left vectors are needed.  Computed in float64: the vectors are orthonormal to 1e-15,
so projections lose nothing; only singular values below 1e-8 of the largest are inaccurate.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Optional, Sequence, Tuple

import numpy as np

from slimtrain.core.chain import Chain, Shape

# A component weaker than this share of the strongest keeps its scale: dividing by it would amplify rounding.
_WEAKEST = 1e-6
_TURNS = 2


class Factorization(Enum):
    """How a weight is written as a chain."""

    SVD = "svd"              #: [r, I, 1..], [O, r, 1..]: matrices and 1x1 kernels
    TUCKER2 = "tucker2"      #: [r_in, I, 1..], [r_out, r_in, *k], [O, r_out, 1..] (Kim et al., arXiv 1511.06530)
    SEPARABLE = "separable"  #: [r, I, kh, 1], [O, r, 1, kw] (Jaderberg et al., arXiv 1405.3866)


class Spectrum(NamedTuple):
    """Singular values of an unfolding, float64 [n], descending, and its left singular vectors [n, n] as columns."""

    values: np.ndarray
    vectors: np.ndarray


class Analysis(NamedTuple):
    """All that rank rules and truncation need of one weight."""

    weight: np.ndarray               #: float64 [O, I, *extents]
    factorization: Factorization
    spectra: Tuple[Spectrum, ...]    #: TUCKER2: of the outputs, of the inputs; otherwise one


def natural_factorization(shape: Shape) -> Factorization:
    """SVD for matrices and kernels of one position, Tucker-2 for all others."""
    return Factorization.TUCKER2 if any(extent > 1 for extent in shape[2:]) else Factorization.SVD


def full_ranks(shape: Shape, factorization: Factorization) -> Tuple[int, ...]:
    """The ranks that lose nothing: Tucker-2 (O, I), otherwise one.

    Raises:
        ValueError: a weight of this shape cannot be factorized so.
    """
    if factorization is Factorization.TUCKER2:
        return shape[0], shape[1]
    if factorization is Factorization.SVD and natural_factorization(shape) is Factorization.SVD:
        return (min(shape[0], shape[1]),)
    if factorization is Factorization.SEPARABLE and len(shape) == 4:
        return (min(shape[0] * shape[3], shape[1] * shape[2]),)
    raise ValueError(f"a weight of shape {shape} has no {factorization.value} factorization")


def chain_shapes(shape: Shape, factorization: Factorization, ranks: Tuple[int, ...]) -> Tuple[Shape, ...]:
    """Shapes of the factors. A Tucker mode at full rank needs no factor, the core absorbs it.

    Raises:
        ValueError: wrong number of ranks, or one outside 1..full.
    """
    full = full_ranks(shape, factorization)
    if len(ranks) != len(full) or not all(1 <= rank <= most for rank, most in zip(ranks, full)):
        raise ValueError(f"a weight of shape {shape} has {factorization.value} ranks of 1..{full}, got {tuple(ranks)}")
    outputs, inputs, extents = shape[0], shape[1], shape[2:]
    ones = (1,) * len(extents)
    if factorization is Factorization.SVD:
        return (ranks[0], inputs) + ones, (outputs, ranks[0]) + ones
    if factorization is Factorization.SEPARABLE:
        return (ranks[0], inputs, extents[0], 1), (outputs, ranks[0], 1, extents[1])
    first = ((ranks[1], inputs) + ones,) if ranks[1] < inputs else ()
    last = ((outputs, ranks[0]) + ones,) if ranks[0] < outputs else ()
    return first + ((ranks[0], ranks[1]) + extents,) + last


def analyse_weight(weight: np.ndarray, factorization: Factorization) -> Analysis:
    """Spectra of the unfoldings that the ranks of ``factorization`` belong to.

    Args:
        weight: [O, I, *extents].
        factorization: the kind of chain wanted.

    Raises:
        ValueError: the shape has no such factorization, or a value is not finite.
    """
    kernel = np.asarray(weight, dtype=np.float64)
    full_ranks(kernel.shape, factorization)
    if not np.isfinite(kernel).all():
        raise ValueError(f"the weight has {int((~np.isfinite(kernel)).sum())} values that are not finite")
    if factorization is Factorization.TUCKER2:
        slices = _slices(kernel)
        return Analysis(_from_slices(slices, kernel.shape[2:]), factorization,
                        (_spectrum(_gram_of_outputs(slices)), _spectrum(_gram_of_inputs(slices))))
    matrix = _as_matrix(kernel, factorization)
    matrix = matrix if _is_wide(matrix) else matrix.T
    return Analysis(kernel, factorization, (_spectrum(matrix.dot(matrix.T)),))


def _spectrum(gram: np.ndarray) -> Spectrum:
    """Singular values and left singular vectors of a matrix by the eigenvectors of matrix @ matrix.T."""
    values, vectors = _eigenvectors(gram)
    return Spectrum(np.sqrt(np.maximum(values, 0)), _with_fixed_signs(vectors))


def truncate_weight(analysis: Analysis, ranks: Sequence[int], refinements: int = 2,
             dtype: Optional[np.dtype] = None) -> Chain:
    """The factors at the given ranks, each component's strength spread evenly over the factors that meet in it.

    Args:
        analysis: of the weight.
        ranks: as ``full_ranks`` orders them.
        refinements: rounds of higher-order orthogonal iteration, which turn Tucker-2's subspaces towards the best
            ones: two of them leave less than 1 % of avoidable error, none up to 4 %. The other factorizations are
            the best already (Eckart and Young).
        dtype: of the factors, float32 by default.

    Raises:
        ValueError: wrong number of ranks, or one outside 1..full.
    """
    chain_shapes(analysis.weight.shape, analysis.factorization, tuple(ranks))
    if analysis.factorization is Factorization.TUCKER2:
        factors = _tucker(analysis, (ranks[0], ranks[1]), refinements)
    else:
        factors = _two_factors(analysis, ranks[0])
    return tuple(np.ascontiguousarray(factor, dtype=dtype or np.float32) for factor in factors)


def _two_factors(analysis: Analysis, rank: int) -> Chain:
    matrix = _as_matrix(analysis.weight, analysis.factorization)
    values, vectors = analysis.spectra[0]
    kept = vectors[:, :rank]
    strength = _strengths(values[:rank])
    if _is_wide(matrix):
        left, right = kept * strength, kept.T.dot(matrix) / strength[:, None]
    else:
        left, right = matrix.dot(kept) / strength, kept.T * strength[:, None]
    outputs, inputs, extents = analysis.weight.shape[0], analysis.weight.shape[1], analysis.weight.shape[2:]
    if analysis.factorization is Factorization.SVD:
        ones = (1,) * len(extents)
        return right.reshape((rank, inputs) + ones), left.reshape((outputs, rank) + ones)
    last = left.reshape(outputs, extents[1], rank).transpose(0, 2, 1)
    return right.reshape(rank, inputs, extents[0], 1), last.reshape(outputs, rank, 1, extents[1])


def _tucker(analysis: Analysis, ranks: Tuple[int, int], refinements: int) -> Chain:
    slices, extents = _slices(analysis.weight), analysis.weight.shape[2:]
    outputs, inputs = (spectrum.vectors[:, :rank] for spectrum, rank in zip(analysis.spectra, ranks))
    for _ in range(refinements):
        outputs = _turned(outputs, _gram_of_outputs(np.matmul(inputs.T, slices)))
        inputs = _turned(inputs, _gram_of_inputs(np.matmul(slices, outputs)))
    ones = (1,) * len(extents)
    core = slices
    first: Chain = ()
    last: Chain = ()
    if ranks[1] < slices.shape[1]:
        core = np.matmul(inputs.T, core)
        strength = _strengths(np.sqrt(np.einsum("kio,kio->i", core, core)))
        core, basis = core / strength[:, None], inputs * strength
        first = (basis.T.reshape(basis.T.shape + ones),)
    if ranks[0] < slices.shape[2]:
        core = np.matmul(core, outputs)
        strength = _strengths(np.sqrt(np.einsum("kio,kio->o", core, core)))
        core, basis = core / strength, outputs * strength
        last = (basis.reshape(basis.shape + ones),)
    return first + (_from_slices(core, extents),) + last


def _turned(basis: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """A basis turned towards the leading eigenvectors of ``gram``, by orthogonal iteration."""
    for _ in range(_TURNS):
        basis = np.linalg.qr(gram.dot(basis))[0]
    return _with_fixed_signs(basis.dot(_eigenvectors(basis.T.dot(gram).dot(basis))[1]))


def _eigenvectors(gram: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, descending, and eigenvectors as columns."""
    values, vectors = np.linalg.eigh(gram)
    return values[::-1], vectors[:, ::-1]


def _with_fixed_signs(vectors: np.ndarray) -> np.ndarray:
    """Columns whose largest entry is positive: the sign is free, but machines must agree on it."""
    largest = vectors[np.argmax(np.abs(vectors), axis=0), np.arange(vectors.shape[1])]
    return vectors * np.where(largest < 0, -1.0, 1.0)


def _strengths(values: np.ndarray) -> np.ndarray:
    """Square roots of singular values, not smaller than rounding allows to divide by."""
    floor = _WEAKEST * float(values.max())
    return np.sqrt(np.maximum(values, floor)) if floor else np.ones_like(values)


def _slices(weight: np.ndarray) -> np.ndarray:
    """A kernel [O, I, *extents] as a matrix for each of its positions, without gaps in memory: [positions, I, O].

    Products along either channel need no other order.
    """
    last = np.ascontiguousarray(np.moveaxis(weight, (1, 0), (-2, -1)))
    return last.reshape((-1,) + last.shape[-2:])


def _from_slices(slices: np.ndarray, extents: Shape) -> np.ndarray:
    """The inverse of ``_slices``; a view."""
    return np.moveaxis(slices.reshape(extents + slices.shape[1:]), (-2, -1), (1, 0))


def _gram_of_outputs(slices: np.ndarray) -> np.ndarray:
    matrix = slices.reshape(-1, slices.shape[2])
    return matrix.T.dot(matrix)


def _gram_of_inputs(slices: np.ndarray) -> np.ndarray:
    matrix = slices.swapaxes(0, 1).reshape(slices.shape[1], -1)
    return matrix.dot(matrix.T)


def _as_matrix(weight: np.ndarray, factorization: Factorization) -> np.ndarray:
    """The matrix that is approximated: [O, I], or of a separable kernel [O * kw, I * kh]."""
    if factorization is Factorization.SVD:
        return weight.reshape(weight.shape[:2])
    outputs, inputs, height, width = weight.shape
    return weight.transpose(0, 3, 1, 2).reshape(outputs * width, inputs * height)


def _is_wide(matrix: np.ndarray) -> bool:
    return matrix.shape[0] <= matrix.shape[1]
