"""Decomposed graphs against products of their factors that are multiplied out here, and against the dense network."""
import gc
import json
import os

import numpy as np
import pytest

import structure_run
import tf_nets
from slimtrain.core import BudgetRanks, Cost, ExplicitRanks, ParameterFileError, SlimtrainError
from slimtrain.hooks import (
    LowRankDecomposition,
    LowRankDecompositionHook,
    LSQQuantizer,
    apply_structure,
    get_op_weight_values,
    low_rank_decompose,
    merged_weights,
    structure_in,
    structure_of,
)
from slimtrain.hooks.helpers import get_op_name_of_type
from slimtrain.hooks.operations import forward_names
from slimtrain.hooks.pruning_layers import prunable_weights
from slimtrain.proto import read_params
from tf_setup import one_thread, session, tf


def conv2d(kernel, strides=(1, 1), dilations=(1, 1), padding="SAME", explicit=()):
    def build(x):
        w = tf_nets.variable("w", list(kernel) + [12, 20], 1)
        return tf.raw_ops.Conv2D(input=x, filter=w, strides=[1, *strides, 1], dilations=[1, *dilations, 1],
                                 padding=padding, explicit_paddings=list(explicit), name="layer")
    return build, [2, 9, 10, 12]


def conv1d():
    def build(x):
        w = tf_nets.variable("w", [3, 12, 20], 1)
        return tf.nn.conv1d(x, w, 2, "SAME", name="layer")
    return build, [2, 9, 12]


def matmul(transpose_a=False, transpose_b=False):
    def build(x):
        w = tf_nets.variable("w", [20, 12] if transpose_b else [12, 20], 1)
        return tf.matmul(x, w, transpose_a=transpose_a, transpose_b=transpose_b, name="layer")
    return build, [12, 7] if transpose_a else [7, 12]


#: name -> (layer and shape of its input, ranks)
LAYERS = {
    "3x3": (conv2d([3, 3]), (6, 4)),
    "3x3, stride 2": (conv2d([3, 3], (2, 2)), (6, 4)),
    "3x5, strides, dilation, valid": (conv2d([3, 5], (1, 1), (2, 1), "VALID"), (6, 4)),
    "5x5, dilation 2": (conv2d([5, 5], (1, 1), (2, 2)), (6, 4)),
    "3x3, explicit": (conv2d([3, 3], (2, 1), (1, 1), "EXPLICIT", [0, 0, 2, 0, 1, 1, 0, 0]), (6, 4)),
    "1x1, stride 2": (conv2d([1, 1], (2, 2)), (5,)),
    "inputs whole": (conv2d([3, 3]), (6, 12)),
    "1-D": (conv1d(), (6, 4)),
    "matrix": (matmul(), (5,)),
    "matrix, transposed": (matmul(transpose_b=True), (5,)),
    "matrix, all transposed": (matmul(True, True), (5,)),
}


class Built:
    """A network of one layer and a bias, its dense weights saved, decomposed."""

    def __init__(self, name, folder, separable=(), ranks=None, exact=None):
        (build, shape), known = LAYERS[name]
        self.graph = tf.Graph()
        with self.graph.as_default():
            self.x = tf.placeholder(tf.float32, shape, name="x")
            raw = build(self.x)
            self.y = tf.nn.bias_add(raw, tf_nets.variable("b", [20], 2, 0.3), name="y")
            (self.op,) = [op for op in self.graph.get_operations() if op.type in ("Conv2D", "MatMul")]
            self.values = np.random.RandomState(3).randn(*shape)
            self.weights = str(folder / "weights.npy")
            init = tf.global_variables_initializer()
            with session(self.graph) as run:
                run.run(init)
                if exact is not None:
                    variable = tf.global_variables()[0]
                    run.run(variable.initializer, {variable.initial_value: exact(variable.shape.as_list())})
                self.dense, self.kernel = run.run([self.y, self.op.inputs[1]], {self.x: self.values})
                get_op_weight_values(run, self.weights)
            self.decomposition = LowRankDecomposition(
                self.graph, self.weights, rank_rule=ExplicitRanks({self.op.name: ranks or known}), separable=separable)
            self.decomposition.apply()
            self.init = tf.global_variables_initializer()

    def run(self, fetches):
        with session(self.graph) as run:
            run.run(self.init)
            return run.run(fetches, {self.x: self.values}), merged_weights(run)


def exact_kernel(shape):
    """A convolution kernel of Tucker ranks (outputs 6, inputs 4), or a matrix of rank 5."""
    random = np.random.RandomState(7)
    if len(shape) == 2:
        return random.randn(shape[0], 5).dot(random.randn(5, shape[1]))
    core = random.randn(shape[0], shape[1], 4, 6)
    return np.einsum("hwab,ia,bo->hwio", core, random.randn(shape[2], 4), random.randn(6, shape[3]))


def product(factors, op):
    """The kernel that factors equal, by einsum in float64."""
    factors = [np.asarray(factor, np.float64) for factor in factors]
    if factors[0].ndim == 2:
        transposed = op.get_attr("transpose_b")
        return factors[1].dot(factors[0]) if transposed else factors[0].dot(factors[1])
    total = factors[0]
    for factor in factors[1:]:
        h, w = max(total.shape[0], factor.shape[0]), max(total.shape[1], factor.shape[1])
        total = np.einsum("abio,cdop->acbdip", total, factor).reshape(h, w, total.shape[2], factor.shape[3])
    return total


def relative(found, expected):
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_chain_computes_what_the_product_of_its_factors_does(name, tmp_path):
    built = Built(name, tmp_path)
    shapes = structure_of(built.graph)[built.op.name]
    assert shapes == built.decomposition.structure[built.op.name]
    with built.graph.as_default():
        factors = [v for v in tf.trainable_variables() if "/factor_" in v.op.name]
        assert [v.shape.as_list() for v in factors] == shapes
        assert {v.op.name for v in tf.global_variables()} == {v.op.name for v in factors} | {"b"}
    (result, old, values), merged = built.run([built.y, built.op.outputs[0], factors])
    kernel = product(values, built.op).reshape(built.kernel.shape)
    with tf.Graph().as_default() as oracle:  # the layer's own operation with that kernel
        x = tf.placeholder(tf.float64, built.values.shape if built.op.type == "MatMul" else [2, None, None, 12])
        image = built.values if name != "1-D" else built.values[:, None]
        again = oracle.create_op(built.op.type, [x, tf.constant(kernel)], [tf.float64], attrs={
            key: value for key, value in built.op.node_def.attr.items() if key != "T" and not key.startswith("_")})
        with session(oracle) as run:
            expected = run.run(again.outputs[0], {x: image}).reshape(old.shape)
    assert relative(old, expected) < 1e-5  # fetched by its old name
    assert relative(result, expected.reshape(result.shape) + np.random.RandomState(2).randn(20) * 0.3) < 1e-5
    assert relative(result, built.dense) > 1e-2
    assert relative(merged["w"].reshape(kernel.shape), kernel) < 1e-5
    (line,) = built.decomposition.report
    assert line.error == pytest.approx(relative(kernel, built.kernel), rel=1e-4)
    assert line.parameters == (built.kernel.size, sum(int(np.prod(shape)) for shape in shapes))
    assert line.multiply_adds[1] < line.multiply_adds[0] and line.reason == ""


@pytest.mark.parametrize("name", ["3x3, stride 2", "5x5, dilation 2", "matrix", "matrix, all transposed"])
def test_ranks_that_lose_nothing_compute_the_same(name, tmp_path):
    built = Built(name, tmp_path, exact=exact_kernel)
    result, merged = built.run(built.y)
    assert relative(result, built.dense) < 1e-5
    assert relative(merged["w"], built.kernel) < 1e-5


def test_a_separable_chain_has_two_strides(tmp_path):
    def exact(shape):
        random = np.random.RandomState(7)
        return np.einsum("hia,wao->hwio", random.randn(3, 12, 4), random.randn(3, 4, 20))

    built = Built("3x3, stride 2", tmp_path, separable=["layer"], ranks=(4,), exact=exact)
    assert structure_of(built.graph)["layer"] == [[3, 1, 12, 4], [1, 3, 4, 20]]
    assert relative(built.run(built.y)[0], built.dense) < 1e-5


def test_whoever_read_the_weight_reads_the_product(tmp_path):
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [2, 12], name="x")
        w = tf_nets.variable("w", [12, 20], 1)
        tf.nn.bias_add(tf.matmul(x, w, name="layer"), tf.zeros([20]))
        penalty = tf.reduce_sum(tf.square(w))
        save_initial(graph, tmp_path / "w.npy")
        low_rank_decompose(graph, tmp_path / "w.npy", None, rank_rule=ExplicitRanks({"layer": (3,)}))
        gradients = tf.gradients(penalty, tf.trainable_variables())
        init = tf.global_variables_initializer()
        with session(graph) as run:
            run.run(init)
            value, slopes, (first, last) = run.run([penalty, gradients, tf.trainable_variables()])
    assert value == pytest.approx(np.sum(np.square(first.dot(last))), rel=1e-5)
    np.testing.assert_allclose(slopes[0], 2 * first.dot(last).dot(last.T), rtol=1e-3, atol=1e-5)


def save_initial(graph, path):
    init = tf.global_variables_initializer()
    with session(graph) as run:
        run.run(init)
        get_op_weight_values(run, path)


def test_other_algorithms_see_the_chains_alone(tmp_path):
    structure_run.save_weights(str(tmp_path / "weights.npy"))
    made = []
    for outputs in (["logits"], None):
        with tf.Graph().as_default() as graph:
            structure_run.network()
            hook = structure_run.low_rank(str(tmp_path))
            chains = {"low_rank/{}/{}".format(name, index) for name, shapes in structure_of(graph).items()
                      for index in range(len(shapes))}
            found = prunable_weights(graph, outputs)
            assert set(found.layers) == chains | {"c0/conv"} and not found.left
            assert set(get_op_name_of_type(graph)) == set(found.layers)
            assert not forward_names(graph) & set(structure_of(graph))
            quantizer = LSQQuantizer(graph, True, output_names=outputs)
            assert {row.name for row in quantizer.coverage().layers} == set(found.layers)
            assert quantizer.coverage().fraction == 1.0 and len(hook.report) == 4
            made.append(sorted(v.op.name for v in tf.global_variables()))
    assert made[0] == made[1]  # whether the outputs are named or not


def test_the_guides_sample_runs(tmp_path, monkeypatch):
    """The lines of the toolbox' guide, with two names put right.

    There, the session that is restored first has another name than the one that was made; and the last saver would
    also look for factors and slots of the optimizer, which the checkpoint cannot hold. It is the saver of before here.
    """
    monkeypatch.chdir(tmp_path)
    os.makedirs("save")

    def build_model():
        x = tf.placeholder(tf.float32, [4, 8, 8, 3], name="x")
        y = tf.nn.relu(tf_nets.conv(x, "c1", 24, seed=1))
        y = tf.nn.relu(tf_nets.conv(y, "c2", 32, stride=2, seed=3))
        return x, tf_nets.dense(tf.reduce_mean(y, [1, 2]), "fc", 10, seed=5)

    with tf.Graph().as_default() as graph:
        build_model()
        init = tf.global_variables_initializer()
        with session(graph) as run:
            run.run(init)
            run.run([tf.assign(v, v + 0.01) for v in tf.global_variables()])
            trained = {v.op.name: run.run(v) for v in tf.global_variables()}
            tf.train.Saver().save(run, "save/model.ckpt")
    gc.collect()
    with tf.Graph().as_default():
        x, y = build_model()
        temp_sess = tf.Session()
        saver = tf.train.Saver()
        saver.restore(temp_sess, "save/model.ckpt")
        get_op_weight_values(temp_sess, "model_weights.npy")
        temp_sess.close()
        low_rank_decompose(tf.get_default_graph(), "model_weights.npy", "compress_params.bin")
        optimizer = tf.train.AdamOptimizer(1e-3).minimize(tf.reduce_mean(y))
        sess = tf.Session()
        saver.restore(sess, "save/model.ckpt")
        initializers = tf.global_variables_initializer()
        sess.run(initializers)
        assert list(structure_of(tf.get_default_graph())) == ["c2/conv"]
        bias = next(v for v in tf.global_variables() if v.op.name == "c1/bias")
        np.testing.assert_array_equal(sess.run(bias), trained["c1/bias"])
        first = sess.run(y, {x: np.ones([4, 8, 8, 3])})
        sess.run(optimizer, {x: np.ones([4, 8, 8, 3])})
        assert np.abs(sess.run(y, {x: np.ones([4, 8, 8, 3])}) - first).max() > 0
        sess.close()
    assert not read_params("compress_params.bin").algo
    with np.load("model_weights.npy", allow_pickle=False) as saved:
        assert sorted(saved.files) == sorted(trained)
        for name in saved.files:
            np.testing.assert_array_equal(saved[name], trained[name])


def varied():
    """Layers that cannot be decomposed, each for its reason, and one that can."""
    x = tf.placeholder(tf.float32, [2, 8, 8, 16], name="x")
    y = tf_nets.depthwise(tf_nets.conv(x, "good", 16, seed=1), "deep", bias=True, seed=2)
    y = tf.nn.bias_add(tf_nets.conv(y, "small", 4, bias=False), tf.zeros([4]))
    y = tf.nn.relu(tf_nets.conv(y, "skipped", 16))
    w = tf_nets.variable("shared", [3, 3, 16, 16], 4)
    for name in ("one", "two"):
        y = tf.nn.relu(tf.nn.conv2d(y, w, strides=1, padding="SAME", name=name))
    y = tf.nn.relu(tf.nn.conv2d(y, tf_nets.variable("g", [3, 3, 4, 16], 5), strides=1, padding="SAME", name="grouped"))
    half = tf.nn.relu(tf.nn.conv2d(y, 0.5 * tf_nets.variable("h", [1, 1, 16, 16], 6), strides=1, padding="SAME",
                                   name="computed"))
    return tf.matmul(tf.reduce_mean(half, [1, 2]), tf_nets.variable("end", [16, 20], 7), name="unread")


def test_every_layer_that_stays_says_why(tmp_path):
    with tf.Graph().as_default() as graph:
        varied()
        save_initial(graph, tmp_path / "w")
        report = LowRankDecomposition(graph, tmp_path / "w", ["skipped/*"]).report
    reasons = {line.name: line.reason for line in report}
    assert reasons.pop("good/conv") == "" and [line.ranks for line in report if line.ranks] == [(8, 8)]
    wanted = {"deep/depthwise": "depthwise", "small/conv": "align_channels = 8", "skipped/conv": "named in skip_layers",
              "one": "also that of two", "two": "also that of one", "grouped": "grouped (4 groups)",
              "computed": "no variable", "unread": "add a bias or tf.identity"}
    assert sorted(reasons) == sorted(wanted)
    for name, words in wanted.items():
        assert words in reasons[name]
    assert all(line.parameters[0] == line.parameters[1] for line in report if not line.ranks)


def test_bad_arguments_and_files_are_refused(tmp_path):
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None, None, None, 12])
        tf_nets.conv(x, "c", 16)
        weights = tmp_path / "w.npy"
        save_initial(graph, weights)
        for arguments, words in (({"align_channels": 0}, "align_channels"), ({"tucker_minimal_ratio": 2}, "tucker"),
                                 ({"reserved_singular_value_ratio": -1}, "reserved_singular_value_ratio"),
                                 ({"refinements": -1}, "refinements"), ({"skip_layers": ["d"]}, "no layer matches 'd'"),
                                 ({"skip_layers": ["c/conv"]}, "no layer can be decomposed"),
                                 ({"rank_rule": BudgetRanks(0.5, Cost.MULTIPLY_ADDS)}, "known height and width")):
            with pytest.raises(ValueError, match=words):
                LowRankDecomposition(graph, weights, **arguments)
        with pytest.raises(TypeError, match="tf.Graph"):
            LowRankDecomposition(None, weights)
        np.save(str(tmp_path / "pickled.npy"), np.array({"c/kernel": 1}, dtype=object), allow_pickle=True)
        for path in ("pickled.npy", "missing.npy"):
            with pytest.raises(SlimtrainError, match="no pickles are read"):
                LowRankDecomposition(graph, tmp_path / path)
        (tmp_path / "short.npy").write_bytes(weights.read_bytes()[:-30])
        with pytest.raises(SlimtrainError):
            LowRankDecomposition(graph, tmp_path / "short.npy")
        with pytest.raises(ParameterFileError):
            low_rank_decompose(graph, weights, tmp_path / "nothing.bin", append=True)
        assert not structure_of(graph)
    with tf.Graph().as_default() as other:
        tf_nets.conv(tf.placeholder(tf.float32, [2, 8, 8, 13]), "c", 16)
        with pytest.raises(ValueError, match="of shape .3, 3, 13, 16.*the shape .3, 3, 12, 16"):
            LowRankDecomposition(other, weights)
        with pytest.raises(ValueError, match="weight_npy_file is missing"):
            LowRankDecompositionHook(other)


def test_the_wrong_moment_is_refused(tmp_path):
    gc.collect()
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [2, 8, 8, 12], name="x")
        y = tf_nets.conv(x, "c", 16)
        save_initial(graph, tmp_path / "w.npy")
        with session(graph):
            with pytest.raises(RuntimeError, match="close that session"):
                LowRankDecomposition(graph, tmp_path / "w.npy")
        rule = {"rank_rule": ExplicitRanks({"c/conv": (8, 8)})}
        low_rank_decompose(graph, tmp_path / "w.npy", None, **rule)
        with pytest.raises(RuntimeError, match="decomposed or expanded already"):
            low_rank_decompose(graph, tmp_path / "w.npy", None, **rule)
        tf.gradients(y, tf.trainable_variables())
        with pytest.raises(RuntimeError, match="gradients"):
            low_rank_decompose(graph, tmp_path / "w.npy", None, **rule)
    with tf.Graph().as_default() as graph:
        tf_nets.conv(tf.placeholder(tf.float32, [2, 8, 8, 12], name="x"), "c", 16)
        LSQQuantizer(graph, True)
        with pytest.raises(RuntimeError, match="quantized already"):
            low_rank_decompose(graph, tmp_path / "w.npy", None, **rule)


def test_a_process_for_evaluation_takes_the_structure_from_the_checkpoint(tmp_path):
    structure_run.save_weights(str(tmp_path / "weights.npy"))
    structure_run.train("low_rank", str(tmp_path), 4)
    saved = tf.train.latest_checkpoint(str(tmp_path / "low_rank" / "ckpt"))
    written = json.loads((tmp_path / "low_rank-export" / "low_rank.json").read_text())
    assert {line["name"]: tuple(line["ranks"]) for line in written["report"]} == {
        "c0/conv": (), **structure_run.RANKS.ranks}
    results = []
    for source in ("checkpoint", "file"):
        with tf.Graph().as_default() as graph:
            x, logits = structure_run.network()
            apply_structure(graph, structure_in(saved, graph) if source == "checkpoint" else written["structure"])
            saver = tf.train.Saver()
            with session(graph) as run:
                saver.restore(run, saved)
                results.append(run.run(logits, {x: structure_run.batch(5)}))
                dense = merged_weights(run)
    np.testing.assert_array_equal(*results)
    with tf.Graph().as_default() as graph:
        x, logits = structure_run.network()
        init = tf.global_variables_initializer()
        with session(graph) as run:
            run.run(init)
            reader = tf.train.load_checkpoint(saved)
            run.run([tf.assign(v, dense[v.op.name] if v.op.name in dense else reader.get_tensor(v.op.name))
                     for v in tf.global_variables()])
            assert relative(run.run(logits, {x: structure_run.batch(5)}), results[0]) < 1e-5
        with pytest.raises(ValueError, match="no chain"):
            apply_structure(graph, {"c1/conv": [[1, 1, 8, 4], [3, 3, 5, 12]]})
        with pytest.raises(ValueError, match="which the graph has not"):
            apply_structure(graph, {"c9/conv": [[1, 1, 8, 4], [3, 3, 4, 12]]})


def test_a_dense_checkpoint_cannot_be_resumed_from(tmp_path):
    structure_run.save_weights(str(tmp_path / "weights.npy"))
    with tf.Graph().as_default() as graph:
        structure_run.network()
        saver, init = tf.train.Saver(), tf.global_variables_initializer()
        with session(graph) as run:
            run.run(init)
            run.run([tf.assign(v, v + 0.01) for v in tf.global_variables()])
            os.makedirs(str(tmp_path / "low_rank" / "ckpt"))
            dense = saver.save(run, str(tmp_path / "low_rank" / "ckpt" / "model"))
    with tf.Graph().as_default():
        structure_run.network()
        with pytest.raises(RuntimeError, match="not decomposed, and cannot be resumed"):
            structure_run.low_rank(str(tmp_path))
        hook = LowRankDecompositionHook(None, dense, rank_rule=structure_run.RANKS)
        assert len(hook.report) == 4
        with tf.train.MonitoredTrainingSession(hooks=[hook], config=one_thread()) as run:
            bias = next(v for v in tf.global_variables() if v.op.name == "c1/bias")
            np.testing.assert_array_equal(run.run(bias), tf.train.load_checkpoint(dense).get_tensor("c1/bias"))
