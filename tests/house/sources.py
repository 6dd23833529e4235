"""The repository as the house tests see it: its files, its folders, and what a Python source imports and calls."""

import ast
import subprocess
from pathlib import Path
from typing import Iterator, List, Set

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("core", "proto", "callbacks", "hooks")


def repository_files() -> List[Path]:
    """Paths, relative to the root, of all files that are tracked or about to be: git's ignore list decides."""
    listing = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True)
    return sorted(Path(name) for name in listing.split("\0") if name and (ROOT / name).is_file())


def library_sources(*folders: str) -> List[Path]:
    """Paths, relative to the root, of the Python sources of the given library folders (all when none is given)."""
    return [path for path in repository_files() if path.suffix == ".py" and path.parts[0] in (folders or FOLDERS)]


def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def imports(tree: ast.Module) -> Set[str]:
    """Full names of all modules that a source imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))
