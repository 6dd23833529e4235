"""The pruning objects in a plain session, against loops of their own on the same sensitivities."""
import numpy as np
import pytest

import tf_nets
from slimtrain.core import read_prune_ratios
from slimtrain.hooks import (
    LSQQuantizer,
    SensitivityAnalyzer,
    SIMDOCPruner,
    SNIPLevelPruner,
    TaylorFOChannelPruner,
)
from slimtrain.proto import PruneType, read_params
from tf_setup import session, tf

LEVEL = [SNIPLevelPruner, SIMDOCPruner]
ALL = LEVEL + [TaylorFOChannelPruner]
#: how near the sparsity of this small network can come to the one asked for
NEAR = {SNIPLevelPruner: 1e-3, SIMDOCPruner: 5e-3, TaylorFOChannelPruner: 0.05}


def network():
    """A convolution, a batch norm, a convolution of ten channels, and two products: (input, scores)."""
    x = tf.placeholder(tf.float32, [None, 8, 8, 3], name="x")
    y = tf.nn.relu(tf_nets.batch_norm(tf_nets.conv(x, "c1", 16, bias=False, seed=1), "b1", True, 2))
    y = tf.nn.relu(tf_nets.conv(y, "c2", 10, stride=2, seed=3))
    y = tf.nn.relu(tf_nets.dense(tf.reshape(y, [-1, 160]), "f1", 12, seed=5))
    return x, tf.identity(tf_nets.dense(y, "f2", 5, seed=7), name="scores")


def batch(number):
    random = np.random.RandomState(number)
    return random.randn(8, 8, 8, 3).astype(np.float32), random.randint(5, size=8)


def guide(kind, folder, events=1, steps=3, target_sparsity=0.6, **arguments):
    """The code of the seed's guide, steps 2 to 8; returns what it made."""
    x, scores = network()
    labels = tf.placeholder(tf.int64, [None])
    loss = tf.losses.sparse_softmax_cross_entropy(labels, scores)
    optimizer = tf.train.AdamOptimizer(1e-2)
    gradients_vars = optimizer.compute_gradients(loss)
    train_step = optimizer.apply_gradients(gradients_vars, global_step=tf.train.get_or_create_global_step())
    sess = session(tf.get_default_graph())
    sess.run(tf.global_variables_initializer())
    analyzer = SensitivityAnalyzer(gradients_vars)
    products = []
    for i in range(4):
        batch_x, batch_y = batch(i)
        gv_numpy = sess.run(gradients_vars, feed_dict={x: batch_x, labels: batch_y})
        analyzer.analyze(gv_numpy)
        products.append({v.op.name: np.abs(np.float64(g) * w) for (g, w), (_, v) in zip(gv_numpy, gradients_vars)})
    analyzer.save_sensitivity_npy(str(folder / "model_sens.npy"))
    if issubclass(kind, TaylorFOChannelPruner):
        arguments["align_channels"] = 1
    pruner = kind(str(folder / "model_sens.npy"), sess.graph, target_sparsity, events, debug_info=True,
                  prune_ratio_result_file=str(folder / "found.yml"), **arguments)
    for i in range(steps):
        batch_x, batch_y = batch(100 + i)
        sess.run([train_step], feed_dict={x: batch_x, labels: batch_y})
        pruner.do_pruning(sess)
    mean = {name: sum(product[name] for product in products) / 4 for name in products[0]}
    return sess, pruner, mean


def trained(sess, name):
    return sess.run(next(v for v in tf.global_variables() if v.op.name == name))


def zero_share(sess, pruner):
    """Counted in the variables themselves."""
    values = [trained(sess, name) for name in pruner.weights]
    return sum(int((value == 0).sum()) for value in values) / sum(value.size for value in values)


@pytest.mark.parametrize("kind", ALL)
def test_the_code_of_the_guide_prunes_to_what_was_asked(kind, tmp_path):
    with tf.Graph().as_default():
        sess, pruner, _ = guide(kind, tmp_path)
        assert zero_share(sess, pruner) == pytest.approx(0.6, abs=NEAR[kind])
        ratios = pruner.current_prune_ratios(sess)
        assert ratios["overall_prune_ratio"] == pytest.approx(zero_share(sess, pruner))
        pruner.save_compress_params(str(tmp_path / "params.bin"), sess)
        (algorithm,) = read_params(str(tmp_path / "params.bin")).algo
        wanted = PruneType.SIMD_OC if kind is SIMDOCPruner else PruneType.RANDOM
        assert algorithm.prune_params.type == wanted.value
        frozen = tf.graph_util.convert_variables_to_constants(sess, sess.graph_def, ["f2/biased"])
        sess.close()
    (tmp_path / "frozen.pb").write_bytes(frozen.SerializeToString())
    zeros = [(node.name, float((tf.make_ndarray(node.attr["value"].tensor) == 0).mean())) for node in frozen.node
             if node.name.endswith("kernel")]
    assert dict(zeros) == pytest.approx({name: ratios[name] for name, _ in zeros})


def test_sensitivities_are_means_and_hold_no_pickle(tmp_path):
    with tf.Graph().as_default():
        sess, pruner, mean = guide(SNIPLevelPruner, tmp_path, steps=0)
        sess.close()
    with np.load(str(tmp_path / "model_sens.npy"), allow_pickle=False) as saved:
        assert set(saved.files) == set(mean)
        for name in mean:
            np.testing.assert_allclose(saved[name], mean[name], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kind", LEVEL)
def test_the_least_sensitive_units_of_all_layers_go(kind, tmp_path):
    with tf.Graph().as_default():
        sess, pruner, mean = guide(kind, tmp_path, steps=1)
        found = {name: trained(sess, name) != 0 for name in pruner.weights}
        sess.close()
    block = 4 if kind is SIMDOCPruner else 1
    units = []
    for name, keep in found.items():
        score = mean[name] / np.sqrt((mean[name] ** 2).sum())
        for place in np.ndindex(*score.shape[:-1]):
            for start in range(0, score.shape[-1], block):
                run = slice(start, start + block)
                alive = keep[place][run]
                assert alive.all() or not alive.any()
                units.append((float(score[place][run].mean()), bool(alive[0]), alive.size))
    units.sort(key=lambda unit: unit[0])
    dead = sum(size for _, alive, size in units if not alive)
    assert dead / sum(size for _, _, size in units) == pytest.approx(0.6, abs=2e-3)
    border = next(index for index, unit in enumerate(units) if unit[1])
    assert all(alive for _, alive, _ in units[border + 2:])  # float32 may swap neighbours at the border
    assert [alive for _, alive, _ in units[:border]] == [False] * border


@pytest.mark.parametrize("kind", ALL)
def test_zeros_outlive_the_optimizer_and_grow_from_event_to_event(kind, tmp_path):
    with tf.Graph().as_default():
        shares = []

        class Watched(kind):
            def do_pruning(self, sess):
                super().do_pruning(sess)
                shares.append(zero_share(sess, self))

        sess, pruner, _ = guide(Watched, tmp_path, events=2, steps=6, prune_finetune_iterations=2)
        dead = {name: trained(sess, name) == 0 for name in pruner.weights}
        assert all((pruner.read_keeps(sess)[name] == ~dead[name]).all() for name in dead)
        sess.close()
    first = 0.6 * (1 - 0.5 ** 3)
    assert shares == pytest.approx([first] * 3 + [0.6] * 3, abs=NEAR[kind])
    assert shares[0] == shares[2] and shares[3] == shares[5]


def test_found_ratios_can_be_edited_and_given_back(tmp_path):
    with tf.Graph().as_default():
        sess, pruner, _ = guide(SNIPLevelPruner, tmp_path)
        names = list(pruner.weights)
        sess.close()
    ratios = read_prune_ratios(str(tmp_path / "found.yml"), names)
    assert set(ratios) == set(names)
    (tmp_path / "edited.yml").write_text("c1/kernel: 0.25\nf*/kernel: 0.75\n")
    with tf.Graph().as_default():
        sess, pruner, _ = guide(SNIPLevelPruner, tmp_path, config_file=str(tmp_path / "edited.yml"))
        shares = {name: float((trained(sess, name) == 0).mean()) for name in names}
        sess.close()
    wanted = {"c1/kernel": 0.25, "c2/kernel": 0.6, "f1/kernel": 0.75, "f2/kernel": 0.75}
    assert shares == pytest.approx(wanted, abs=1e-2)


def test_channels_of_what_is_not_trained_stay():
    with tf.Graph().as_default():
        network()
        pruner = TaylorFOChannelPruner(None, sparsity=0.5, align_channels=1)
    scores = {name: np.arange(1.0, 1 + pruner.score_shape(weight)[0]) for name, weight in pruner.weights.items()
              if name != "c1/kernel"}
    keeps = pruner.decide(scores, None, 1.0)
    assert keeps["c1/kernel"].all() and keeps["b1/gamma"].all()
    assert np.flatnonzero(~keeps["c2/bias"]).tolist() == list(range(int((~keeps["c2/bias"]).sum()))) != []


def test_skipped_layers_stay_dense_and_are_listed(tmp_path):
    with tf.Graph().as_default():
        sess, pruner, _ = guide(SNIPLevelPruner, tmp_path, skip_layers=["c2/*"], skip_first=True, skip_last=True)
        rows = {row.name: row for row in pruner.report(sess)}
        dense = [(trained(sess, name + "/kernel") == 0).sum() for name in ("c1", "c2", "f2")]
        sess.close()
    assert dense == [0, 0, 0]
    reasons = {name: row.reason for name, row in rows.items() if row.reason}
    assert reasons == {"c1/conv": "the first layer", "c2/conv": "named in skip_layers", "f2/matmul": "the last layer"}
    assert rows["f1/matmul"].ratio == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("change, error, words", [
    (dict(sparsity=-0.1), ValueError, "sparsity must lie"),
    (dict(sparsity=0.9, max_prune_ratio=0.5), ValueError, "cannot be reached"),
    (dict(max_prune_ratio=0.0), ValueError, "max_prune_ratio must lie"),
    (dict(total_pruning_iterations=0), ValueError, "events must be at least 1"),
    (dict(prune_finetune_iterations=-1), ValueError, "prune_finetune_iterations"),
    (dict(ramp="cubic"), TypeError, "ramp must be a Ramp"),
    (dict(skip_layers=["c9/*"]), ValueError, "no layer matches 'c9/\\*'"),
    (dict(output_names=["nothing"]), ValueError, "no tensor named"),
    (dict(graph=3), TypeError, "graph must be a tf.Graph"),
])
def test_bad_arguments_are_refused_at_construction(change, error, words):
    with tf.Graph().as_default():
        network()
        with pytest.raises(error, match=words):
            SNIPLevelPruner(None, **change)


def test_files_and_moments_that_do_not_fit_are_refused(tmp_path):
    (tmp_path / "other.npy").write_bytes(b"no zip")
    with tf.Graph().as_default() as graph:
        network()
        with pytest.raises(ValueError, match="holds no sensitivities"):
            SNIPLevelPruner(str(tmp_path / "other.npy"))
        with pytest.raises(FileNotFoundError):
            SNIPLevelPruner(str(tmp_path / "missing.npy"))
        np.savez(str(tmp_path / "few.npz"), **{"c1/kernel": np.zeros([2, 2], np.float32)})
        with pytest.raises(ValueError, match="no sensitivity of the shape of c1/kernel"):
            SNIPLevelPruner(str(tmp_path / "few.npz"))
        with pytest.raises(ValueError, match="align_channels"):
            TaylorFOChannelPruner(None, align_channels=0)
        pruner = SNIPLevelPruner(None)
        with session(graph) as sess:
            with pytest.raises(RuntimeError, match="needs a sensitivity_npy_file"):
                pruner.do_pruning(sess)
            with pytest.raises(RuntimeError, match="nothing has been pruned yet"):
                pruner.save_compress_params(str(tmp_path / "params.bin"), sess)
        with session(tf.Graph()) as other, pytest.raises(RuntimeError, match="not of the graph"):
            pruner.do_pruning(other)
        assert not (tmp_path / "params.bin").exists()
        LSQQuantizer(graph, True)
        with pytest.raises(RuntimeError, match="before the quantizer"):
            SNIPLevelPruner(None)
        graph.finalize()
        with pytest.raises(RuntimeError, match="finalized"):
            SNIPLevelPruner(None)
    with pytest.raises(ValueError, match="there are none"):
        SensitivityAnalyzer([])
    with tf.Graph().as_default():
        lonely = tf.get_variable("lonely", initializer=1.0)
        with pytest.raises(ValueError, match="does not depend on lonely"):
            SensitivityAnalyzer([(None, lonely)])
        with pytest.raises(RuntimeError, match="nothing was analyzed"):
            SensitivityAnalyzer([(lonely * 2, lonely)]).save_sensitivity_npy(str(tmp_path / "empty.npy"))
        with pytest.raises(ValueError, match="nothing to prune"):
            SNIPLevelPruner(None)
