"""The pages and the API reference build, strictly, and every public name is in the reference."""
from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import slimtrain.callbacks
import slimtrain.core
from doc_blocks import ROOT

FOLDERS = {"callbacks": slimtrain.callbacks, "core": slimtrain.core}


def test_the_site_builds(tmp_path):
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, package in FOLDERS.items():
        page = (tmp_path / "reference" / ("%s.html" % folder)).read_text(encoding="utf-8")
        described = [name for name in package.__all__ if inspect.isroutine(getattr(package, name))
                     or inspect.isclass(getattr(package, name))]
        missing = [name for name in described if 'id="slimtrain.%s.%s"' % (folder, name) not in page]
        assert missing == []


@pytest.mark.parametrize("folder", ["core", "proto", "callbacks", "hooks"])
def test_every_folder_has_a_page(folder):
    assert (ROOT / "docs" / "reference" / ("%s.md" % folder)).read_text(encoding="utf-8").count("::: slimtrain.") == 1
