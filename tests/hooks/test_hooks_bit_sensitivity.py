"""Sensitivity of layers to bits in a frozen graph: against weights stored by hand, and on to a deployed model."""
import numpy as np
import pytest

import tf_nets
from deploying import images
from slimtrain.core import ConversionError, LayerState, WeightMode, sqnr_db, stored_weight
from slimtrain.core.bit_choice import FLOAT_BITS
from slimtrain.hooks import (
    OfflineQuantizer,
    WeightQuantizer,
    draw_sensitivity,
    int8_sensitivity,
    sensitivity_table,
    weight_sensitivity,
)
from slimtrain.proto import convert, run_model
from test_hooks_offline import float_result, frozen
from tf_setup import session, tf

EXAMPLES = [(images(count), np.random.RandomState(count).randn(count, 5)) for count in (2, 4)]


def small(x, training):
    """A depthwise layer, a matrix whose weight is transposed, a weight that two layers share."""
    y = tf.nn.relu(tf_nets.conv(x, "stem", 8, stride=2, seed=1))
    y = tf.nn.relu(tf_nets.depthwise(y, "deep", seed=3, bias=True))
    w = tf_nets.variable("shared", [1, 1, 8, 8], 5)
    for name in ("first", "second"):
        y = tf.nn.relu(tf.nn.conv2d(y, w, [1, 1, 1, 1], "SAME", name=name))
    w = tf_nets.variable("head/kernel", [5, 8], 7)
    return tf.identity(tf.matmul(tf.reduce_mean(y, [1, 2]), w, transpose_b=True, name="head"), name="logits")


LAYERS = ["stem/conv", "deep/depthwise", "first", "second", "head"]
ROWS = {"head": (0, 1), "deep/depthwise": (2, 3, 0, 1)}


def squared(output, target):
    return np.mean((output - target) ** 2)


def loss_of(results):
    return np.average([squared(result, target) for result, (_, target) in zip(results, EXAMPLES)], weights=(2, 4))


def by_hand(graph_def, layer, bits, mode):
    """The outputs with one layer's weight replaced in the graph."""
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        op, order = graph.get_operation_by_name(layer), ROWS.get(layer, (3, 2, 0, 1))
        with session(graph) as run:
            rows = run.run(op.inputs[1]).transpose(order)
        kernel = tf.constant(stored_weight(rows, bits, mode).values.transpose(np.argsort(order)))
        op._update_input(1, kernel)
        with session(graph) as run:
            return [run.run("logits:0", {"x:0": x}) for x, _ in EXAMPLES]


@pytest.mark.parametrize("mode", list(WeightMode))
def test_weights_are_measured_one_layer_at_a_time(mode, tmp_path):
    path, _ = frozen(small, tmp_path)
    graph_def, _ = frozen(small)
    found = weight_sensitivity(path, EXAMPLES, squared, (2, 4), mode=mode, output_names=["logits"])
    assert (found.state, found.layers, found.widths) == (LayerState.WEIGHT_ONLY, LAYERS, [32, 4, 2])
    plain = [float_result(graph_def, "logits", x) for x, _ in EXAMPLES]
    assert found.float_loss == pytest.approx(loss_of(plain), rel=1e-6)
    for result in found.results:
        if result.bits == FLOAT_BITS:
            assert (result.loss, result.sqnr_db) == (0.0, float("inf"))
            continue
        outputs = by_hand(graph_def, result.layer, result.bits, mode)
        assert result.loss == pytest.approx(loss_of(outputs) - found.float_loss, abs=1e-6)
        flat = [np.concatenate([each.ravel() for each in values]) for values in (plain, outputs)]
        assert result.sqnr_db == pytest.approx(sqnr_db(*flat), abs=0.01) and 5 < result.sqnr_db < 40


def stored(graph, bits=8, **arguments):
    """Outputs of the whole network with its weights as a plan has them."""
    quantizer = WeightQuantizer(graph, bits, output_names=["logits"], **arguments)
    with session(graph) as run:
        run.run(tf.global_variables_initializer())
        return quantizer, [quantizer.simulate(run, ["logits"], {"x:0": x})[0] for x, _ in EXAMPLES]


def training_graph():
    graph = tf.Graph()
    with graph.as_default():
        small(tf.placeholder(tf.float32, [None, 12, 12, 3], name="x"), True)
    return graph


def test_a_plan_beats_one_width_for_all_and_deploys(tmp_path):
    graph_def, _ = frozen(small)
    examples = [(x, float_result(graph_def, "logits", x)) for x, _ in EXAMPLES]
    found = weight_sensitivity(graph_def, examples, squared, output_names=["logits"])
    budget = 1.15 * sum(result.bytes for result in found.results if result.bits == 3)
    plan = found.choose(largest_bytes=budget)
    assert plan.bytes <= budget and len(set(plan.bits.values())) > 1
    losses = []
    for arguments in ({"layer_bits": plan.layer_bits, "skip_quant_layers": plan.skip_quant_layers}, {"bits": 3}):
        graph = training_graph()
        with graph.as_default():
            quantizer, outputs = stored(graph, **arguments)
        losses.append(np.mean([squared(output, target) for output, (_, target) in zip(outputs, examples)]))
    assert losses[0] < losses[1] / 2, losses

    graph = training_graph()
    with graph.as_default():
        quantizer = WeightQuantizer(graph, layer_bits=plan.layer_bits, skip_quant_layers=plan.skip_quant_layers,
                                    output_names=["logits"])
        with session(graph) as run:
            run.run(tf.global_variables_initializer())
            quantizer.export(str(tmp_path / "net"), run)
            (expected,) = quantizer.simulate(run, ["logits"], {"x:0": images()})
    convert(tmp_path / "net.pb", tmp_path / "net.mnn", tmp_path / "net.compress_params.bin")
    (output,) = run_model(tmp_path / "net.mnn", {"x": images()}).values()
    assert sqnr_db(expected, output) > 100


def hurt(x, training):
    """Of the second layer's inputs seven drown in the grid beside one that reads zeros."""
    w = np.random.RandomState(1).randn(3, 3, 3, 8).astype(np.float32)
    w[..., 0] = 0
    y = tf.nn.relu(tf.nn.conv2d(x, tf.get_variable("w", initializer=w), [1, 1, 1, 1], "SAME", name="first"))
    w = np.random.RandomState(2).randn(1, 1, 8, 8).astype(np.float32)
    w[:, :, 0] *= 300
    y = tf.nn.relu(tf.nn.conv2d(y, tf.get_variable("v", initializer=w), [1, 1, 1, 1], "SAME", name="second"))
    return tf.identity(tf_nets.dense(tf.reduce_mean(y, [1, 2]), "head", 5, seed=5), name="logits")


def test_int8_skips_the_layer_that_hurts():
    graph_def, _ = frozen(hurt)
    examples = [(x, float_result(graph_def, "logits", x)) for x, _ in EXAMPLES]
    found = int8_sensitivity(graph_def, examples, squared, (8, 3), output_names=["logits"])
    assert (found.state, found.layers) == (LayerState.INT8, ["first", "second", "head/matmul"])
    results = {(result.layer, result.bits): result for result in found.results}
    assert results["second", 8].sqnr_db < results["first", 8].sqnr_db - 10
    assert results["first", 8].bytes == results["first", 3].bytes
    limit = sum(results[layer, 8].loss for layer in found.layers) / 2
    plan = found.choose(largest_loss=limit)
    assert plan.skip_quant_layers == ["second"]
    quantizer = OfflineQuantizer(graph_def, ["second", "head/matmul"], output_names=["logits"])
    quantizer.calibrate([x for x, _ in EXAMPLES])
    outputs = [quantizer.simulate(["logits"], {"x:0": x})[0] for x, _ in EXAMPLES]
    expected = np.average([squared(output, target) for output, (_, target) in zip(outputs, examples)], weights=(2, 4))
    assert results["first", 8].loss == pytest.approx(expected, rel=1e-6)


def test_table_and_picture_show_every_layer_and_width(tmp_path):
    found = weight_sensitivity(frozen(small)[0], EXAMPLES, squared, (8, 2), output_names=["logits"])
    text = sensitivity_table(found)
    assert len([line for line in text.splitlines() if "dB" in line and line.split()[0] in LAYERS]) == 5
    draw_sensitivity(found, tmp_path / "bits.png", found.choose(largest_bytes=1e6))
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")


def test_bad_arguments_are_refused(tmp_path):
    graph_def, _ = frozen(small)
    for examples, bits in (([], (8,)), (EXAMPLES, ())):
        for measure in (weight_sensitivity, int8_sensitivity):
            with pytest.raises(ValueError, match="examples and widths"):
                measure(graph_def, examples, squared, bits, output_names=["logits"])
    with pytest.raises(ValueError, match="2 to 8"):
        weight_sensitivity(graph_def, EXAMPLES, squared, (1,), output_names=["logits"])
    with pytest.raises(ValueError, match="nothing"):
        int8_sensitivity(graph_def, EXAMPLES, squared, skip_quant_layers=["nothing"], output_names=["logits"])
    with pytest.raises(ValueError, match="stem/conv: skipped"):
        weight_sensitivity(graph_def, EXAMPLES, squared, skip_quant_layers=["*"], output_names=["logits"])
    with pytest.raises(TypeError, match="the string 'logits'"):
        weight_sensitivity(graph_def, EXAMPLES, squared, output_names="logits")
    (tmp_path / "broken.pb").write_bytes(b"\xff\xff no graph")
    with pytest.raises(ConversionError, match="broken.pb"):
        weight_sensitivity(tmp_path / "broken.pb", EXAMPLES, squared, output_names=["logits"])
