"""Merged kernels against running the convolutions one after the other."""

import numpy as np
import pytest

from convolution import convolve
from slimtrain.core import (
    Affine,
    axis_owners,
    chain_error,
    chain_multiply_adds,
    chain_parameters,
    compose_chain,
    identity_tap,
    merge_chain,
)

CHAINS = {
    "1x1": [(5, 3, 1, 1)],
    "1x1 3x3 1x1": [(5, 3, 1, 1), (7, 5, 3, 3), (4, 7, 1, 1)],
    "1x1 5x7": [(5, 3, 1, 1), (4, 5, 5, 7)],
    "3x1 1x5": [(6, 3, 3, 1), (4, 6, 1, 5)],
    "1x1 1x3 2x1 1x1": [(2, 3, 1, 1), (5, 2, 1, 3), (6, 5, 2, 1), (4, 6, 1, 1)],
}


def run(chain, x, stride, padding, dilation):
    """Each kernel with the axis settings it owns, all padding in front."""
    owners = axis_owners([link.weight.shape for link in chain])
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2), "constant")
    for index, link in enumerate(chain):
        own = [tuple(value[axis] if owners[axis] == index else 1 for axis in (0, 1)) for value in (stride, dilation)]
        x = convolve(x, link.weight, link.bias, stride=own[0], dilation=own[1])
    return x


@pytest.mark.parametrize("name", sorted(CHAINS))
@pytest.mark.parametrize("biases", ["none", "all", "first", "last"])
@pytest.mark.parametrize("stride, padding, dilation", [
    ((1, 1), (0, 0), (1, 1)), ((2, 1), (1, 2), (1, 1)), ((1, 3), (2, 0), (2, 1)), ((2, 2), (3, 3), (2, 2))])
def test_merged_equals_one_after_the_other(name, biases, stride, padding, dilation):
    rng = np.random.RandomState(0)
    shapes = CHAINS[name]
    wanted = {"none": set(), "all": set(range(9)), "first": {0}, "last": {len(shapes) - 1}}[biases]
    chain = [Affine(rng.randn(*shape).astype(np.float32), rng.randn(shape[0]) if index in wanted else None)
             for index, shape in enumerate(shapes)]
    x = rng.randn(2, 3, 15, 16)
    merged = merge_chain(chain)
    assert (merged.bias is None) == (biases == "none")
    found = convolve(x, merged.weight, merged.bias, stride, padding, dilation)
    np.testing.assert_allclose(found, run(chain, x, stride, padding, dilation), rtol=1e-10, atol=1e-10)


def test_linear_layers_merge_too():
    rng = np.random.RandomState(1)
    first, second = Affine(rng.randn(5, 3), rng.randn(5)), Affine(rng.randn(4, 5), rng.randn(4))
    merged, x = merge_chain([first, second]), rng.randn(3)
    np.testing.assert_allclose(merged.weight.dot(x) + merged.bias,
                               second.weight.dot(first.weight.dot(x) + first.bias) + second.bias, rtol=1e-12)


@pytest.mark.parametrize("extents, padding, dilation", [
    ((1, 1), (0, 0), (1, 1)), ((3, 3), (1, 1), (1, 1)), ((5, 7), (2, 3), (1, 1)), ((3, 5), (2, 2), (2, 1)),
    ((3, 1), (4, 0), (4, 1))])
def test_ones_at_the_tap_pass_the_input(extents, padding, dilation):
    x, weight = np.random.RandomState(2).randn(2, 4, 9, 11), np.zeros((4, 4) + extents)
    tap = identity_tap(extents, (1, 1), [(p, p) for p in padding], dilation)
    weight[(slice(None), slice(None)) + tap] = np.eye(4)
    np.testing.assert_allclose(convolve(x, weight, padding=padding, dilation=dilation), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("extents, stride, padding, dilation", [
    ((3, 3), (2, 1), (1, 1), (1, 1)), ((3, 3), (1, 1), (0, 1), (1, 1)), ((3, 3), (1, 1), (1, 1), (2, 1))])
def test_no_identity_where_the_shape_changes(extents, stride, padding, dilation):
    assert identity_tap(extents, stride, [(p, p) for p in padding], dilation) is None


def test_even_kernels_have_an_identity_if_one_tap_sees_the_place():
    assert identity_tap((4,), (1,), [(1, 2)], (1,)) == (1,)
    assert identity_tap((2,), (1,), [(1, 2)], (3,)) is None
    assert identity_tap((2,), (1,), [(0, 3)], (3,)) == (0,)
    assert identity_tap((3,), (1,), [(2, 4)], (3,)) is None


@pytest.mark.parametrize("shapes", [[(5, 3, 1, 1), (4, 6, 1, 1)], [(5, 3, 3, 1), (4, 5, 3, 1)], [(5, 3), (4, 5, 1, 1)]])
def test_kernels_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="cannot be merged"):
        compose_chain([np.zeros(shape) for shape in shapes])


def test_nothing_cannot_be_merged():
    with pytest.raises(ValueError, match="at least one"):
        merge_chain([])


def test_costs_by_hand():
    tucker = [(4, 16, 1, 1), (6, 4, 3, 3), (32, 6, 1, 1)]
    assert chain_parameters(tucker) == 64 + 216 + 192
    assert chain_multiply_adds(tucker, (1, 1)) == 64 + 216 + 192
    assert chain_multiply_adds(tucker, (2, 2)) == 4 * 64 + 216 + 192
    assert chain_multiply_adds([(4, 16, 1, 1), (32, 4, 1, 1)], (2, 2)) == 64 + 128
    assert chain_multiply_adds([(4, 16, 3, 1), (32, 4, 1, 3)], (2, 3)) == 3 * 192 + 384
    assert chain_multiply_adds([(4, 16), (32, 4)], ()) == 64 + 128


def test_relative_error_by_hand():
    assert chain_error(np.array([[3.0, 4.0]]), [np.array([[3.0, 0.0]])]) == pytest.approx(0.8)
    assert chain_error(np.zeros((2, 2)), [np.zeros((2, 2))]) == 0.0
