"""hooks/ and callbacks/ offer the same algorithms under the same names with the same arguments; read by AST alone.

What differs has to be in the tables below, with its reason.
"""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: algorithm -> why one side does not have all of it
ONE_SIDED = {
    "OfflineQuantizer": "a frozen graph has no session to hook into; both sides have the object",
}

#: functions of the seed's interface that only make sense in one framework
FRAMEWORK_ONLY = {
    "MNN_QAT_variables": "graph collections exist in TensorFlow only",
    "get_qat_state_placeholder": "placeholders exist in TensorFlow only; modules know train() and eval()",
    "strip_wq_ops": "the seed's function for TensorFlow; PyTorch's object has it as a method",
    "strip_MNN_QAT_ops": "strips a graph that was read from a file; PyTorch's object is always there",
    "SensitivityAnalyzer": "TensorFlow's objects read sensitivities from a file; PyTorch's see gradients themselves",
    "get_op_weight_values": "the values of a graph are in a session, those of a module in itself",
    "merged_weights": "the values of a graph are in a session; restore_dense and linear_merge_layers change a module",
    "helpers": "operations have names in TensorFlow; modules are named by named_modules()",
}

#: an argument of an algorithm's object -> why only one side has it
ARGUMENTS = {
    "graph": "what a TensorFlow object edits",
    "model": "what a PyTorch object edits",
    "is_training": "a graph is built for training or testing; a module is switched by train() and eval()",
    "skip_quant_flag": "the seed's argument for TensorFlow; PyTorch takes patterns in skip_quant_layers",
    "mode": "offline calibration is the seed's argument for PyTorch",
    "output_names": "a graph also holds the loss; a module is called for its outputs",
    "weight_npy_file": "the values of a graph are in a session, those of a module in itself",
    "sensitivity_npy_file": "the seed's objects for TensorFlow do not see gradients",
    "sensitivity_steps": "TensorFlow's objects read a file of sensitivities; hooks measure as callbacks do",
    "prune_ratio_result_file": "an argument of do_pruning, and of the callbacks as result_file, in PyTorch",
    "example_input": "a graph shows its structure; a module has to be run for it",
    "scale_lr_ratio": "PyTorch's optimizers have parameter groups; TensorFlow's take one learning rate",
}

#: the same for hooks and callbacks, which live in different loops
LOOP_ARGUMENTS = {
    "export_dir": "hooks export beside a checkpoint folder", "export_to": "callbacks export to a stem",
    "export_checkpoints": "hooks always do: TensorFlow's saver keeps the count small",
    "init_checkpoint": "Lightning loads weights before fit", "is_chief": "Lightning knows its own rank",
    "start_from": "hooks take trained weights as weight_npy_file, which may be a checkpoint",
    "checkpoint_dir": "Lightning hands the checkpoint that a run goes on from to its callbacks; sessions do not",
    "result_file": "hooks have the seed's prune_ratio_result_file",
    "train_steps": "a Trainer knows how long it will train; a session does not",
    "weight_bits": "callbacks also convert; slimtrain convert --sparse does it for hooks",
    "module": "a LightningModule may hold several modules", "calibration_batches": "hooks start scales in the graph",
}


def public_names(folder):
    """name -> module that defines it, from the imports of ``__init__``."""
    tree = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names.update((alias.asname or alias.name, node.module) for alias in node.names)
    return names


def constructor(folder, name):
    """Arguments of a class, in order, its own or its base's; None for what is no class with a constructor."""
    for path in sorted((ROOT / folder).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                for item in node.body:
                    if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                        return [argument.arg for argument in item.args.args[1:] + item.args.kwonlyargs]
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                return constructor(folder, bases[0]) if bases else None
    return None


def function_arguments(folder, name):
    """Arguments of a function, in order."""
    for path in sorted((ROOT / folder).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return [argument.arg for argument in node.args.args + node.args.kwonlyargs]
    raise LookupError(name)


def compared(ours, theirs, allowed):
    """What differs although no table allows it."""
    return [name for name in ours if name not in theirs and name not in allowed]


#: what watches the algorithms has a callback and a hook, and no object
WATCHERS = ("CompressionReport",)

HOOKS, CALLBACKS = public_names("hooks"), public_names("callbacks")
ALGORITHMS = sorted(name[:-len("Hook")] for name in HOOKS
                    if name.endswith("Hook") and name[:-len("Hook")] not in WATCHERS)
SHARED = [name for name in [*ALGORITHMS, *ONE_SIDED] if name in HOOKS and name in CALLBACKS]


def test_there_is_something_to_compare():
    assert "LSQQuantizer" in SHARED


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_of_hooks_is_one_of_callbacks(name):
    assert name in HOOKS
    assert name in ONE_SIDED or (name in CALLBACKS and name + "Callback" in CALLBACKS)


@pytest.mark.parametrize("name", sorted(name[:-len("Callback")] for name in CALLBACKS if name.endswith("Callback")
                                        and name[:-len("Callback")] not in WATCHERS))
def test_an_algorithm_of_callbacks_is_one_of_hooks(name):
    assert name in ONE_SIDED or (name in HOOKS and name + "Hook" in HOOKS)


def test_every_other_name_of_hooks_has_a_reason():
    others = [name for name in HOOKS if name not in ALGORITHMS and name[:-len("Hook")] not in (*ALGORITHMS, *WATCHERS)]
    assert [name for name in others if name not in FRAMEWORK_ONLY and name not in CALLBACKS] == []


@pytest.mark.parametrize("name", WATCHERS)
def test_watchers_stand_on_both_sides(name):
    assert name + "Hook" in HOOKS and name + "Callback" in CALLBACKS


@pytest.mark.parametrize("name", SHARED)
def test_objects_take_the_same_arguments_in_the_same_order(name):
    hooks, callbacks = constructor("hooks", name), constructor("callbacks", name)
    assert compared(hooks, callbacks, ARGUMENTS) == []
    assert compared(callbacks, hooks, ARGUMENTS) == []
    common = [argument for argument in hooks if argument in callbacks]
    assert common == [argument for argument in callbacks if argument in hooks]


@pytest.mark.parametrize("name", [name for name in SHARED if name + "Callback" in CALLBACKS and name not in ONE_SIDED])
def test_hooks_and_callbacks_take_the_arguments_of_their_object(name):
    allowed = set(ARGUMENTS) | set(LOOP_ARGUMENTS)
    hook, callback = constructor("hooks", name + "Hook"), constructor("callbacks", name + "Callback")
    assert set(constructor("hooks", name)) <= set(hook)
    assert compared(hook, callback, allowed) == [] and compared(callback, hook, allowed) == []


@pytest.mark.parametrize("name", ["weight_sensitivity", "int8_sensitivity"])
def test_functions_take_the_same_arguments_in_the_same_order(name):
    hooks, callbacks = function_arguments("hooks", name), function_arguments("callbacks", name)
    assert compared(hooks, callbacks, ARGUMENTS) == [] and compared(callbacks, hooks, ARGUMENTS) == []
    assert [each for each in hooks if each in callbacks] == [each for each in callbacks if each in hooks]


def test_the_comparison_finds_a_difference():
    assert compared(["bits", "odd"], ["bits"], ARGUMENTS) == ["odd"]
    assert constructor("hooks", "LSQQuantizer")[:2] == ["graph", "is_training"]
