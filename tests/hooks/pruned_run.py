"""One monitored training run that prunes, to be started, killed and resumed as a process of its own.

python pruned_run.py FOLDER LAST_STEP [--kill STEP] [--pruner SNIPLevelPruner] [--quantize] [--worker INDEX --ports ...]
"""
import argparse
import os
import time

import numpy as np

import slimtrain.hooks as hooks
import tf_nets
from monitored_run import Kill, batch
from tf_setup import one_thread, tf


def build(pruner, folder, quantize=False, is_chief=True, optimizer=None, **arguments):
    """A network, its hooks, and everything a session needs, in the default graph."""
    x = tf.placeholder(tf.float32, [None, 8, 8, 3], name="x")
    y = tf_nets.batch_norm(tf_nets.conv(x, "c1", 12, bias=False, seed=1), "b1", True, 2)
    y = tf.nn.relu(y, name="r1")
    y = tf.nn.relu(tf_nets.conv(y, "c2", 16, stride=2, seed=3), name="r2")
    logits = tf.identity(tf_nets.dense(tf.reduce_mean(y, [1, 2]), "fc", 5, seed=5), name="logits")
    chosen = dict(sparsity=0.6, total_pruning_iterations=3, prune_finetune_iterations=1, sensitivity_steps=2, begin=2,
                  prune_ratio_result_file="", output_names=["logits"], export_dir=os.path.join(folder, "export"))
    made = [getattr(hooks, pruner + "Hook")(is_chief=is_chief, **{**chosen, **arguments})]
    if quantize:
        made.append(hooks.LSQQuantizerHook(is_training=True, output_names=["logits"], is_chief=is_chief,
                                           export_dir=os.path.join(folder, "export")))
    loss = tf.reduce_mean(tf.square(logits - 1.0))
    step = tf.train.get_or_create_global_step()
    with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
        train = (optimizer or tf.train.MomentumOptimizer(0.05, 0.9)).minimize(loss, global_step=step)
    return x, train, step, made


def session(folder, hooks_of_run, every=3, **arguments):
    """A monitored session that saves often and says nothing."""
    return tf.train.MonitoredTrainingSession(
        checkpoint_dir=os.path.join(str(folder), "ckpt"), hooks=hooks_of_run, save_checkpoint_steps=every,
        save_summaries_steps=None, save_summaries_secs=None, log_step_count_steps=None,
        **{"config": one_thread(), **arguments})


def zero_shares(values):
    """Share of zeros in each kernel."""
    return {name: float(np.mean(value == 0)) for name, value in values.items() if name.endswith("/kernel")}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("last", type=int)
    parser.add_argument("--kill", type=int)
    parser.add_argument("--pruner", default="SNIPLevelPruner")
    parser.add_argument("--quantize", action="store_true")
    parser.add_argument("--worker", type=int)
    parser.add_argument("--ports")
    options = parser.parse_args()
    if options.worker is not None:
        work(options)
        return
    x, train, step, made = build(options.pruner, options.folder, options.quantize)
    with session(options.folder, made + [Kill(options.kill)]) as run:
        now = run.run(step)
        while now < options.last:
            run.run(train, {x: batch(now)})
            now += 1


def work(options):
    """A parameter server (worker -1) or one of two workers."""
    ports = options.ports.split(",")
    cluster = tf.train.ClusterSpec({"ps": ["localhost:" + ports[0]],
                                    "worker": ["localhost:" + port for port in ports[1:]]})
    if options.worker < 0:
        tf.train.Server(cluster, "ps", 0, config=one_thread()).join()
    server = tf.train.Server(cluster, "worker", options.worker, config=one_thread())
    is_chief = options.worker == 0
    here = "/job:worker/task:%d" % options.worker
    with tf.device(tf.train.replica_device_setter(cluster=cluster, worker_device=here)):
        x, train, step, made = build(options.pruner, options.folder, is_chief=is_chief)
    config = tf.ConfigProto(device_filters=["/job:ps", here])
    with session(options.folder, made, 10, master=server.target, is_chief=is_chief, config=config) as run:
        for number in range(options.last // 2):
            run.run(train, {x: batch(1000 * options.worker + number)})
        while is_chief and run.run(step) < options.last:  # its last checkpoint shall hold everybody's steps
            time.sleep(0.1)


if __name__ == "__main__":
    main()
