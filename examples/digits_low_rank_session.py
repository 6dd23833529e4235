"""A digits classifier made smaller in ``MonitoredTrainingSession``s: decomposed and quantized, or expanded and merged.

The float network of ``digits_monitored_session`` is decomposed into low-rank factors, which are fine-tuned in int8 in
the same run. Beside it, the network is trained from scratch with over-parameterized convolutions, and exported as the
small network that these equal. MNN converts and runs what the hooks exported.

    python examples/digits_low_rank_session.py [--steps 500] [--share 0.4] [--out out/low-rank-tf]

Runs on TensorFlow 1.15 and on 2.x.
"""
import argparse
import json
import os
import shutil
import tempfile

from digits_monitored_session import OUTPUT, deploy, export_float, load_images, network, tf, train
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from slimtrain.core import BudgetRanks, sqnr_db
from slimtrain.hooks import (
    LOPHook,
    LowRankDecompositionHook,
    LSQQuantizer,
    LSQQuantizerHook,
    apply_structure,
    structure_in,
)


def simulate(checkpoint, images):
    """The scores of the decomposed network in the integer arithmetic that was trained, from a graph for tests."""
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None, 8, 8, 1], name="image")
        network(x, training=False)
        apply_structure(graph, structure_in(checkpoint, graph))
        quantizer = LSQQuantizer(graph, is_training=False, output_names=[OUTPUT])
        with tf.Session() as session:
            tf.train.Saver().restore(session, checkpoint)
            return quantizer.simulate(session, [OUTPUT], {x: images})[0]


def main():
    """Train, decompose, quantize, expand, export, convert, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="of each of the three trainings")
    parser.add_argument("--share", type=float, default=0.4, help="of the weights that is left by the decomposition")
    parser.add_argument("--out", default=os.path.join("out", "low-rank-tf"))
    options = parser.parse_args()
    out = options.out
    tf.disable_v2_behavior()
    tf.logging.set_verbosity(tf.logging.ERROR)
    os.makedirs(out, exist_ok=True)
    work = tempfile.mkdtemp(prefix="digits-")
    images, labels, test_images, test_labels = load_images()
    checkpoint_dir = os.path.join(work, "low-rank")
    made = []

    def decompose_and_quantize():
        made.append(LowRankDecompositionHook(None, float_checkpoint, align_channels=4, tucker_minimal_ratio=0.0,
                                             rank_rule=BudgetRanks(options.share), checkpoint_dir=checkpoint_dir,
                                             output_names=[OUTPUT], export_dir=os.path.join(out, "low-rank")))
        return [made[0], LSQQuantizerHook(is_training=True, output_names=[OUTPUT],
                                          export_dir=os.path.join(out, "low-rank"))]

    def expand():
        return [LOPHook(4, is_training=True, output_names=[OUTPUT], export_dir=os.path.join(out, "lop"))]

    with Progress() as progress:
        float_checkpoint = train(os.path.join(work, "float"), images, labels, options.steps, 3e-3, progress, "float")
        checkpoint = train(checkpoint_dir, images, labels, options.steps, 1e-3, progress, "low rank, int8",
                           decompose_and_quantize)
        train(os.path.join(work, "lop"), images, labels, options.steps, 3e-3, progress, "LOP", expand)
    export_float(float_checkpoint, os.path.join(out, "float.pb"))
    simulated = simulate(checkpoint, test_images)
    shutil.rmtree(work)
    low_rank, lop = os.path.join(out, "low-rank", "model"), os.path.join(out, "lop", "model")
    scores, small = deploy(low_rank, test_images, test_labels, low_rank + ".compress_params.bin")
    report = {"tensorflow": tf.__version__, "sqnr_db": min(sqnr_db(simulated, scores), 300.0), "runs": {
        "float": deploy(os.path.join(out, "float"), test_images, test_labels)[1], "low rank, int8": small,
        "LOP, merged": deploy(lop, test_images, test_labels, lop + ".compress_params.bin")[1]},
        "layers": [line._asdict() for line in made[0].report]}
    with open(os.path.join(out, "report.json"), "w") as file:
        json.dump(report, file, indent=2)
    show(report, out)


def show(report, out):
    """Print the tables."""
    table = Table(title="digits, TensorFlow {tensorflow}: MNN int8 against its simulation {sqnr_db:.0f} dB".format(
        **report))
    for title in ("", "accuracy in MNN", "bytes of the .mnn", "ms"):
        table.add_column(title, justify="right" if title else "left")
    for name, run in report["runs"].items():
        table.add_row(name, "{accuracy:.4f}".format(**run), str(run["bytes"]), "{ms:.3f}".format(**run))
    layers = Table("layer", "ranks", "weights", "left", "error", "why not")
    for line in report["layers"]:
        layers.add_row(line["name"], " ".join(map(str, line["ranks"])), str(line["parameters"][0]),
                       str(line["parameters"][1]), "{error:.3f}".format(**line), line["reason"])
    Console().print(table)
    Console().print(layers)
    Console().print("written: {0}/report.json, {0}/low-rank/model.mnn, {0}/lop/model.mnn".format(out))


if __name__ == "__main__":
    main()
