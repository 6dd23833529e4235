"""Monitored training runs of a network that is decomposed or over-parameterized, to be killed and resumed.

python structure_run.py FOLDER LAST_STEP HOOK... [--kill STEP]     (HOOK: low_rank, lop)
"""
import argparse
import os

import tf_nets
from monitored_run import Kill, batch
from slimtrain.core import ExplicitRanks
from slimtrain.hooks import LOPHook, LowRankDecompositionHook, get_op_weight_values
from tf_setup import one_thread, session, tf

#: for ``network``
RANKS = ExplicitRanks({"c1/conv": (5, 4), "c2/conv": (5,), "fc/matmul": (3,)})


def network(batch_size=4):
    x = tf.placeholder(tf.float32, [batch_size, 8, 8, 3], name="x")
    y = tf_nets.batch_norm(tf_nets.conv(x, "c0", 8, bias=False, seed=1), "b0", True, 2)
    y = tf.nn.relu(y, name="r0")
    y = tf.nn.relu(tf_nets.conv(y, "c1", 12, stride=2, seed=3), name="r1")
    y = tf.nn.relu(tf_nets.conv(y, "c2", 12, 1, seed=5), name="r2")
    return x, tf.identity(tf_nets.dense(tf.reduce_mean(y, [1, 2]), "fc", 6, seed=7), name="logits")


def save_weights(path):
    """A file with the weights that the initializers give."""
    with tf.Graph().as_default() as graph:
        network()
        init = tf.global_variables_initializer()
        with session(graph) as run:
            run.run(init)
            get_op_weight_values(run, path)


def low_rank(folder, **arguments):
    return LowRankDecompositionHook(None, os.path.join(folder, "weights.npy"), rank_rule=RANKS,
                                    checkpoint_dir=os.path.join(folder, "low_rank", "ckpt"), **arguments)


def lop(folder, **arguments):
    return LOPHook(2, expand_linear=True, **arguments)


HOOKS = {"low_rank": low_rank, "lop": lop}


def train(name, folder, last, kill=None, make_others=list):
    """One run; ``make_others`` makes hooks that edit the graph after the first."""
    with tf.Graph().as_default():
        tf.set_random_seed(5)
        x, logits = network()
        hook = HOOKS[name](folder, output_names=["logits"], export_dir=os.path.join(folder, name + "-export"))
        others = make_others()
        step = tf.train.get_or_create_global_step()
        with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
            update = tf.train.MomentumOptimizer(0.05, 0.9).minimize(tf.reduce_mean(tf.square(logits - 1)),
                                                                    global_step=step)
        with tf.train.MonitoredTrainingSession(
                checkpoint_dir=os.path.join(folder, name, "ckpt"), hooks=[hook] + others + [Kill(kill)],
                save_checkpoint_steps=3, save_summaries_steps=None, save_summaries_secs=None,
                log_step_count_steps=None, config=one_thread()) as run:
            now = run.run(step)
            while now < last:
                run.run(update, {x: batch(now)})
                now += 1
    return hook


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("last", type=int)
    parser.add_argument("hooks", nargs="+")
    parser.add_argument("--kill", type=int)
    options = parser.parse_args()
    os.makedirs(options.folder, exist_ok=True)
    if not os.path.exists(os.path.join(options.folder, "weights.npy")):
        save_weights(os.path.join(options.folder, "weights.npy"))
    for name in options.hooks:
        train(name, options.folder, options.last, options.kill)


if __name__ == "__main__":
    main()
