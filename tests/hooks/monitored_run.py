"""One monitored training run of a small network, to be started, killed and resumed as a process of its own.

python monitored_run.py FOLDER LAST_STEP [--kill STEP] [--quantizer LSQ] [--worker INDEX --ports PS,W0,W1]
"""
import argparse
import os
import signal
import time

import numpy as np

import slimtrain.hooks as hooks
import tf_nets
from tf_setup import one_thread, tf


def build(quantizer, folder, is_chief=True, export_dir=None, **arguments):
    """The network, its hook, and everything a session needs, in the default graph."""
    x = tf.placeholder(tf.float32, [4, 8, 8, 3], name="x")
    y = tf_nets.batch_norm(tf_nets.conv(x, "c1", 6, bias=False, seed=1), "b1", True, 2)
    y = tf.nn.relu(y, name="r1")
    y = tf.nn.relu(tf_nets.conv(y, "c2", 8, stride=2, seed=3), name="r2")
    logits = tf.identity(tf_nets.dense(tf.reduce_mean(y, [1, 2]), "fc", 5, seed=5), name="logits")
    export_dir = export_dir or os.path.join(folder, "export")
    hook = getattr(hooks, quantizer + "QuantizerHook")(
        output_names=["logits"], export_dir=export_dir, is_chief=is_chief, **arguments)
    loss = tf.reduce_mean(tf.square(logits - 1.0))
    step = tf.train.get_or_create_global_step()
    with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
        train = tf.train.MomentumOptimizer(0.05, 0.9).minimize(loss, global_step=step)
    return x, train, step, hook


def batch(step):
    return np.random.RandomState(step).randn(4, 8, 8, 3)


class Kill(tf.train.SessionRunHook):
    """Dies without warning after a step."""

    def __init__(self, step):
        self.step = step

    def after_run(self, run_context, run_values):
        if self.step is not None and run_context.session.run(tf.train.get_global_step()) >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("last", type=int)
    parser.add_argument("--kill", type=int)
    parser.add_argument("--quantizer", default="LSQ")
    parser.add_argument("--worker", type=int)
    parser.add_argument("--ports")
    options = parser.parse_args()
    if options.worker is not None:
        work(options)
    else:
        train_alone(options)


def train_alone(options):
    x, train, step, hook = build(options.quantizer, options.folder)
    with tf.train.MonitoredTrainingSession(
            checkpoint_dir=os.path.join(options.folder, "ckpt"), hooks=[hook, Kill(options.kill)],
            save_checkpoint_steps=3, save_summaries_steps=None, save_summaries_secs=None, log_step_count_steps=None,
            config=one_thread()) as session:
        now = session.run(step)
        while now < options.last:
            session.run(train, {x: batch(now)})
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
        x, train, step, hook = build(options.quantizer, options.folder, is_chief,
                                     os.path.join(options.folder, "worker-%d" % options.worker))
    with tf.train.MonitoredTrainingSession(
            server.target, is_chief=is_chief, checkpoint_dir=os.path.join(options.folder, "ckpt"), hooks=[hook],
            max_wait_secs=100, save_checkpoint_steps=10, save_summaries_steps=None, save_summaries_secs=None,
            log_step_count_steps=None, config=tf.ConfigProto(device_filters=["/job:ps", here])) as session:
        for number in range(options.last // 2):
            images = batch(1000 * options.worker + number)
            images *= (1 if is_chief and not number else 2) / np.abs(images).max()
            session.run(train, {x: images})
        while is_chief and session.run(step) < options.last:  # its last checkpoint shall hold everybody's steps
            time.sleep(0.1)


if __name__ == "__main__":
    main()
