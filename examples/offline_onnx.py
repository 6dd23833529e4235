"""Quantize an ONNX file without any training framework: from a folder of images to an int8 .mnn.

    python examples/offline_onnx.py [--out out/offline] [--method kl]

scikit-learn trains a small network on its digits; it is written as ONNX with nothing but ``onnx``. The images become
PNG files, a configuration of MNN's own ``mnnquant`` says where they are, and ``slimtrain quantize`` does the rest. By
hand that is one command:

    slimtrain quantize digits.onnx --config mnnquant.json -o int8/
"""
import argparse
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from slimtrain.proto import run_model
from slimtrain.proto.cli import cli


def network(classifier):
    """The classifier as an ONNX model that reads images [n, 1, 8, 8] with pixels 0..1."""
    nodes, constants, last = [helper.make_node("Flatten", ["image"], ["pixels"])], [], "pixels"
    layers = list(zip(classifier.coefs_, classifier.intercepts_))
    for index, (weight, bias) in enumerate(layers):
        constants += [numpy_helper.from_array(weight.astype(np.float32), f"weight{index}"),
                      numpy_helper.from_array(bias.astype(np.float32), f"bias{index}")]
        end = index + 1 == len(layers)
        output = "scores" if end else f"sum{index}"
        nodes.append(helper.make_node("Gemm", [last, f"weight{index}", f"bias{index}"], [output], name=f"layer{index}"))
        if not end:
            last = f"hidden{index}"
            nodes.append(helper.make_node("Relu", [output], [last]))
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 8, 8])]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 10])]
    graph = helper.make_graph(nodes, "digits", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def main():
    """Train, write, quantize, measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="out/offline", type=Path)
    parser.add_argument("--method", default="kl", choices=["ema", "kl", "admm", "mse", "max_abs"])
    options = parser.parse_args()
    images, classes = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 1, 8, 8).astype(np.float32)
    order = np.random.RandomState(0).permutation(len(images))
    train, test = order[:1200], order[1200:]
    classifier = MLPClassifier((64, 32), max_iter=60, random_state=0).fit(images[train].reshape(-1, 64), classes[train])

    folder = options.out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for index in train[:200]:
        Image.fromarray((images[index, 0] * 255).round().astype(np.uint8)).save(folder / f"{index:04d}.png")
    onnx.save(network(classifier), str(options.out / "digits.onnx"))
    (options.out / "mnnquant.json").write_text(json.dumps({
        "format": "GRAY", "mean": [0], "normal": [1 / 255], "width": 8, "height": 8, "path": str(folder),
        "used_image_num": 200, "feature_quantize_method": options.method.upper(), "weight_quantize_method": "MAX_ABS"}))

    cli.main(["quantize", str(options.out / "digits.onnx"), "--config", str(options.out / "mnnquant.json"),
              "-o", str(options.out / "int8")], standalone_mode=False)
    scores = run_model(options.out / "int8" / "digits.mnn", images[test])["scores"].reshape(-1, 10)
    report = {"float": float(classifier.score(images[test].reshape(-1, 64), classes[test])),
              "int8 in MNN": float((scores.argmax(1) == classes[test]).mean())}
    (options.out / "accuracy.json").write_text(json.dumps(report))
    print(f"accuracy: float {report['float']:.1%}, int8 in MNN {report['int8 in MNN']:.1%}")


if __name__ == "__main__":
    main()
