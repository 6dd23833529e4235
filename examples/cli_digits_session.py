"""Train a digits classifier in a ``MonitoredTrainingSession``, compressed as one flag says, down to MNN.

    python examples/cli_digits_session.py --compress examples/compress.yaml

Its twin for Lightning is ``cli_digits.py``, which takes the same flag.
"""
import argparse
import json
import os
import tempfile

import numpy as np
from digits_monitored_session import BATCH, OUTPUT, SEED, accuracy, load_images, network, test, tf
from rich.progress import track

from slimtrain.core import add_compress_flag, sqnr_db
from slimtrain.hooks import from_config, get_op_weight_values
from slimtrain.proto import run_model


class Judge(tf.train.SessionRunHook):
    """When training ends, runs the last compression's simulation of the device, and saves weights for another run."""

    def __init__(self, hook, images, weights):
        self.hook, self.images, self.weights, self.simulated = hook, images, weights, None

    def end(self, session):
        get_op_weight_values(session, self.weights)  # expanded ones as what they are merged to
        if hasattr(self.hook, "quantizer"):
            (self.simulated,) = self.hook.quantizer.simulate(session, [OUTPUT], {"image:0": self.images})


def train(folder, images, labels, steps, rate, title, make_hooks=list):
    """Train in a monitored session; ``make_hooks`` is called before the optimizer is made."""
    with tf.Graph().as_default():
        tf.set_random_seed(SEED)
        x = tf.placeholder(tf.float32, [None, 8, 8, 1], name="image")
        wanted = tf.placeholder(tf.int64, [None], name="label")
        logits = network(x, training=True)
        hooks = make_hooks()
        loss = tf.losses.sparse_softmax_cross_entropy(wanted, logits)
        step = tf.train.get_or_create_global_step()
        with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
            update = tf.train.AdamOptimizer(tf.train.cosine_decay(rate, step, steps)).minimize(loss, global_step=step)
        random = np.random.RandomState(SEED)
        with tf.train.MonitoredTrainingSession(checkpoint_dir=folder, hooks=hooks, save_checkpoint_steps=steps,
                                               log_step_count_steps=None) as session:
            for _ in track(range(steps), title):
                chosen = random.randint(len(images), size=BATCH)
                session.run(update, {x: images[chosen], wanted: labels[chosen]})
    return tf.train.latest_checkpoint(folder)


def main():
    """Train in float, train on as the flag says, run the result in MNN."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_compress_flag(parser)
    parser.add_argument("--out", default=os.path.join("out", "cli-tf"))
    parser.add_argument("--steps", type=int, default=500, help="of training in float")
    parser.add_argument("--compress-steps", type=int, default=250, help="of training with compression")
    options = parser.parse_args()
    images, labels, test_images, test_labels = load_images()
    work = tempfile.mkdtemp()
    trained = train(os.path.join(work, "float"), images, labels, options.steps, 3e-3, "float")
    report = {"accuracy": {"float": test(trained, test_images, test_labels, quantized=False)[0]}}
    if options.compress:
        stem = os.path.join(options.out, "model")
        for number, part in enumerate(options.compress.runs):  # what is over-parameterized has a run of its own
            folder, judges, weights = os.path.join(work, str(number)), [], trained

            def make_hooks(part=part, folder=folder, judges=judges, weights=weights):
                hooks = from_config(part, output_names=[OUTPUT], export_to=stem, init_checkpoint=weights, report=True,
                                    checkpoint_dir=folder, train_steps=options.compress_steps, is_training=True,
                                    epoch_steps=len(images) // BATCH)
                judges.append(Judge(hooks[-2], test_images, os.path.join(folder, "weights.npz")))
                return [*hooks, *judges]

            train(folder, images, labels, options.compress_steps, 1e-3, "compressed", make_hooks)
            trained = judges[0].weights
        (scores,) = run_model(stem + ".mnn", {"image": test_images}).values()
        with open(os.path.join(options.out, "compression_report.json")) as file:
            compression = json.load(file)
        report["accuracy"]["mnn"] = accuracy(scores, test_labels)
        report.update(bytes=compression["real_bytes"], coverage=compression["coverage"])
        if judges[0].simulated is not None:
            report["sqnr_db"] = min(sqnr_db(judges[0].simulated, scores), 300.0)
        with open(os.path.join(options.out, "report.json"), "w") as file:
            json.dump(report, file, indent=2)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
