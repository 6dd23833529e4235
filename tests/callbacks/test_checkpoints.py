"""From any checkpoint: load without slimtrain, resume, export."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from nets import Lit, Small, images, loader, trainer
from slimtrain.callbacks import LSQQuantizer, LSQQuantizerCallback
from slimtrain.callbacks.checkpoints import SIDECAR_SUFFIX, read_saved
from slimtrain.core import SlimtrainError

HERE = os.path.dirname(os.path.abspath(__file__))
X = images(4, seed=9)[0]


def train(folder, *, weights_only=False, keep=1, name="{step}", **options):
    """Fit two epochs with a checkpoint at each end; returns the module, the callback and the last file."""
    saver = ModelCheckpoint(str(folder / "kept"), name, save_top_k=keep, every_n_epochs=1, monitor=None if keep in
                            (0, 1, -1) else "step", mode="max", save_weights_only=weights_only)
    model, callback = Lit(), LSQQuantizerCallback(export_to="", **options)
    trainer(folder, callback, saver).fit(model, loader())
    return model, callback, saver.best_model_path or saver.last_model_path


@pytest.fixture(scope="module", params=[False, True], ids=["full", "weights only"])
def trained(request, tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), weights_only=request.param, bits=4)


def test_state_dict_is_that_of_the_float_model(trained):
    model, _, path = trained
    content = torch.load(path, weights_only=True)
    assert list(content["state_dict"]) == list(Lit().state_dict())
    for name, value in content["state_dict"].items():
        assert torch.equal(value, model.state_dict()[name])


def test_loads_where_slimtrain_does_not_exist(trained):
    _, _, path = trained
    model = trained[0]
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "slimtrain":
            raise ImportError("slimtrain is not here")
sys.meta_path.insert(0, Refuse())
import torch
from nets import Lit, images
model = Lit.load_from_checkpoint(sys.argv[1]).eval()
assert not any("slimtrain" in name for name in sys.modules), sys.modules
assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
with torch.no_grad():
    torch.save(model(images(4, seed=9)[0]), sys.argv[2])
"""
    out = path + ".outputs"
    environment = {**os.environ, "PYTHONPATH": HERE, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, path, out], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plain = Lit().eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(torch.load(out, weights_only=True), plain(X))


def test_quantizer_comes_back_from_a_checkpoint(trained):
    model, callback, path = trained
    other = LSQQuantizer.from_checkpoint(Lit(), path)
    assert other.configuration() == callback.quantizer.configuration()
    model.eval(), other.model.eval()
    with torch.no_grad():
        assert torch.equal(other.model(X), model(X))
        other.strip_qat_ops()
        assert not torch.equal(other.model(X), model(X))


def test_files_from_a_checkpoint_are_those_of_the_end_of_training(trained, tmp_path):
    _, callback, path = trained
    wanted = callback.export(str(tmp_path / "live"), X)
    found = LSQQuantizer.from_checkpoint(Lit(), path).export(tmp_path / "again", X)
    assert Path(found.params).read_bytes() == Path(wanted.params).read_bytes()
    weights = [[onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
               for path in (wanted.onnx, found.onnx)]
    assert all(np.array_equal(a, b) for a, b in zip(*weights))


def test_sidecar_only_beside_weights_only(tmp_path):
    _, _, full = train(tmp_path / "a")
    _, _, weights = train(tmp_path / "b", weights_only=True)
    assert not os.path.exists(full + SIDECAR_SUFFIX) and os.path.exists(weights + SIDECAR_SUFFIX)


def test_sidecars_go_with_their_checkpoints(tmp_path):
    train(tmp_path, weights_only=True, keep=1)
    files = sorted(os.listdir(tmp_path / "kept"))
    assert files == ["step=8.ckpt", "step=8.ckpt" + SIDECAR_SUFFIX]


def test_sidecar_of_another_step_is_refused(tmp_path):
    _, _, path = train(tmp_path, weights_only=True)
    content = torch.load(path, weights_only=True)
    content["global_step"] += 1
    torch.save(content, path)
    with pytest.raises(SlimtrainError, match="step 8 and the checkpoint at step 9"):
        read_saved(path, "LSQQuantizer")


def test_full_checkpoint_beats_a_stale_sidecar(tmp_path):
    _, callback, path = train(tmp_path / "a", bits=4)
    _, _, other = train(tmp_path / "b", weights_only=True, bits=8)
    os.replace(other + SIDECAR_SUFFIX, path + SIDECAR_SUFFIX)
    assert read_saved(path, "LSQQuantizer").state["configuration"]["weight_bits"] == 4


def test_float_checkpoint_has_no_state(tmp_path):
    saver = ModelCheckpoint(str(tmp_path), "float")
    trainer(tmp_path, saver, max_epochs=1).fit(Lit(), loader())
    with pytest.raises(SlimtrainError, match="hold none; expected the state of one LSQQuantizer"):
        LSQQuantizer.from_checkpoint(Lit(), saver.best_model_path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(40)])
def test_damaged_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(SlimtrainError, match="x.ckpt cannot be read"):
        LSQQuantizer.from_checkpoint(Lit(), tmp_path / "x.ckpt")


def test_checkpoint_of_another_model_is_refused(trained):
    with pytest.raises(RuntimeError, match="size mismatch"):
        LSQQuantizer.from_checkpoint(Lit(width=8), trained[2])


def test_state_of_other_bits_is_refused():
    model = Small()
    quantizer = LSQQuantizer(model, bits=4)
    quantizer.calibrate([X])
    with pytest.raises(ValueError, match="weight_bits=4, this quantizer has 8"):
        LSQQuantizer(Small()).load_state_dict(quantizer.state_dict())


def test_state_of_other_layers_is_refused():
    state = LSQQuantizer(Small(), ["head"]).state_dict()
    with pytest.raises(ValueError, match="other layers.*head"):
        LSQQuantizer(Small()).load_state_dict(state)


def test_state_of_a_plain_loop(tmp_path):
    model = Small()
    quantizer = LSQQuantizer(model, bits=3, skip_quant_layers=["stem"], weight_bits=5)
    quantizer.convert()
    model(X)
    torch.save({"model": model.state_dict(), "quantizer": quantizer.state_dict()}, tmp_path / "x.pt")
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    other = Small()
    other.load_state_dict(saved["model"])
    again = LSQQuantizer.from_state(other, saved["quantizer"])
    assert torch.equal(again.simulate(X), quantizer.simulate(X))


def test_export_checkpoints_writes_files_beside_each(tmp_path):
    train(tmp_path, keep=-1, export_checkpoints=True)
    files = sorted(os.listdir(tmp_path / "kept"))
    stems = [f[:-len(".ckpt")] for f in files if f.endswith(".ckpt")]
    assert len(stems) == 2
    assert sorted(files) == sorted(s + e for s in stems for e in (".ckpt", ".onnx", ".compress_params.bin"))
    kept = [LSQQuantizer.from_checkpoint(Lit(), tmp_path / "kept" / (stem + ".ckpt")) for stem in stems]
    for stem, quantizer in zip(stems, kept):
        found = quantizer.export(tmp_path / "again", images(8)[0])
        assert Path(found.params).read_bytes() == (tmp_path / "kept" / (stem + ".compress_params.bin")).read_bytes()
