"""Layers by name and pattern."""

import re

import pytest

from slimtrain.core import select

NAMES = ["stem.conv", "blocks.0.conv", "blocks.0.bn", "blocks.1.conv", "head[0]", "Head"]


@pytest.mark.parametrize("patterns, expected", [
    ([], []),
    (["head[0]"], ["head[0]"]),
    (["blocks.*"], ["blocks.0.conv", "blocks.0.bn", "blocks.1.conv"]),
    (["*.conv"], ["stem.conv", "blocks.0.conv", "blocks.1.conv"]),
    (["blocks.?.conv", "stem.conv", "blocks.1.conv"], ["stem.conv", "blocks.0.conv", "blocks.1.conv"]),
    (["blocks.[1-9].*"], ["blocks.1.conv"]),
    (["*"], NAMES),
])
def test_names_come_in_the_order_of_the_model(patterns, expected):
    assert select(NAMES, patterns) == expected
    assert select(NAMES, tuple(patterns)) == expected


@pytest.mark.parametrize("patterns, nearest", [
    (["stem.conv", "blocks.0.cnv"], "'blocks.0.cnv'; the nearest names are 'blocks.0.conv', 'blocks.1.conv'"),
    (["HEAD"], "'HEAD'; known are 'stem.conv'"),
    (["layer*"], "no layer matches 'layer*'"),
])
def test_a_choice_of_nothing_names_its_neighbours(patterns, nearest):
    with pytest.raises(ValueError, match=re.escape(nearest)):
        select(NAMES, patterns)


def test_no_names_at_all():
    with pytest.raises(ValueError, match="known are none"):
        select([], ["a"])


def test_one_string_is_not_a_list_of_names():
    with pytest.raises(TypeError, match="got the one string 'stem.conv'"):
        select(NAMES, "stem.conv")
    with pytest.raises(TypeError, match="must be a string, got 3"):
        select(NAMES, [3])
