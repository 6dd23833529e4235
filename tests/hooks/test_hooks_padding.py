"""SAME padding where the kernel is shorter than its stride: MNN's own differs there, what is exported must not."""
import numpy as np
import pytest

import tf_nets
from deploying import deployed
from slimtrain.core import LayerState, sqnr_db
from slimtrain.hooks import LSQQuantizer, OfflineQuantizer, WeightQuantizer, strip_MNN_QAT_ops
from slimtrain.proto import convert, run_model
from tf_setup import session, tf

#: (kernel, stride, size of the input): all padding is less than none, one axis' is, MNN's rounds to none, all is more
CASES = {"1x1": ((1, 1), 3, (12, 12)), "wide": ((1, 3), 3, (12, 10)), "tall": ((3, 1), 3, (10, 12)),
         "2x2": ((2, 2), 4, (16, 13)), "3x3": ((3, 3), 5, (13, 10)), "one": ((2, 2), 3, (12, 12)),
         "exact": ((1, 1), 3, (13, 10))}


def values(shape, seed=0):
    return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def strided(x, kind, kernel, stride, name="strided"):
    steps, channels = [1, stride, stride, 1], x.shape.as_list()[-1]
    if kind == "depthwise":
        return tf.nn.depthwise_conv2d(x, tf_nets.variable(name, [*kernel, channels, 1], 1), steps, "SAME", name=name)
    return tf.nn.conv2d(x, tf_nets.variable(name, [*kernel, channels, 8], 1), steps, "SAME", name=name + "/conv")


def net(x, kind, kernel, stride):
    y = tf.nn.relu(tf_nets.conv(x, "before", 8, 1, seed=3))
    y = tf.nn.relu(tf.nn.bias_add(strided(y, kind, kernel, stride), tf_nets.variable("bias", [8], 2)))
    return tf_nets.conv(y, "after", 4, 1, seed=5)


def frozen(build, size, known=True):
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None, *(size if known else (None, None)), 3], name="x")
        y = tf.identity(build(x), name="y")
        init = tf.global_variables_initializer()
        with session(graph) as run:
            run.run(init)
            return tf.graph_util.convert_variables_to_constants(run, graph.as_graph_def(), [y.op.name])


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("kind", ["conv", "depthwise"])
def test_int8_deploys_as_simulated_and_means_what_the_float_network_does(kind, case, tmp_path, caplog):
    kernel, stride, size = CASES[case]
    graph_def = frozen(lambda x: net(x, kind, kernel, stride), size)
    quantizer = OfflineQuantizer(graph_def, output_names=["y"])
    x = values((2, *size, 3))
    quantizer.calibrate([x])
    quantizer.export(tmp_path / "net")
    (integers,) = quantizer.simulate(["y"], {"x:0": x})
    coverage, output = deployed(str(tmp_path / "net"), x)
    assert coverage.fraction == 1.0 and len(coverage.layers) == 3
    assert "MNN computes it wrongly" not in caplog.text
    assert sqnr_db(integers, output) >= 100
    assert sqnr_db(plain(graph_def, x), output) > 25


def plain(graph_def, x):
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        with session(graph) as run:
            return run.run("y:0", {"x:0": x})


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_converter_alone_begins_elsewhere_and_we_say_so(case, tmp_path, caplog):
    kernel, stride, size = CASES[case]
    graph_def, x = frozen(lambda x: strided(x, "conv", kernel, stride), size), values((2, *size, 3))
    (tmp_path / "net.pb").write_bytes(graph_def.SerializeToString())
    convert(tmp_path / "net.pb", tmp_path / "net.mnn")
    (output,) = run_model(tmp_path / "net.mnn", {"x": x}).values()
    assert (sqnr_db(plain(graph_def, x), output) > 100) == (case in ("one", "exact"))
    assert ("right for some sizes of its input only" in caplog.text) == (case != "one")


@pytest.mark.parametrize("case, size", [("1x1", (12, 12)), ("wide", (12, 12)), ("wide", (15, 11)), ("2x2", (13, 10)),
                                        ("2x2", (9, 16))])
def test_any_size_that_is_known_at_run_time_only(case, size, tmp_path, caplog):
    kernel, stride, _ = CASES[case]
    graph_def = frozen(lambda x: net(x, "conv", kernel, stride), size, known=False)
    quantizer = OfflineQuantizer(graph_def, output_names=["y"])
    x = values((2, *size, 3))
    quantizer.calibrate([x])
    quantizer.export(tmp_path / "net")
    (integers,) = quantizer.simulate(["y"], {"x:0": x})
    coverage, output = deployed(str(tmp_path / "net"), x)
    assert coverage.fraction == 1.0
    assert "MNN computes it wrongly" not in caplog.text
    assert sqnr_db(integers, output) >= 100


def test_the_first_layer_may_be_one_and_another_may_read_its_input_too(tmp_path):
    def build(x):
        y = tf.nn.relu(strided(x, "conv", (1, 3), 3, "left")) + tf.nn.relu(strided(x, "conv", (5, 3), 3, "right"))
        return tf_nets.conv(y, "after", 4, 1, seed=5)

    graph_def, x = frozen(build, (12, 10)), values((2, 12, 10, 3))
    quantizer = OfflineQuantizer(graph_def, output_names=["y"])
    quantizer.calibrate([x])
    quantizer.export(tmp_path / "net")
    (integers,) = quantizer.simulate(["y"], {"x:0": x})
    coverage, output = deployed(str(tmp_path / "net"), x)
    assert coverage.fraction == 1.0 and sqnr_db(integers, output) >= 100


@pytest.mark.parametrize("case", ["1x1", "wide"])
def test_layers_that_stay_float_are_exact_too(case, tmp_path):
    """Skipped by a quantizer; or with weights of few bits, whose file names its layers."""
    kernel, stride, size = CASES[case]
    x, graph = values((2, *size, 3)), tf.Graph()
    with graph.as_default():
        y = net(tf.placeholder(tf.float32, [None, *size, 3], name="x"), "conv", kernel, stride)
        quantizer = WeightQuantizer(graph, bits=4, output_names=[y.name])
        init = tf.global_variables_initializer()
    with session(graph) as run:
        run.run(init)
        quantizer.export(str(tmp_path / "weights"), run)
        (expected,) = quantizer.simulate(run, [y.name], {"x:0": x})
    conversion = convert(tmp_path / "weights.pb", tmp_path / "weights.mnn", tmp_path / "weights.compress_params.bin")
    assert conversion.weight_only.share(LayerState.WEIGHT_ONLY) == 1.0 and len(conversion.weight_only.layers) == 3
    (output,) = run_model(tmp_path / "weights.mnn", {"x": x}).values()
    assert sqnr_db(expected, output) >= 100

    offline = OfflineQuantizer(frozen(lambda x: net(x, "conv", kernel, stride), size),
                               ["before/conv", "strided/conv"], output_names=["y"])
    offline.calibrate([x])
    offline.export(tmp_path / "skipped")
    (integers,) = offline.simulate(["y"], {"x:0": x})
    assert sqnr_db(integers, deployed(str(tmp_path / "skipped"), x)[1]) >= 100


@pytest.mark.parametrize("case", ["1x1", "wide"])
def test_a_graph_that_is_stripped_in_place(case, tmp_path):
    kernel, stride, size = CASES[case]
    x, graph = values((2, *size, 3)), tf.Graph()
    with graph.as_default():
        given = tf.placeholder(tf.float32, [None, *size, 3], name="x")
        y = tf.identity(net(given, "conv", kernel, stride), name="y")
        quantizer = LSQQuantizer(graph, True, output_names=["y"])
        step = tf.train.GradientDescentOptimizer(1e-3).minimize(tf.reduce_mean(tf.square(y)))
        init = tf.global_variables_initializer()
    with session(graph) as run:
        run.run(init)
        run.run(step, {given: x})
        quantizer.save_compress_params(str(tmp_path / "net.compress_params.bin"), run)
        (integers,) = quantizer.simulate(run, ["y"], {"x:0": x})
        strip_MNN_QAT_ops(graph)
        graph_def = tf.graph_util.convert_variables_to_constants(run, graph.as_graph_def(), ["y"])
    (tmp_path / "net.pb").write_bytes(graph_def.SerializeToString())
    coverage, output = deployed(str(tmp_path / "net"), x)
    assert coverage.fraction == 1.0 and sqnr_db(integers, output) >= 100
