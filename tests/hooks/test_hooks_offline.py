"""Offline quantization of frozen graphs: observers against the tensors themselves, deployment against MNN."""
import logging

import numpy as np
import pytest

import tf_nets
from deploying import deployed, images
from slimtrain.core import ActivationMethod, ConversionError, Observation, calibrated_scale, observe, sqnr_db
from slimtrain.hooks import OfflineQuantizer
from tf_setup import session, tf


def frozen(net, folder=None):
    """The frozen GraphDef of a network in its test form, its output's name and, with a folder, the path of the file."""
    graph = tf.Graph()
    with graph.as_default():
        tf.set_random_seed(1)
        x = tf.placeholder(tf.float32, [None, 12, 12, 3], name="x")
        y = net(x, False)
        init = tf.global_variables_initializer()
    with session(graph) as run:
        run.run(init)
        result = tf.graph_util.convert_variables_to_constants(run, graph.as_graph_def(), [y.op.name])
    if folder is None:
        return result, y.op.name
    (folder / "frozen.pb").write_bytes(result.SerializeToString())
    return str(folder / "frozen.pb"), y.op.name


def batches(count=4, seed=0):
    rng = np.random.RandomState(seed)
    return [{"x": rng.randn(4, 12, 12, 3).astype(np.float32)} for _ in range(count)]


def float_result(graph_def, name, x):
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        with session(graph) as run:
            return run.run(name + ":0", {"x:0": x})


@pytest.mark.parametrize("net", [tf_nets.plain_net, tf_nets.wide_net, tf_nets.pool_net],
                         ids=["plain", "wide", "pools"])
def test_a_frozen_file_deploys_as_simulated(net, tmp_path):
    path, output = frozen(net, tmp_path)
    quantizer = OfflineQuantizer(path, output_names=[output])
    assert quantizer.calibrate(iter(batches())) == 4
    assert set(quantizer.batches_seen().values()) == {4}
    assert quantizer.coverage().fraction == 1.0
    quantizer.export(tmp_path / "net")
    x = images()
    (integers,) = quantizer.simulate([output], {"x:0": x})
    coverage, found = deployed(str(tmp_path / "net"), x)
    assert coverage.fraction == 1.0
    assert sqnr_db(integers, found) >= 100
    assert sqnr_db(float_result(quantizer.clean, output, x), integers) > 20


@pytest.mark.parametrize("method", [method.value for method in ActivationMethod])
def test_the_scale_of_the_input_is_that_of_the_core(method, tmp_path):
    graph_def, output = frozen(tf_nets.plain_net)
    quantizer = OfflineQuantizer(graph_def, method=method, output_names=[output], bits=6)
    quantizer.calibrate(batches())
    quantizer.export(tmp_path / "net")
    seen = Observation()
    for batch in batches():
        seen = observe(seen, batch["x"])
    (owner,) = [owner for owner, tensors in quantizer._watched.items() if "x:0" in tensors]
    scale, grid = quantizer._scales[owner]
    assert scale == pytest.approx(calibrated_scale(seen, grid, ActivationMethod(method)))
    (integers,) = quantizer.simulate([output], {"x:0": images()})
    _, found = deployed(str(tmp_path / "net"), images())
    assert sqnr_db(integers, found) >= 100


def test_skipped_layers_and_bad_input_are_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    graph_def, output = frozen(tf_nets.pool_net)
    quantizer = OfflineQuantizer(graph_def, ["c1/conv"], output_names=[output], debug_info=True)
    assert {row.name: row.reason for row in quantizer.coverage().missing} == {"c1/conv": "it was skipped"}
    with pytest.raises(RuntimeError, match="calibrate"):
        quantizer.export(tmp_path / "net")
    with pytest.raises(ValueError, match="at least one batch"):
        quantizer.calibrate([])
    with pytest.raises(ValueError, match="not finite"):
        quantizer.calibrate([np.full((1, 12, 12, 3), np.nan, np.float32)])
    quantizer.calibrate([images()])
    assert "from 1 batches" in caplog.text
    with pytest.raises(ValueError, match="no layer matches"):
        OfflineQuantizer(graph_def, ["nothing"], output_names=[output])
    with pytest.raises(ValueError, match="'ema', 'kl'"):
        OfflineQuantizer(graph_def, method="best", output_names=[output])
    (tmp_path / "broken.pb").write_bytes(b"\xff\xff no graph")
    with pytest.raises(ConversionError, match="broken.pb"):
        OfflineQuantizer(tmp_path / "broken.pb")
