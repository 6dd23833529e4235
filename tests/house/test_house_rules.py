"""Rules of the house that neither the linter nor the type checker knows; each is also shown to catch an offender."""

import ast
import re

import pytest

from sources import FOLDERS, ROOT, calls, imports, library_sources, parsed, repository_files

TOP_LEVEL = {
    ".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "README.zh.md",
    "constraints", "docs", "examples", "mkdocs.yml", "pyproject.toml", "ruff.toml", "setup.cfg", "tests", *FOLDERS}
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|root|home|Users|tmp)\b")
NETWORK = {"aiohttp", "ftplib", "http", "httpx", "requests", "smtplib", "socket", "socketserver", "telnetlib",
           "urllib", "urllib3", "xmlrpc"}
PICKLES = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
MAY_IMPORT = {"core": {"core"}, "proto": {"core", "proto"}, "callbacks": {"core", "proto", "callbacks"},
              "hooks": {"core", "proto", "hooks"}}


def machine_paths(text):
    return [line.strip() for line in text.splitlines() if MACHINE_PATH.search(line)]


def top_names(tree):
    return {name.split(".")[0] for name in imports(tree)}


def unpickling_calls(tree):
    """Lines that ask numpy for pickled data, or torch for a file without refusing it."""
    lines = []
    for call in calls(tree):
        given = {keyword.arg: ast.dump(keyword.value) for keyword in call.keywords}
        allows = "allow_pickle" in given and given["allow_pickle"] != ast.dump(ast.parse("False", mode="eval").body)
        trusts = (ast.unparse(call.func) == "torch.load"
                  and given.get("weights_only") != ast.dump(ast.parse("True", mode="eval").body))
        if allows or trusts:
            lines.append(call.lineno)
    return lines


def printing_lines(tree):
    return [call.lineno for call in calls(tree) if isinstance(call.func, ast.Name) and call.func.id == "print"]


def foreign_folders(tree, folder):
    """Import names of this project that the folder may not know, and the folders under the name they do not have."""
    ours = {name for name in imports(tree) if name.split(".")[0] in {"slimtrain", "", *FOLDERS}}
    allowed = {"slimtrain." + other for other in MAY_IMPORT[folder]}
    return {name for name in ours if ".".join(name.split(".")[:2]) not in allowed}


def beyond_reexports(tree):
    """Lines of an ``__init__.py`` that are not its docstring, an import or ``__all__``."""
    def is_all(node):
        return isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
    body = tree.body[1:] if ast.get_docstring(tree) else tree.body
    return [node.lineno for node in body if not isinstance(node, (ast.Import, ast.ImportFrom)) and not is_all(node)]


def offenders(find, *folders):
    found = {str(path): find(parsed(path)) for path in library_sources(*folders)}
    assert found
    return {path: places for path, places in found.items() if places}


def test_top_level_holds_only_what_belongs_there():
    assert {path.parts[0] for path in repository_files()} - TOP_LEVEL == set()


def test_no_file_names_a_place_on_somebodys_machine():
    found = {}
    for path in repository_files():
        if path.parts[0] != "tests":
            lines = machine_paths((ROOT / path).read_bytes().decode("utf-8", "replace"))
            if lines:
                found[str(path)] = lines
    assert found == {}


@pytest.mark.parametrize("line", ["cd /work/main", "see /root/.cache", "'/tmp/x'", "open(/home/me/x)", "/tmp"])
def test_machine_paths_are_detected(line):
    assert machine_paths(line)


@pytest.mark.parametrize("line", ["frame/work/x", "https://host/root/x", "~/tmp", "net/tmp/x", "/templates", "1 / tmp"])
def test_other_paths_are_not_taken_for_machine_paths(line):
    assert not machine_paths(line)


def test_library_reads_no_pickles():
    assert offenders(lambda tree: top_names(tree) & PICKLES) == {}
    assert offenders(unpickling_calls) == {}


def test_pickles_are_detected():
    assert top_names(ast.parse("def f():\n    import pickle")) & PICKLES
    assert unpickling_calls(ast.parse("np.load(p, allow_pickle=True)\nnp.save(p, x, allow_pickle=flag)")) == [1, 2]
    assert unpickling_calls(ast.parse("torch.load(p)\ntorch.load(p, weights_only=False)")) == [1, 2]
    assert unpickling_calls(ast.parse("torch.load(p, weights_only=True); np.load(p, allow_pickle=False)")) == []


def test_library_knows_no_network():
    assert offenders(lambda tree: top_names(tree) & NETWORK) == {}
    assert top_names(ast.parse("def f():\n    from urllib.request import urlopen")) & NETWORK


def test_library_logs_instead_of_printing():
    assert offenders(printing_lines) == {}
    assert printing_lines(ast.parse("logger.info(1)\ndef f():\n    print(1)")) == [3]


@pytest.mark.parametrize("folder", FOLDERS)
def test_arrows_point_one_way(folder):
    assert offenders(lambda tree: foreign_folders(tree, folder), folder) == {}


def test_wrong_arrows_are_detected():
    source = "import slimtrain.core.grid, slimtrain.hooks\nfrom slimtrain.proto import x\nfrom . import y\nimport core"
    assert foreign_folders(ast.parse(source), "core") == {"slimtrain.hooks", "slimtrain.proto", ".", "core"}
    assert foreign_folders(ast.parse(source), "hooks") == {".", "core"}


def test_init_files_only_reexport():
    inits = [path for path in library_sources() if path.name == "__init__.py"]
    assert len(inits) == len(FOLDERS)
    assert {str(path): beyond_reexports(parsed(path)) for path in inits if beyond_reexports(parsed(path))} == {}
    assert beyond_reexports(ast.parse('"""x"""\nimport a\n__all__ = ["a"]\nb = 1\nif a:\n    pass')) == [4, 5]


def test_library_folders_are_flat():
    """A folder within a folder would be left out of the wheel in silence: setup.cfg lists the packages."""
    assert [str(path) for path in repository_files() if path.parts[0] in FOLDERS and len(path.parts) != 2] == []


def test_test_files_have_names_of_their_own():
    """pytest imports them without packages, by their bare name."""
    names = [path.name for path in repository_files()
             if path.parts[0] == "tests" and path.suffix == ".py" and path.name != "conftest.py"]
    assert len(names) == len(set(names))
    assert "__init__.py" not in names
