"""The samples of the seed's guide, with nothing but the import line changed, deploy exactly."""
import numpy as np
import pytest

import slimtrain.hooks.helpers as helper
import tf_nets
from deploying import images
from slimtrain.core import sqnr_db
from slimtrain.hooks import (
    EMAQuantizer,
    LSQQuantizer,
    MNN_QAT_variables,
    OAQQuantizer,
    get_qat_state_placeholder,
    strip_MNN_QAT_ops,
)
from slimtrain.proto import PruneType, convert, prune_algorithm, read_params, run_model, save_algorithm
from tf_setup import session, tf


def float_checkpoint(net, folder):
    with tf.Graph().as_default() as graph:
        net(tf.placeholder(tf.float32, [None, 12, 12, 3], name="x"), False)
        saver, init = tf.train.Saver(), tf.global_variables_initializer()
        with session(graph) as sess:
            sess.run(init)
            return saver.save(sess, str(folder / "model.ckpt"))


def freeze(sess, output, path):
    frozen = tf.graph_util.convert_variables_to_constants(sess, sess.graph_def, output_node_names=[output])
    with open(str(path), "wb") as file:
        file.write(frozen.SerializeToString())


def converted(folder, x, params="compress_params.bin"):
    coverage = convert(str(folder / "frozen.pb"), str(folder / "net.mnn"), str(folder / params)).coverage
    (output,) = run_model(str(folder / "net.mnn"), {"x": x}).values()
    return coverage, output


@pytest.mark.parametrize("make_quantizer", [EMAQuantizer, LSQQuantizer, OAQQuantizer])
@pytest.mark.parametrize("net", [tf_nets.mobile_net, tf_nets.pool_net], ids=["mobile", "pools"])
def test_train_save_strip_and_freeze_in_one_session(make_quantizer, net, tmp_path):
    checkpoint = float_checkpoint(net, tmp_path)
    with tf.Graph().as_default():
        x = tf.placeholder(tf.float32, [None, 12, 12, 3], name="x")
        output = net(x, False)
        quantizer = make_quantizer(tf.get_default_graph())
        train_step = tf.train.GradientDescentOptimizer(1e-3).minimize(tf.reduce_mean(tf.square(output - 1.0)))
        saver = tf.train.Saver(var_list=[v for v in tf.global_variables() if v not in MNN_QAT_variables()])
        sess = tf.Session()
        sess.run(tf.global_variables_initializer())
        saver.restore(sess, checkpoint)
        new_saver = tf.train.Saver()
        quantizer.init(sess)
        quant_state = quantizer.is_training
        assert quant_state is get_qat_state_placeholder()
        for number in range(4):
            feed_dict = {x: np.random.RandomState(number).randn(4, 12, 12, 3), quant_state: True}
            sess.run(train_step, feed_dict=feed_dict)
            quantizer.update(sess)
        tested = sess.run(output, {x: images(), quant_state: False})
        new_saver.save(sess, str(tmp_path / "qat"))
        quantizer.save_compress_params(str(tmp_path / "compress_params.bin"), sess, append=False)
        (integers,) = quantizer.simulate(sess, [output.name], {x: images()})
        strip_MNN_QAT_ops(sess.graph)
        freeze(sess, output.op.name, tmp_path / "frozen.pb")
        coverage, deployed = converted(tmp_path, images())
        assert coverage.fraction == 1.0
        assert sqnr_db(integers, deployed) >= 100
        assert sqnr_db(integers, tested) > 40  # a value next to a tie may round to the other level in real numbers
        # the session goes on with what it ran before, and a second round gives the newer numbers
        np.testing.assert_array_equal(sess.run(output, {x: images(), quant_state: False}), tested)
        sess.run(train_step, feed_dict=feed_dict)
        quantizer.save_compress_params(str(tmp_path / "compress_params.bin"), sess)
        (later,) = quantizer.simulate(sess, [output.name], {x: images()})
        quantizer.strip_qat_ops()
        freeze(sess, output.op.name, tmp_path / "frozen.pb")
        assert sqnr_db(later, converted(tmp_path, images())[1]) >= 100
        assert sqnr_db(later, integers) < 100
        sess.close()


def test_separate_scripts_for_training_and_testing(tmp_path):
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None, 12, 12, 3], name="x")
        output = tf_nets.mobile_net(x, True)
        quantizer = LSQQuantizer(graph, bits=4)
        with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
            train_step = tf.train.GradientDescentOptimizer(1e-3).minimize(tf.reduce_mean(tf.square(output - 1.0)))
        saver = tf.train.Saver()
        with session(graph) as sess:
            sess.run(tf.global_variables_initializer())
            for number in range(4):
                batch = np.random.RandomState(number).randn(4, 12, 12, 3)
                sess.run(train_step, {x: batch, quantizer.is_training: True})
            saver.save(sess, str(tmp_path / "qat"))
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None, 12, 12, 3], name="x")
        output = tf_nets.mobile_net(x, False)
        quantizer = LSQQuantizer(graph, bits=4)
        with session(graph) as sess:
            tf.train.Saver().restore(sess, str(tmp_path / "qat"))
            tested = sess.run(output, {x: images(), quantizer.is_training: False})
            (integers,) = quantizer.simulate(sess, [output.name], {x: images()})
            quantizer.save_compress_params(str(tmp_path / "compress_params.bin"), sess)
            strip_MNN_QAT_ops(sess.graph)
            freeze(sess, output.op.name, tmp_path / "frozen.pb")
    coverage, deployed = converted(tmp_path, images())
    assert coverage.fraction == 1.0
    assert sqnr_db(integers, deployed) >= 100
    assert sqnr_db(tested, deployed) > 40


def test_a_graph_read_from_a_checkpoint_is_stripped_by_name(tmp_path):
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None, 12, 12, 3], name="x")
        output = tf_nets.plain_net(x, False)
        plain = graph.as_graph_def().SerializeToString(deterministic=True)
        quantizer = EMAQuantizer(graph)
        with session(graph) as sess:
            sess.run(tf.global_variables_initializer())
            sess.run(output, {x: images(), quantizer.is_training: True})
            tf.train.Saver().save(sess, str(tmp_path / "qat"))
    with tf.Graph().as_default() as graph:
        saver = tf.train.import_meta_graph(str(tmp_path / "qat.meta"))
        strip_MNN_QAT_ops(graph)
        with session(graph) as sess:
            saver.restore(sess, str(tmp_path / "qat"))
            assert get_qat_state_placeholder().name == "MNN_QAT_is_training:0"
            freeze(sess, output.op.name, tmp_path / "frozen.pb")
            stripped = sess.run(output.name, {"x:0": images()})
    frozen = tf.GraphDef()
    frozen.ParseFromString((tmp_path / "frozen.pb").read_bytes())
    assert not [node.name for node in frozen.node if "MNN_QAT" in node.name]
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(tf.GraphDef.FromString(plain), name="")
        tf.import_graph_def(frozen, name="frozen")
        with session(graph) as sess:
            (again,) = sess.run(["frozen/" + output.name], {"frozen/x:0": images()})
    np.testing.assert_allclose(again, stripped, atol=1e-5)


def test_a_finalized_graph_is_not_stripped():
    with tf.Graph().as_default() as graph:
        tf_nets.plain_net(tf.placeholder(tf.float32, [None, 12, 12, 3], name="x"), False)
        LSQQuantizer(graph)
        graph.finalize()
        with pytest.raises(RuntimeError, match="export"):
            strip_MNN_QAT_ops(graph)


def test_parameters_are_appended_to_those_of_pruning(tmp_path):
    path = str(tmp_path / "compress_params.bin")
    save_algorithm(path, prune_algorithm(PruneType.RANDOM, ["w"], [0.5], ["c1/conv"]), append=False)
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None, 12, 12, 3], name="x")
        output = tf_nets.plain_net(x, False)
        quantizer = LSQQuantizer(graph, True)
        with session(graph) as sess:
            sess.run(tf.global_variables_initializer())
            sess.run(output, {x: images()})
            quantizer.save_compress_params(path, sess, append=True)
    assert len(read_params(path).algo) == 2


def test_the_names_of_layers():
    with tf.Graph().as_default() as graph:
        tf_nets.mobile_net(tf.placeholder(tf.float32, [None, 12, 12, 3], name="x"), False)
        names = helper.get_op_name_of_type(graph, ["Conv2D", "DepthwiseConv2dNative", "MatMul"])
        assert names == ["c1/conv", "d1/depthwise", "p1/conv", "e2/conv", "d2/depthwise", "p2/conv", "last/conv",
                         "fc/matmul"]
        assert helper.get_op_name_of_type(graph, ["MatMul"]) == ["fc/matmul"]
