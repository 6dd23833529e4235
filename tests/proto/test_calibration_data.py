"""Reading calibration data: images, sequences, arrays, and the configuration of MNN's own tool."""
import json

import numpy as np
import pytest

from slimtrain.core import ActivationMethod, ConversionError, WeightMethod
from slimtrain.proto.calibration_data import ImageFormat, InputType, ModelInput, Preprocessing, read_batches
from slimtrain.proto.mnnquant import read_mnnquant

FLOAT = np.dtype(np.float32)
IMAGE = ModelInput("x", (None, 3, 4, 5), FLOAT)


def png(path, pixels):
    from PIL import Image

    Image.fromarray(np.asarray(pixels, np.uint8)).save(str(path))


PLAIN = Preprocessing()


def one(source, value, preprocessing=PLAIN, **options):
    (batch,) = read_batches(source, [value], preprocessing, **options)
    return batch[value.name]


def test_images_become_planes_with_mean_and_normal(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, size=(4, 5, 3))
    png(tmp_path / "a.png", pixels)
    for image_format, order in ((ImageFormat.RGB, [0, 1, 2]), (ImageFormat.BGR, [2, 1, 0])):
        found = one(tmp_path, IMAGE, Preprocessing(format=image_format, mean=(1.0, 2.0, 3.0), normal=(0.5, 1.0, 2.0)))
        expected = (pixels[:, :, order] - np.array([1, 2, 3])) * np.array([0.5, 1, 2])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, np.moveaxis(expected, 2, 0)[None], rtol=1e-6)


def test_a_model_with_channels_last_reads_channels_last(tmp_path):
    pixels = np.random.RandomState(1).randint(0, 256, size=(6, 5, 3))
    png(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(one(tmp_path, ModelInput("x", (None, 6, 5, 3), FLOAT))[0], pixels)


def test_grey_images_and_four_channels(tmp_path):
    pixels = np.random.RandomState(2).randint(0, 256, size=(4, 5))
    png(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(one(tmp_path, ModelInput("x", (None, 1, 4, 5), FLOAT))[0, 0], pixels)
    four = one(tmp_path, ModelInput("x", (None, 4, 4, 5), FLOAT), Preprocessing(format=ImageFormat.BGRA))
    np.testing.assert_array_equal(four[0, :3], np.broadcast_to(pixels, (3, 4, 5)))
    assert (four[0, 3] == 255).all()


def test_resizing_maps_corners_to_corners(tmp_path):
    # a plane is reproduced by bilinear interpolation, whatever the size
    rows, columns = np.mgrid[0:9, 0:13]
    png(tmp_path / "a.png", 10 * rows + 5 * columns)
    found = one(tmp_path, ModelInput("x", (None, 1, 4, 5), FLOAT))[0, 0]
    expected = 10 * np.linspace(0, 8, 4)[:, None] + 5 * np.linspace(0, 12, 5)[None]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    half = one(tmp_path, ModelInput("x", (None, 1, 4, 6), FLOAT), Preprocessing(crop=(0.5, 0.5)))[0, 0]
    np.testing.assert_allclose(half[[0, -1]][:, [0, -1]], [[35, 60], [65, 90]])


def test_batches_of_a_folder_are_in_the_order_of_names_and_of_the_size_asked_for(tmp_path):
    for index in range(7):
        png(tmp_path / ("%02d.png" % index), np.full((4, 5), index))
    (tmp_path / "note.md").write_text("no image")
    value = ModelInput("x", (None, 1, 4, 5), FLOAT)
    batches = list(read_batches(tmp_path, [value], Preprocessing(), 3))
    assert [batch["x"][:, 0, 0, 0].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [len(batch["x"]) for batch in read_batches(tmp_path, [value], Preprocessing(), 3, count=4)] == [3, 1]
    fixed = ModelInput("x", (2, 1, 4, 5), FLOAT)
    assert [len(batch["x"]) for batch in read_batches(tmp_path, [fixed], Preprocessing(), 3)] == [2, 2, 2]


def test_sequences_hold_a_channel_in_each_line(tmp_path):
    (tmp_path / "a.txt").write_text("1 2 3\n4 5 6\n")
    (tmp_path / "b.txt").write_text("1 2 3\n4 5 7\n\n")
    (tmp_path / "c.txt").write_text("1\n2\n")
    batches = list(read_batches(tmp_path, [ModelInput("x", (None, 2, None), FLOAT)],
                                Preprocessing(InputType.SEQUENCE)))
    assert [batch["x"].shape for batch in batches] == [(2, 2, 3), (1, 2, 1)]
    np.testing.assert_array_equal(batches[0]["x"][1], [[1, 2, 3], [4, 5, 7]])


def test_arrays_come_by_name_or_alone(tmp_path):
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    np.savez(str(tmp_path / "two.npz"), x=x, y=y)
    inputs = [ModelInput("x", (None, 2), FLOAT), ModelInput("y", (None,), np.dtype(np.int64))]
    batches = list(read_batches(tmp_path / "two.npz", inputs, Preprocessing(), 4))
    assert [(len(batch["x"]), batch["x"].dtype, batch["y"].dtype) for batch in batches] == [
        (4, np.float32, np.int64), (2, np.float32, np.int64)]
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in batches]), x)
    np.save(str(tmp_path / "one.npy"), x)
    np.testing.assert_array_equal(one(tmp_path / "one.npy", inputs[0]), x)


@pytest.mark.parametrize("value, preprocessing, message", [
    (ModelInput("x", (None, 2, 4, 5), FLOAT), Preprocessing(), "say which format"),
    (ModelInput("x", (None, 3, None, 5), FLOAT), Preprocessing(), "say the width and height"),
    (ModelInput("x", (None, 3, 4, 5), FLOAT), Preprocessing(width=9), "height 4 and width 9"),
    (ModelInput("x", (None, 3, 4, 5), FLOAT), Preprocessing(format=ImageFormat.GRAY), "images in GRAY have 1"),
    (ModelInput("x", (None, 3, 4, 5), FLOAT), Preprocessing(mean=(1.0, 2.0)), "mean has 2 numbers for 3 channels"),
    (ModelInput("x", (None, 3), FLOAT), Preprocessing(), "4 dimensions"),
    (ModelInput("x", (5, 3, 4, 5), FLOAT), Preprocessing(), "at least 5 are needed"),
    (IMAGE, Preprocessing(InputType.SEQUENCE), "holds 0 files of type sequence"),
])
def test_images_that_do_not_fit_are_refused(value, preprocessing, message, tmp_path):
    png(tmp_path / "a.png", np.zeros((4, 5, 3)))
    with pytest.raises(ConversionError, match=message):
        list(read_batches(tmp_path, [value], preprocessing))


def test_broken_files_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ConversionError, match="broken.png: cannot read the image"):
        list(read_batches(tmp_path, [IMAGE], Preprocessing()))
    (tmp_path / "lines.txt").write_text("1 2\n3\n")
    with pytest.raises(ConversionError, match="as many numbers"):
        list(read_batches(tmp_path, [IMAGE], Preprocessing(InputType.SEQUENCE)))
    np.savez(str(tmp_path / "other.npz"), z=np.zeros((2, 3)))
    with pytest.raises(ConversionError, match=r"holds \['z'\], the model reads \['x'\]"):
        list(read_batches(tmp_path / "other.npz", [IMAGE], Preprocessing()))
    np.savez(str(tmp_path / "shape.npz"), x=np.zeros((2, 3)))
    with pytest.raises(ConversionError, match="has shape"):
        list(read_batches(tmp_path / "shape.npz", [IMAGE], Preprocessing()))
    with pytest.raises(ConversionError, match="cannot read arrays"):
        list(read_batches(tmp_path / "missing.npz", [IMAGE], Preprocessing()))


FULL = {"format": "RGB", "mean": [127.5, 127.5, 127.5], "normal": [0.00784314, 0.00784314, 0.00784314], "width": 224,
        "height": 128, "path": "images/", "used_image_num": 2, "feature_quantize_method": "ADMM",
        "weight_quantize_method": "ADMM", "feature_clamp_value": 100, "weight_clamp_value": 90, "batch_size": 4,
        "quant_bits": 7, "skip_quant_op_names": ["conv1", "fc"], "input_type": "sequence", "debug": True}


def config(folder, values):
    (folder / "mnnquant.json").write_text(json.dumps(values))
    return folder / "mnnquant.json"


def test_every_key_of_the_configuration_is_read(tmp_path):
    (tmp_path / "images").mkdir()
    read = read_mnnquant(config(tmp_path, FULL))
    assert read.path == str(tmp_path / "images") + "/"
    assert read.preprocessing == Preprocessing(InputType.SEQUENCE, ImageFormat.RGB, (127.5,) * 3, (0.00784314,) * 3,
                                               224, 128)
    assert (read.method, read.weight_method) == (ActivationMethod.ADMM, WeightMethod.ADMM)
    assert (read.batch_size, read.samples, read.bits, read.debug) == (4, 2, 7, True)
    # seven bits have levels up to 63
    assert (read.largest_level, read.largest_weight_level, read.skip) == (100, 63, ("conv1", "fc"))


def test_defaults_are_those_of_the_tool(tmp_path, caplog):
    read = read_mnnquant(config(tmp_path, {"path": "x", "colour": 1}))
    assert (read.method, read.weight_method) == (ActivationMethod.KL, WeightMethod.MAX_ABS)
    assert read.preprocessing == Preprocessing(format=ImageFormat.BGR)
    assert (read.batch_size, read.samples, read.bits, read.debug, read.skip) == (32, 0, 8, False, ())
    assert "ignored unknown keys colour" in caplog.text


@pytest.mark.parametrize("key, value", [
    ("format", "YUV"), ("mean", ["a"]), ("width", 0), ("height", 1.5), ("used_image_num", -1), ("batch_size", 0),
    ("feature_quantize_method", "BEST"), ("weight_quantize_method", "KL"), ("feature_clamp_value", 128),
    ("weight_clamp_value", 0), ("quant_bits", 9), ("skip_quant_op_names", "conv1"), ("input_type", "video"),
    ("debug", "yes"), ("path", 3)])
def test_bad_values_are_refused_by_key(key, value, tmp_path):
    with pytest.raises(ConversionError, match=key):
        read_mnnquant(config(tmp_path, {**FULL, key: value}))


@pytest.mark.parametrize("text, message", [("{", "cannot read"), ("[]", "JSON object"), ("{}", "key 'path'")])
def test_files_that_are_no_configuration_are_refused(text, message, tmp_path):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConversionError, match=message):
        read_mnnquant(tmp_path / "c.json")
    with pytest.raises(ConversionError, match="cannot read"):
        read_mnnquant(tmp_path / "missing.json")
