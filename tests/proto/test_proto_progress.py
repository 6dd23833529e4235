"""Progress bars: on a terminal, for several items, of one process."""
import io

import pytest
from rich.console import Console

from slimtrain.proto.progress import with_progress


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=80)


def shown(items, terminal=True):
    where = console(terminal)
    passed = list(with_progress(items, "calibrating", where))
    assert passed == [1, 2, 3][:len(passed)]
    assert passed
    return where.file.getvalue()


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_a_terminal_shows_what_is_done():
    text = shown([1, 2, 3])
    assert "calibrating" in text
    assert "100%" in text


def test_items_without_a_length_pass_too():
    assert "calibrating" in shown(iter([1, 2, 3]))


def test_nothing_is_shown_where_nobody_looks(monkeypatch):
    assert shown([1, 2, 3], terminal=False) == ""
    assert shown([1]) == ""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert shown([1, 2, 3]) == ""


def test_an_error_of_the_work_comes_through():
    numbers = (1 // number for number in (1, 0))
    with pytest.raises(ZeroDivisionError):
        list(with_progress(numbers, "calibrating", console(True)))
