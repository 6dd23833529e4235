"""Expanded layers against the chain written out with numpy and the layer's own operation, and their exports."""
import os

import numpy as np
import pytest

import structure_run
import tf_nets
from slimtrain.core import ParameterFileError, sqnr_db
from slimtrain.hooks import (
    LOP,
    LOPHook,
    LSQQuantizer,
    LSQQuantizerHook,
    get_op_weight_values,
    merged_weights,
)
from slimtrain.proto import convert, read_params, run_model
from test_hooks_sessions import checkpoint_values, finish
from test_hooks_sessions import start as start_process
from tf_setup import one_thread, session, tf

EPS = 1e-5


def conv(x, kernel, outputs, strides=(1, 1), dilations=(1, 1), padding="SAME", explicit=()):
    w = tf_nets.variable("w", [*kernel, x.shape.as_list()[-1], outputs], 1)
    return tf.raw_ops.Conv2D(input=x, filter=w, strides=[1, *strides, 1], dilations=[1, *dilations, 1],
                             padding=padding, explicit_paddings=list(explicit), name="layer")


#: name -> layer of an input [3, 11, 12, 6] or [20, 6]
LAYERS = {
    "1x1": lambda x: conv(x, [1, 1], 6),
    "3x3": lambda x: conv(x, [3, 3], 6),
    "3x3, stride 2": lambda x: conv(x, [3, 3], 8, (2, 2)),
    "3x3, valid": lambda x: conv(x, [3, 3], 6, padding="VALID"),
    "5x5, dilation 2": lambda x: conv(x, [5, 5], 6, dilations=(2, 2)),
    "7x7, strides": lambda x: conv(x, [7, 7], 8, (2, 1)),
    "2x3, explicit": lambda x: conv(x, [2, 3], 6, (1, 1), (1, 1), "EXPLICIT", [0, 0, 1, 0, 1, 1, 0, 0]),
    "matrix": lambda x: tf.matmul(x, tf_nets.variable("w", [6, 6], 1), name="layer"),
    "matrix, transposed": lambda x: tf.matmul(x, tf_nets.variable("w", [8, 6], 1), transpose_b=True, name="layer"),
}
BYPASSED = {"1x1", "3x3", "5x5, dilation 2", "2x3, explicit", "matrix"}


class Built:
    """A graph of one layer, expanded."""

    def __init__(self, name, bias, norm, bypass, is_training=None, keep=False, rate=2):
        self.graph, self.name = tf.Graph(), name
        with self.graph.as_default():
            sizes = [20, 6] if name.startswith("matrix") else [3, 11, 12, 6]
            self.x = tf.placeholder(tf.float32, [None] + sizes[1:], name="x")
            raw = LAYERS[name](self.x)
            shape = tf.global_variables()[0].shape.as_list()
            self.dense = np.random.RandomState(1).randn(*shape) * np.prod(shape[:-1]) ** -0.5
            self.channels = raw.shape.as_list()[-1]
            y = tf.nn.bias_add(raw, tf_nets.variable("b", [self.channels], 2, 0.5)) if bias else raw
            self.y = tf.identity(y, name="y")
            self.op = raw.op
            self.lop = LOP(self.graph, is_training)
            self.lop.linear_expand_layers(rate, None, norm, bypass, expand_pointwise=True, expand_linear=True,
                                          keep_weights=keep)
            self.init = tf.global_variables_initializer()
            self.parts = {v.op.name: v for v in tf.global_variables()}
        self.values = np.random.RandomState(5).randn(*sizes) + 0.5

    def feed(self, training):
        return {self.x: self.values, **({} if self.lop.is_training is None else {self.lop.is_training: training})}


def run_layer(op, x, kernel, shape):
    """The layer's own operation in float64, with another kernel [..., I, n]."""
    if kernel.ndim == 2:
        return x.dot(kernel)
    with tf.Graph().as_default() as graph:
        again = graph.create_op("Conv2D", [tf.constant(x), tf.constant(kernel)], [tf.float64], attrs={
            key: value for key, value in op.node_def.attr.items() if key != "T" and not key.startswith("_")})
        with session(graph) as run:
            return run.run(again.outputs[0])


def written_out(built, parts, bypass, training):
    """The chain in float64, as the paper draws it: output, and new averages where it trains."""
    parts = {name[len("w/"):] if name.startswith("w/") else name: np.float64(value) for name, value in parts.items()}
    averages = {}

    def normalized(y, name, centred):
        if name + "_gain" not in parts:
            return y
        flat = y.reshape(-1, y.shape[-1])
        var = flat.var(axis=0) if training else parts[name + "_var"]
        mean = flat.mean(axis=0) if training else parts.get(name + "_mean", 0)
        averages[name + "_var"] = 0.9 * parts[name + "_var"] + 0.1 * flat.var(axis=0, ddof=1)
        averages[name + "_mean"] = 0.1 * flat.mean(axis=0)
        return (y - (mean if centred else 0)) * parts[name + "_gain"] / np.sqrt(var + EPS)

    x = built.values
    y = normalized(x.dot(parts["first"]), "first", False)
    y = run_layer(built.op, y, parts["middle"], None)
    y = normalized(y, "middle", "b" in parts).dot(parts["last"]) + parts.get("b", 0)
    return (y + x if bypass else y), averages


def relative(found, expected):
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("bias, norm, bypass", [(True, True, True), (False, True, True), (True, False, True),
                                                (True, True, False)])
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_trains_like_the_chain_and_equals_what_it_merges_to(name, bias, norm, bypass):
    built = Built(name, bias, norm, bypass)
    bypass = bypass and name in BYPASSED
    (line,) = built.lop.report
    assert line.bypass == bypass and line.parameters[0] == built.dense.size and line.reason == ""
    with session(built.graph) as run:
        run.run(built.init)
        if norm:
            before = run.run(built.parts)
            found = run.run(built.y, built.feed(True))
            expected, averages = written_out(built, before, bypass, True)
            assert relative(found, expected) < 1e-5
            after = run.run(built.parts)
            for part in ("first_var", "middle_var", "middle_mean"):
                np.testing.assert_allclose(after["w/" + part], averages[part], rtol=1e-4, atol=1e-6)
        parts = run.run(built.parts)
        found, old = run.run([built.y, built.op.outputs[0]], built.feed(False))
        weights = merged_weights(run)
        merged = built.lop.linear_merge_layers(run, ["y"])
    expected, _ = written_out(built, parts, bypass, False)
    assert relative(found, expected) < 1e-5
    kernel = np.float64(weights["w"].T if name == "matrix, transposed" else weights["w"])
    shift = np.float64(weights.get("b", parts.get("b", np.zeros(built.channels))))
    assert relative(run_layer(built.op, built.values, kernel, None) + shift, expected) < 1e-5
    assert relative(old + shift, expected) < 1e-5  # fetched by its old name
    constants = {node.name for node in merged.node if node.op == "Const"}
    padding = {"MNN_QAT/layer/padded_input/paddings"} if "explicit" in name else set()  # MNN reads it as a pad only
    assert constants == ({"w", "b"} if bias else {"w"}) | padding
    with tf.Graph().as_default() as small:
        tf.import_graph_def(merged, name="")
        with session(small) as run:
            assert relative(run.run("y:0", {"x:0": built.values}), expected) < 1e-5


@pytest.mark.parametrize("name, norm", [("3x3", True), ("7x7, strides", True), ("1x1", False),
                                        ("matrix, transposed", True)])
def test_weights_are_kept_on_request(name, norm):
    built = Built(name, True, norm, True, keep=True)
    with session(built.graph) as run:
        run.run(built.parts["w/first"].initializer)  # whatever the order
        run.run(built.init)
        weights = merged_weights(run)
        first = run.run(built.parts["w/first"])
    np.testing.assert_allclose(weights["w"], built.dense, atol=2e-6)
    np.testing.assert_allclose(weights.get("b", 0.5 * np.random.RandomState(2).randn(built.channels)),
                               0.5 * np.random.RandomState(2).randn(built.channels), atol=1e-6)
    assert np.ptp(first) > 0


def test_a_finalized_training_graph_merges_with_its_averages():
    with tf.Graph().as_default() as graph:
        x, logits = structure_run.network()
        lop = LOP(graph, True)
        lop.linear_expand_layers(2, None)
        tf.train.GradientDescentOptimizer(0.1).minimize(tf.reduce_sum(logits))
        init = tf.global_variables_initializer()
    graph.finalize()
    with session(graph) as run:
        run.run(init)
        merged = lop.linear_merge_layers(run, ["logits"])
        averages = run.run(next(v for v in graph.get_collection("variables") if v.op.name == "b0/moving_variance"))
    nodes = {node.name: node for node in merged.node}
    assert not nodes["b0/norm"].attr["is_training"].b and nodes["c1/conv"].op == "Conv2D"
    assert {"c0/kernel", "c1/kernel", "c2/kernel", "fc/kernel"} <= set(nodes)
    np.testing.assert_array_equal(tf.make_ndarray(nodes["b0/moving_variance"].attr["value"].tensor), averages)


def test_gradients_reach_every_part():
    built = Built("3x3", True, True, True, is_training=True)
    with built.graph.as_default():
        trained = tf.trainable_variables()
        assert sorted(v.op.name for v in trained) == ["b", "w/first", "w/first_gain", "w/last", "w/middle",
                                                      "w/middle_gain"]
        slopes = tf.gradients(tf.reduce_sum(tf.square(built.y - 1)), trained)
        with session(built.graph) as run:
            run.run(built.init)
            exact = run.run(slopes, built.feed(True))
            for variable, slope in zip(trained, exact):  # central differences along the gradient
                value, step = run.run(variable), 1e-2 * slope / np.linalg.norm(slope)
                ends = []
                for sign in (1, -1):
                    variable.load(value + sign * step, run)
                    ends.append(float(np.sum(np.square(np.float64(run.run(built.y, built.feed(True))) - 1))))
                variable.load(value, run)
                assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(np.linalg.norm(slope), rel=2e-2), variable.op.name


def test_every_layer_that_stays_says_why():
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [2, 8, 8, 16], name="x")
        y = tf_nets.depthwise(tf_nets.conv(x, "good", 16), "deep", bias=True)
        w = tf_nets.variable("g", [3, 3, 4, 16], 5)
        y = tf.nn.relu(tf.nn.conv2d(y, w, strides=1, padding="SAME", name="group"))
        y = tf.nn.relu(tf_nets.conv(tf_nets.conv(y, "one", 16, 1), "skipped", 16))
        y = tf.nn.conv2d(y, tf_nets.variable("e", [3, 3, 16, 16], 5), strides=1, padding="SAME", name="end")
        y = tf_nets.dense(tf.zeros([2, 16]) + tf.reduce_mean(x), "fc", 3)
        lop = LOP(graph)
        lop.linear_expand_layers(2, None, skip_layers=["skipped/*"])
    reasons = {line.name: line.reason for line in lop.report}
    assert reasons.pop("good/conv") == ""
    wanted = {"deep/depthwise": "depthwise", "group": "grouped (4 groups)", "one/conv": "expand_pointwise=True",
              "skipped/conv": "skip_layers", "fc/matmul": "expand_linear=True", "end": "add a bias or tf.identity"}
    assert sorted(reasons) == sorted(wanted)
    for name, words in wanted.items():
        assert words in reasons[name]


def test_bad_arguments_and_wrong_moments_are_refused(tmp_path):
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [2, 8, 8, 6])
        y = tf_nets.conv(x, "c", 6)
        for rate in (0, True, 2.0):
            with pytest.raises(ValueError, match="expand_rate"):
                LOP(graph).linear_expand_layers(rate, None)
        with pytest.raises(TypeError, match="is_training"):
            LOP(graph, "yes")
        with pytest.raises(ValueError, match="nothing to expand.*c/conv: named in skip_layers"):
            LOP(graph).linear_expand_layers(2, None, skip_layers=["c/*"])
        with pytest.raises(ParameterFileError):
            LOP(graph).linear_expand_layers(2, tmp_path / "none.bin", append=True)
        with session(graph) as run:
            with pytest.raises(RuntimeError, match="close that session"):
                LOP(graph)
        lop = LOP(graph)
        with session(tf.Graph()) as run:
            with pytest.raises(RuntimeError, match="nothing is expanded"):
                lop.linear_merge_layers(run, ["c/biased"])
            lop.linear_expand_layers(2, tmp_path / "params.bin")
            with pytest.raises(RuntimeError, match="not of the graph"):
                lop.linear_merge_layers(run, ["c/biased"])
        assert not read_params(tmp_path / "params.bin").algo
        with pytest.raises(RuntimeError, match="decomposed or expanded already"):
            lop.linear_expand_layers(2, None)
        with pytest.raises(RuntimeError, match="add_batchnorm=False"):
            LSQQuantizer(graph, True)
        tf.gradients(y, tf.trainable_variables())
        with pytest.raises(RuntimeError, match="gradients"):
            LOP(graph)


def judged(folder, name, make_hook):
    """Train with a quantizer in the same graph; its integers, and what MNN computes from what it exported."""
    stem, made, found = os.path.join(folder, "export", "model"), [], {}

    class Judge(tf.train.SessionRunHook):
        def end(self, run):
            found["logits"] = made[0].quantizer.simulate(run, ["logits"], {"x:0": structure_run.batch(77)})[0]

    def quantize():
        made.append(LSQQuantizerHook(is_training=True, output_names=["logits"],
                                     export_dir=os.path.join(folder, "export")))
        return [made[0], Judge()]

    structure_run.HOOKS["judged"] = make_hook
    structure_run.train("judged", folder, 4, make_others=quantize)
    assert not os.path.exists(os.path.join(folder, "judged-export", "model.pb"))  # one of them exports
    conversion = convert(stem + ".pb", stem + ".mnn", stem + ".compress_params.bin")
    (output,) = run_model(stem + ".mnn", {"x": structure_run.batch(77).astype(np.float32)}).values()
    return found["logits"], output, conversion.coverage, made[0].quantizer.coverage()


def test_decomposed_and_quantized_in_one_run_deploys_exactly(tmp_path):
    structure_run.save_weights(str(tmp_path / "weights.npy"))
    integers, output, converted, trained = judged(str(tmp_path), "low_rank", structure_run.low_rank)
    assert converted.fraction == trained.fraction == 1.0
    assert len(trained.layers) == 1 + 3 + 2 + 2 and len(converted.layers) == 8
    assert np.ptp(integers) > 0 and sqnr_db(integers, output) >= 100


@pytest.mark.parametrize("options", [{"add_batchnorm": False}, {"is_training": False}])
def test_expanded_with_fixed_statistics_and_quantized_in_one_run_deploys_exactly(options, tmp_path):
    def hook(folder, **arguments):
        return LOPHook(2, expand_linear=True, expand_pointwise=True, **options, **arguments)

    integers, output, converted, trained = judged(str(tmp_path), "lop", hook)
    assert converted.fraction == trained.fraction == 1.0 and len(trained.layers) == len(converted.layers) == 4
    assert np.ptp(integers) > 0 and sqnr_db(integers, output) >= 100


def test_two_runs_quantize_what_normalization_trained(tmp_path):
    structure_run.train("lop", str(tmp_path), 4)
    x_values = structure_run.batch(77).astype(np.float32)
    stem = str(tmp_path / "lop-export" / "model")
    convert(stem + ".pb", stem + ".mnn", stem + ".compress_params.bin")
    assert not read_params(stem + ".compress_params.bin").algo
    exported = tf.GraphDef()
    with open(stem + ".pb", "rb") as file:
        exported.ParseFromString(file.read())
    constants = {node.name: tf.make_ndarray(node.attr["value"].tensor) for node in exported.node if node.op == "Const"}
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(exported, name="")
        with session(graph) as run:
            expected = run.run("logits:0", {"x:0": x_values})
    (output,) = run_model(stem + ".mnn", {"x": x_values}).values()
    assert sqnr_db(expected, output) >= 100
    with tf.Graph().as_default() as graph:  # for evaluation, with the averages
        structure_run.network()
        LOP(graph, is_training=False).linear_expand_layers(2, None, expand_linear=True)
        saver = tf.train.Saver()
        with session(graph) as run:
            saver.restore(run, tf.train.latest_checkpoint(str(tmp_path / "lop" / "ckpt")))
            get_op_weight_values(run, tmp_path / "merged.npy")
    with np.load(str(tmp_path / "merged.npy"), allow_pickle=False) as values:
        for name in ("c0/kernel", "c1/kernel", "c1/bias", "c2/kernel", "c2/bias", "fc/kernel", "fc/bias"):
            np.testing.assert_allclose(values[name], constants[name], rtol=1e-6, atol=1e-7)
    with tf.Graph().as_default():
        structure_run.network()
        hook = LSQQuantizerHook(is_training=True, init_checkpoint=str(tmp_path / "merged.npy"))
        with tf.train.MonitoredTrainingSession(hooks=[hook], config=one_thread()) as run:
            variable = next(v for v in tf.global_variables() if v.op.name == "c1/kernel")
            np.testing.assert_allclose(run.run(variable), constants["c1/kernel"], rtol=1e-6, atol=1e-7)


def test_killed_runs_end_as_those_never_killed(tmp_path):
    script = structure_run.__file__
    names = ["low_rank", "lop"]
    finish(start_process(tmp_path / "whole", 8, *names, script=script))
    for name in names:
        finish(start_process(tmp_path / "killed", 8, name, "--kill", 5, script=script), wanted=-9)
    for name in names:
        assert 0 < checkpoint_values(tmp_path / "killed" / name)["global_step"] < 8
    (tmp_path / "killed" / "weights.npy").write_bytes(b"")  # a resumed run needs the weights no more
    finish(start_process(tmp_path / "killed", 8, *names, script=script))
    for name in names:
        whole, resumed = (checkpoint_values(tmp_path / run / name) for run in ("whole", "killed"))
        assert sorted(whole) == sorted(resumed)
        for key in whole:
            np.testing.assert_array_equal(resumed[key], whole[key], err_msg=key)
        for suffix in (".pb", ".compress_params.bin"):
            files = [tmp_path / run / (name + "-export") / ("model" + suffix) for run in ("whole", "killed")]
            assert files[0].read_bytes() == files[1].read_bytes()
