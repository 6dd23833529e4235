"""The folders that run on Python 3.7 are written in its syntax. (What 3.7's library lacks only shows when it runs.)"""

import ast

import pytest

from sources import ROOT, library_sources


def parse_as_37(source, name="<source>"):
    return ast.parse(source, name, feature_version=(3, 7))


@pytest.mark.parametrize("path", library_sources("core", "proto", "hooks"), ids=str)
def test_source_is_python_3_7(path):
    parse_as_37((ROOT / path).read_text(encoding="utf-8"), str(path))


@pytest.mark.parametrize("newer", ["if (a := 1): pass", "def f(a, /): pass", "match a:\n    case 1: pass"])
def test_newer_syntax_is_detected(newer):
    with pytest.raises(SyntaxError):
        parse_as_37(newer)
