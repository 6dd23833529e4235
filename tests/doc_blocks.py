"""The code blocks of README and docs, to be run by the tests of the framework they are for."""
from __future__ import annotations

import re
from pathlib import Path
from typing import List, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").rglob("*.md"))]

FRAMEWORKS = ("slimtrain.callbacks", "slimtrain.hooks")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """One fenced block of a page."""

    page: str
    language: str
    text: str


def blocks(language: str) -> List[Block]:
    """All blocks of a language, in the order of the pages."""
    return [block for page in PAGES if page.exists() for block in blocks_of(page) if block.language == language]


def blocks_of(page: Path) -> List[Block]:
    """The blocks of one page."""
    text = page.read_text(encoding="utf-8")
    return [Block(str(page.relative_to(ROOT)), *found) for found in _FENCE.findall(text)]


def pages_with(word: str) -> List[str]:
    """The pages whose Python blocks hold a word."""
    return sorted({block.page for block in blocks("python") if word in block.text})


def code_of(page: str, word: str) -> str:
    """All Python blocks of a page that belong to a framework, as one program.

    A block belongs where a framework's folder is imported in it, or else where the block before it does.
    """
    chosen, mine = [], False
    for block in blocks("python"):
        if block.page == page:
            if any(other in block.text for other in FRAMEWORKS):
                mine = word in block.text
            if mine:
                chosen.append(block.text)
    return "\n".join(chosen)
