"""Low-bit weights of a graph: the operation against the core, the trained integers against those inside the .mnn."""
import numpy as np
import pytest

import tf_nets
from deploying import images
from mnn_weights import decode
from monitored_run import batch
from slimtrain.core import LayerState, WeightMode, sqnr_db, stored_weight
from slimtrain.hooks import LSQQuantizer, WeightQuantizer, WeightQuantizerHook, strip_wq_ops
from slimtrain.hooks.layers import LayerKind
from slimtrain.hooks.weight_fake_quant import core_shape, store_weight
from slimtrain.proto import ConvertOptions, convert, read_params, run_model
from tf_setup import one_thread, session, tf

MODES = list(WeightMode)


def varied_net(x, training):
    """Every kind of layer that can be stored, batch norms of either sign, 32 input channels for blocks."""
    y = tf.nn.relu6(tf_nets.batch_norm(tf_nets.conv(x, "c1", 32, bias=False, seed=1), "b1", training, 2))
    y = tf.nn.relu(tf_nets.conv(y, "c2", 32, stride=2, seed=3), name="r2")
    y = tf_nets.batch_norm(tf_nets.depthwise(y, "d1", seed=5), "bd", training, 6)
    y = tf_nets.batch_norm(tf_nets.depthwise(y, "d2", bias=True, seed=7), "bd2", training, 8)
    y = tf.nn.relu(tf_nets.dense(tf.reduce_mean(y, [1, 2]), "f1", 48, seed=9))
    w = tf_nets.variable("f2/kernel", [5, 48], 11)
    return tf.identity(tf.matmul(y, w, transpose_b=True, name="f2/matmul"), name="logits")


def build(net=varied_net, training=False, **arguments):
    graph = tf.Graph()
    with graph.as_default():
        x = tf.placeholder(tf.float32, [None, 12, 12, 3], name="x")
        y = net(x, training)
        made = WeightQuantizer(graph, output_names=[y.name], **arguments)
        init = tf.global_variables_initializer()
    return graph, y, made, init


# -- the operation


class FakeLayer:
    """What ``store_weight`` asks of a layer."""

    def __init__(self, kernel, kind, transposed=False):
        self.kernel, self.kind = kernel, kind
        self.channel_axis = {LayerKind.CONV: 3, LayerKind.DEPTHWISE: 2, LayerKind.MATMUL: 0 if transposed else 1}[kind]


def to_core(kernel, kind, transposed=False):
    if kind is LayerKind.MATMUL:
        return kernel if transposed else kernel.T
    return kernel.transpose((2, 3, 0, 1) if kind is LayerKind.DEPTHWISE else (3, 2, 0, 1))


SHAPES = [(LayerKind.CONV, (3, 3, 32, 5), False), (LayerKind.DEPTHWISE, (3, 3, 6, 1), False),
          (LayerKind.MATMUL, (48, 7), False), (LayerKind.MATMUL, (7, 48), True)]


@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind, shape, transposed", SHAPES)
def test_operation_is_the_core_bit_for_bit(kind, shape, transposed, mode, block):
    cases = [(bits, size) for bits in range(2, 9) for size in (1e-7, 1.0, 1e4)]
    graph, results, kernels = tf.Graph(), [], []
    with graph.as_default():
        for seed, (bits, size) in enumerate(cases):
            kernels.append((np.random.RandomState(seed).randn(*shape) * size).astype(np.float32))
            constant = tf.constant(kernels[-1])
            layer = FakeLayer(constant, kind, transposed)
            results.append(store_weight(constant, layer, bits, mode, block))
            assert core_shape(layer) == list(to_core(kernels[-1], kind, transposed).shape)
    with session(graph) as run:
        found = run.run(results)
    for (bits, _), kernel, value in zip(cases, kernels, found):
        expected = stored_weight(to_core(kernel, kind, transposed), bits, mode, block).values
        np.testing.assert_array_equal(to_core(value, kind, transposed), expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_passes_through_and_moves_the_range(mode):
    rng = np.random.RandomState(0)
    kernel, dy = rng.randn(4, 3).astype(np.float32), rng.randn(4, 3).astype(np.float32)
    graph = tf.Graph()
    with graph.as_default():
        constant = tf.constant(kernel)
        stored = store_weight(constant, FakeLayer(constant, LayerKind.MATMUL), 3, mode)
        (gradient,) = tf.gradients(stored, constant, tf.constant(dy))
    with session(graph) as run:
        found = run.run(gradient)
    expected = dy.astype(np.float64)
    top = 3 if mode is WeightMode.SYMMETRIC else 7
    for column in range(3):
        values = kernel[:, column].astype(np.float64)
        low = 0.0 if mode is WeightMode.SYMMETRIC else values.min()
        scale = (np.abs(values).max() if mode is WeightMode.SYMMETRIC else values.max() - low) / top
        position = (values - low) / scale
        dscale = np.sum(dy[:, column] * (np.sign(position) * np.floor(np.abs(position) + 0.5) - position))
        if mode is WeightMode.SYMMETRIC:
            largest = np.abs(values).argmax()
            expected[largest, column] += dscale / top * np.sign(values[largest])
        else:
            expected[values.argmax(), column] += dscale / top
            expected[values.argmin(), column] -= dscale / top
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


# -- the file


def expected_levels(stored, gamma, bits, mode):
    """Signed levels as the file has them: a negative batch norm factor turns the grid around."""
    levels = stored.levels.reshape(len(stored.levels), -1).astype(np.int64)
    turned = np.zeros(len(levels), bool) if gamma is None else gamma < 0
    if mode is WeightMode.ASYMMETRIC:
        return np.where(turned[:, None], 2 ** bits - 1 - levels, levels) - 2 ** (bits - 1)
    return np.where(turned[:, None], -levels, levels)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits, block", [(8, 0), (4, 0), (3, 16), (2, 0), (2, 16)])
def test_file_holds_exactly_the_trained_integers(mode, bits, block, tmp_path):
    graph, y, made, init = build(bits=bits, mode=mode.value, block_size=block,
                                 layer_bits={"f1/*": 6, "f2/matmul": 8})
    x = images()
    with session(graph) as run:
        run.run(init)
        live = run.run(y, {"x:0": x})
        made.export(str(tmp_path / "net"), run)
        (expected,) = made.simulate(run, [y.name], {"x:0": x})
        stored = made.stored_weights(run)
        variables = {variable.op.name: variable for variable in graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)}
        norms = (("c1/conv", "b1"), ("d1/depthwise", "bd"), ("d2/depthwise", "bd2"))
        gammas = run.run({name: variables[norm + "/gamma"] for name, norm in norms})
    np.testing.assert_allclose(live, expected, atol=1e-5)
    path = str(tmp_path / "net")
    conversion = convert(path + ".pb", path + ".mnn", path + ".compress_params.bin")
    assert {layer.state for layer in conversion.weight_only.layers} == {LayerState.WEIGHT_ONLY}
    assert len(conversion.weight_only.layers) == 6
    (output,) = run_model(path + ".mnn", {"x": x}).values()
    assert sqnr_db(expected, output) >= 100
    found = decode(path + ".mnn")
    (algorithm,) = read_params(path + ".compress_params.bin").algo
    names = {entry.weight[0].name: entry.op_name for entry in algorithm.quant_params.layer}
    assert set(names) == set(made.layers)
    for name, operator in names.items():
        width = made.storages[name].bits
        assert width == {"f1/matmul": 6, "f2/matmul": 8}.get(name, bits)
        assert found[operator].bits == width
        wanted = expected_levels(stored[name], gammas.get(name), width, mode)
        np.testing.assert_array_equal(found[operator].levels.ravel(), wanted.ravel(), err_msg=name)


def test_the_seeds_way_with_a_stripped_graph_gives_the_same_integers(tmp_path):
    graph, y, made, init = build(tf_nets.pool_net, bits=3)
    path, x = str(tmp_path / "frozen"), images()
    with session(graph) as run:
        run.run(init)
        made.init(run)
        expected = run.run(y, {"x:0": x})
        with graph.as_default():
            strip_wq_ops()
        assert not np.allclose(expected, _fresh(graph, run, y, x), atol=1e-3)
        frozen = tf.graph_util.convert_variables_to_constants(run, graph.as_graph_def(), [y.op.name])
        made.save_compress_params(path + ".bin")
    (tmp_path / "frozen.pb").write_bytes(frozen.SerializeToString())
    for params, options in ((path + ".bin", ConvertOptions()), (None, ConvertOptions(weight_bits=3))):
        convert(path + ".pb", path + ".mnn", params, options)
        (output,) = run_model(path + ".mnn", {"x": x}).values()
        assert sqnr_db(expected, output) >= 80


def _fresh(graph, run, y, x):
    """The output of the graph as it is now, with the variables of an older session."""
    frozen = tf.graph_util.convert_variables_to_constants(run, graph.as_graph_def(), [y.op.name])
    with tf.Graph().as_default() as other:
        tf.import_graph_def(frozen, name="")
        with session(other) as again:
            return again.run(y.name, {"x:0": x})


# -- what stays float, what is refused


def test_coverage_says_what_is_stored_and_why_not():
    _, _, made, _ = build(bits=4, skip_quant_layers=["f2/*"])
    rows = {row.name: row for row in made.coverage().layers}
    assert rows["c1/conv"].state is LayerState.WEIGHT_ONLY
    assert rows["f2/matmul"].state is LayerState.FLOAT
    assert rows["f2/matmul"].reason == "it was skipped"


@pytest.mark.parametrize("arguments, message", [
    (dict(bits=1), "2 to 8"), (dict(bits=9), "2 to 8"), (dict(mode="odd"), "mode must be one of"),
    (dict(block_size=8), "multiple of 16"), (dict(layer_bits={"c1/conv": 1}), "2 to 8"),
    (dict(layer_bits={"nothing": 4}), "nothing"), (dict(skip_quant_layers=["nothing"]), "nothing"),
    (dict(skip_quant_layers=["*"]), "nothing to store")])
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_one_quantizer_per_graph_whichever_comes_first():
    graph, _, _, _ = build()
    for make in (WeightQuantizer, LSQQuantizer):
        with pytest.raises(RuntimeError, match="quantized already"):
            make(graph)
    graph = tf.Graph()
    with graph.as_default():
        tf_nets.plain_net(tf.placeholder(tf.float32, [None, 12, 12, 3]), False)
        LSQQuantizer(graph)
    with pytest.raises(RuntimeError, match="quantized already"):
        WeightQuantizer(graph)


def test_another_session_and_missing_outputs_are_refused(tmp_path):
    graph, _, _, _ = build()
    other = tf.Graph()
    with other.as_default():
        tf_nets.plain_net(tf.placeholder(tf.float32, [None, 12, 12, 3]), False)
        made = WeightQuantizer(other)
    with session(graph) as run:
        for action in (made.init, made.update, made.stored_weights, lambda one: made.export("m", one)):
            with pytest.raises(RuntimeError, match="not of the graph"):
                action(run)
    with session(other) as run, pytest.raises(ValueError, match="output_names"):
        made.export(str(tmp_path / "m"), run)


# -- training


def test_training_repairs_what_two_bits_break():
    rng = np.random.RandomState(0)
    inputs = rng.randn(256, 20).astype(np.float32)
    targets = np.tanh(inputs @ rng.randn(20, 3)).astype(np.float32)

    def run_training(quantized, start, steps):
        graph = tf.Graph()
        with graph.as_default():
            x = tf.placeholder(tf.float32, [None, 20])
            y = tf_nets.dense(tf.nn.relu(tf_nets.dense(x, "a", 48, seed=1)), "b", 3, seed=2)
            if quantized:
                WeightQuantizer(graph, 2)
            loss = tf.reduce_mean(tf.square(y - targets))
            step = tf.train.AdamOptimizer(5e-3).minimize(loss)
            variables, init = tf.trainable_variables(), tf.global_variables_initializer()
        with session(graph) as run:
            run.run(init)
            for variable, value in zip(variables, start or ()):
                variable.load(value, run)
            first = run.run(loss, {x: inputs})
            for _ in range(steps):
                run.run(step, {x: inputs})
            return first, run.run(loss, {x: inputs}), run.run(variables)

    _, trained, weights = run_training(False, None, 300)
    broken, repaired, _ = run_training(True, weights, 300)
    assert broken > 3 * trained
    assert repaired < broken / 2


def hook_net(folder, **arguments):
    x = tf.placeholder(tf.float32, [4, 8, 8, 3], name="x")
    y = tf.nn.relu(tf_nets.batch_norm(tf_nets.conv(x, "c1", 16, bias=False, seed=1), "b1", True, 2))
    logits = tf.identity(tf_nets.dense(tf.reduce_mean(y, [1, 2]), "fc", 5, seed=5), name="logits")
    hook = WeightQuantizerHook(bits=3, layer_bits={"fc/*": 8}, output_names=["logits"],
                               export_dir=str(folder / "export"), **arguments)
    loss, step = tf.reduce_mean(tf.square(logits - 1.0)), tf.train.get_or_create_global_step()
    with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
        train = tf.train.MomentumOptimizer(0.05, 0.9).minimize(loss, global_step=step)
    return x, train, step, hook


def monitored(folder, last):
    with tf.Graph().as_default():
        x, train, step, hook = hook_net(folder)
        with tf.train.MonitoredTrainingSession(
                checkpoint_dir=str(folder / "ckpt"), hooks=[hook], save_checkpoint_steps=2, save_summaries_steps=None,
                save_summaries_secs=None, log_step_count_steps=None, config=one_thread()) as run:
            for number in range(run.run(step), last):
                run.run(train, {x: batch(number)})
        return hook


def test_hook_exports_resumes_and_deploys(tmp_path):
    monitored(tmp_path / "whole", 6)
    monitored(tmp_path / "parts", 4)
    monitored(tmp_path / "parts", 6)
    names = {path.name for path in (tmp_path / "whole" / "export").iterdir()}
    assert {"model.pb", "model.compress_params.bin", "model.ckpt-6.pb"} <= names
    x, outputs = images(4, 8), []
    for folder in ("whole", "parts"):
        stem = str(tmp_path / folder / "export" / "model")
        convert(stem + ".pb", stem + ".mnn", stem + ".compress_params.bin")
        outputs += run_model(stem + ".mnn", {"x": x}).values()
        assert {layer.bits for layer in decode(stem + ".mnn").values()} == {3, 8}
    np.testing.assert_array_equal(*outputs)


def test_hook_shows_direct_quantization_from_a_float_checkpoint(tmp_path):
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None, 12, 12, 3], name="x")
        y = tf_nets.plain_net(x, False)
        saver, init = tf.train.Saver(), tf.global_variables_initializer()
        with session(graph) as run:
            run.run(init)
            expected = run.run(y, {x: images()})
            checkpoint = saver.save(run, str(tmp_path / "float"))
    results = {}
    for bits in (8, 2):
        with tf.Graph().as_default():
            x = tf.placeholder(tf.float32, [None, 12, 12, 3], name="x")
            y = tf_nets.plain_net(x, False)
            hook = WeightQuantizerHook(bits=bits, output_names=[y.name], init_checkpoint=checkpoint,
                                       export_dir=str(tmp_path / str(bits)))
            with tf.train.MonitoredSession(tf.train.ChiefSessionCreator(config=one_thread()), [hook]) as run:
                results[bits] = sqnr_db(expected, run.run(y, {x: images()}))
        assert (tmp_path / str(bits) / "model.pb").exists()
    assert results[8] > 30 > results[2]

