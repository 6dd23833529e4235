"""Data to calibrate with: a folder of images or sequences, or arrays in an .npz, as batches of a model's inputs."""
from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from slimtrain.core import ConversionError
from slimtrain.proto.arrays import load_inputs

PathLike = Union[str, "os.PathLike[str]"]
Arrays = Dict[str, np.ndarray]

DEFAULT_BATCH = 32
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff")


class ImageFormat(Enum):
    """Order of the channels that a model reads."""

    RGB = "RGB"
    BGR = "BGR"
    RGBA = "RGBA"
    BGRA = "BGRA"
    GRAY = "GRAY"

    @property
    def channels(self) -> int:
        """How many there are."""
        return 1 if self is ImageFormat.GRAY else len(self.value)


class InputType(Enum):
    """What the files of a folder hold."""

    IMAGE = "image"
    SEQUENCE = "sequence"  #: text: a line per channel, numbers separated by blanks


class ModelInput(NamedTuple):
    """An input of a model; None for sizes that are not fixed."""

    name: str
    shape: Tuple[Optional[int], ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Preprocessing:
    """From a file to what a model reads.

    Attributes:
        input_type: images or sequences.
        format: of images; None for the one that fits the channels of the model (GRAY, RGB, RGBA).
        mean, normal: ``(pixel - mean) * normal`` with pixels 0..255; one number, or one per channel.
        width, height: the size images are brought to; None for that of the model.
        crop: share of the height and width that is kept, from the middle.

    Raises:
        ValueError: a size or a crop out of range.
    """

    input_type: InputType = InputType.IMAGE
    format: Optional[ImageFormat] = None
    mean: Tuple[float, ...] = (0.0,)
    normal: Tuple[float, ...] = (1.0,)
    width: Optional[int] = None
    height: Optional[int] = None
    crop: Tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for name, size in (("width", self.width), ("height", self.height)):
            if size is not None and size < 1:
                raise ValueError("%s must be at least 1, got %r" % (name, size))
        if not all(0 < share <= 1 for share in self.crop):
            raise ValueError("crop must be two numbers in (0, 1], got %r" % (self.crop,))
        if not self.mean or not self.normal:
            raise ValueError("mean and normal need at least one number")


def read_batches(source: PathLike, inputs: Sequence[ModelInput], preprocessing: Preprocessing,
                 batch_size: int = DEFAULT_BATCH, count: int = 0) -> Iterator[Arrays]:
    """Batches of a model's inputs; only one is held in memory at a time, unless they come from an .npz.

    Args:
        source: a folder of images (or of .txt sequences), a file of arrays by input name (.npz), or one array (.npy).
        inputs: of the model. One whose first size is fixed gets batches of that size.
        preprocessing: for folders.
        batch_size: samples of a batch.
        count: the most samples to read; 0 for all.

    Raises:
        ConversionError: no such file or folder, nothing in it, or arrays that do not fit the model.
        ValueError: a batch size below 1.
    """
    if batch_size < 1 or count < 0:
        raise ValueError("batch_size must be at least 1 and count 0, got %r and %r" % (batch_size, count))
    fixed = next((value.shape[0] for value in inputs if value.shape and value.shape[0]), None)
    size = fixed or batch_size
    path = os.fspath(source)
    if os.path.isdir(path):
        return _from_folder(path, inputs, preprocessing, size, bool(fixed), count)
    return _from_arrays(path, inputs, size, bool(fixed), count)


def _from_arrays(path: str, inputs: Sequence[ModelInput], size: int, fixed: bool, count: int) -> Iterator[Arrays]:
    loaded = load_inputs(path)
    arrays: Dict[str, Any] = loaded if isinstance(loaded, dict) else {inputs[0].name: loaded}
    names = [value.name for value in inputs]
    if set(arrays) != set(names):
        raise ConversionError("%s holds %s, the model reads %s" % (path, sorted(arrays), sorted(names)))
    for value in inputs:
        arrays[value.name] = _fitting(path, value, arrays[value.name])
    total = min(len(array) for array in arrays.values())
    total = min(total, count) if count else total
    if fixed and total < size:
        raise ConversionError("%s holds %d samples, the model needs batches of %d" % (path, total, size))
    for start in range(0, total - size + 1 if fixed else total, size):
        yield {name: array[start:min(start + size, total)] for name, array in arrays.items()}


def _fitting(path: str, wanted: ModelInput, array: np.ndarray) -> np.ndarray:
    fits = len(wanted.shape) == array.ndim and array.size > 0 and all(
        expected is None or expected == got for expected, got in zip(wanted.shape[1:], array.shape[1:]))
    if not fits:
        raise ConversionError("%s: %r has shape %s, the model wants %s" % (
            path, wanted.name, array.shape, tuple("any" if size is None else size for size in wanted.shape)))
    return array.astype(wanted.dtype, copy=False)


def _from_folder(path: str, inputs: Sequence[ModelInput], preprocessing: Preprocessing, size: int, fixed: bool,
                 count: int) -> Iterator[Arrays]:
    if len(inputs) != 1:
        raise ConversionError("a folder feeds models with one input, this one reads %s: use an .npz" % (
            [value.name for value in inputs]))
    suffixes = _IMAGES if preprocessing.input_type is InputType.IMAGE else (".txt",)
    files = sorted(name for name in os.listdir(path) if name.lower().endswith(suffixes) and not name.startswith("."))
    files = files[:count] if count else files
    if not files or (fixed and len(files) < size):
        raise ConversionError("%s holds %d files of type %s, at least %d are needed" % (
            path, len(files), preprocessing.input_type.value, size if fixed else 1))
    read = _read_image if preprocessing.input_type is InputType.IMAGE else _read_sequence
    waiting: List[np.ndarray] = []
    for name in files:
        sample = read(os.path.join(path, name), inputs[0], preprocessing)
        if waiting and (sample.shape != waiting[0].shape or len(waiting) == size):
            # sequences of another length cannot share a batch
            yield {inputs[0].name: np.stack(waiting).astype(inputs[0].dtype)}
            waiting = []
        waiting.append(sample)
    if waiting and not (fixed and len(waiting) < size):
        yield {inputs[0].name: np.stack(waiting).astype(inputs[0].dtype)}


def _read_image(path: str, wanted: ModelInput, preprocessing: Preprocessing) -> np.ndarray:
    """One image as [C, H, W], or [H, W, C] for a model that reads channels last."""
    layout = _layout(wanted, preprocessing)
    pixels = _resized(_cropped(_pixels(path, layout.format), preprocessing.crop), layout.height, layout.width)
    channels = pixels.shape[2]
    for name, numbers in (("mean", preprocessing.mean), ("normal", preprocessing.normal)):
        if len(numbers) not in (1,) and len(numbers) < channels:
            raise ConversionError("%s has %d numbers for %d channels" % (name, len(numbers), channels))
    mean, normal = (np.array(numbers if len(numbers) == 1 else numbers[:channels], np.float32)
                    for numbers in (preprocessing.mean, preprocessing.normal))
    values = (pixels - mean) * normal
    return values if layout.channels_last else np.moveaxis(values, 2, 0)


class _Layout(NamedTuple):
    format: ImageFormat
    height: int
    width: int
    channels_last: bool


def _layout(wanted: ModelInput, preprocessing: Preprocessing) -> _Layout:
    if len(wanted.shape) != 4:
        raise ConversionError("images feed an input of 4 dimensions, %r has %d" % (wanted.name, len(wanted.shape)))
    counts = (1, 3, 4) if preprocessing.format is None else (preprocessing.format.channels,)
    last = wanted.shape[1] not in (*counts, None) and wanted.shape[3] in counts
    channels = wanted.shape[3 if last else 1]
    height, width = wanted.shape[1:3] if last else wanted.shape[2:]
    chosen = preprocessing.format
    if chosen is None:
        by_count = {1: ImageFormat.GRAY, 3: ImageFormat.RGB, 4: ImageFormat.RGBA}
        if channels not in by_count:
            raise ConversionError("input %r has %s channels: say which format its images have" % (
                wanted.name, channels))
        chosen = by_count[channels]
    if channels not in (None, chosen.channels):
        raise ConversionError("input %r has %s channels, images in %s have %d" % (
            wanted.name, channels, chosen.value, chosen.channels))
    sizes = [preprocessing.height or height, preprocessing.width or width]
    if None in sizes:
        raise ConversionError("input %r has no fixed size: say the width and height of its images" % wanted.name)
    for size, fixed in zip(sizes, (height, width)):
        if fixed not in (None, size):
            raise ConversionError("input %r is %s x %s, images were asked for with height %s and width %s" % (
                wanted.name, height, width, sizes[0], sizes[1]))
    return _Layout(chosen, int(sizes[0] or 0), int(sizes[1] or 0), last)


def _pixels(path: str, image_format: ImageFormat) -> np.ndarray:
    """The pixels of a file, float32 [H, W, C] of 0..255."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ConversionError("reading images needs Pillow: run python -m pip install Pillow") from error
    mode = "L" if image_format is ImageFormat.GRAY else "RGBA" if image_format.channels == 4 else "RGB"
    try:
        with Image.open(path) as image:
            values = np.asarray(image.convert(mode), dtype=np.float32)
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise ConversionError("%s: cannot read the image: %s" % (path, error)) from error
    if image_format is ImageFormat.GRAY:
        return values[:, :, None]
    return values[:, :, [2, 1, 0, 3][:image_format.channels]] if image_format.value.startswith("BGR") else values


def _cropped(pixels: np.ndarray, crop: Tuple[float, float]) -> np.ndarray:
    height, width = (max(int(round(size * share)), 1) for size, share in zip(pixels.shape[:2], crop))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top:top + height, left:left + width]


def _resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, with corners on corners, as MNN's image processing maps them."""
    rows, columns = (np.linspace(0, have - 1, want) for have, want in zip(pixels.shape[:2], (height, width)))
    if pixels.shape[:2] == (height, width):
        return pixels
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    bottom, right = np.minimum(top + 1, pixels.shape[0] - 1), np.minimum(left + 1, pixels.shape[1] - 1)
    down, across = (rows - top)[:, None, None], (columns - left)[None, :, None]
    upper = pixels[top][:, left] * (1 - across) + pixels[top][:, right] * across
    lower = pixels[bottom][:, left] * (1 - across) + pixels[bottom][:, right] * across
    return np.asarray(upper * (1 - down) + lower * down, np.float32)


def _read_sequence(path: str, wanted: ModelInput, preprocessing: Preprocessing) -> np.ndarray:
    """One sequence as [channels, length]: a line per channel."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = [[float(word) for word in line.split()] for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise ConversionError("%s: cannot read the sequence: %s" % (path, error)) from error
    if not rows or len({len(row) for row in rows}) != 1:
        raise ConversionError("%s: every line must hold as many numbers, got lines of %s" % (
            path, sorted({len(row) for row in rows}) or "no numbers"))
    values = np.array(rows, np.float32)
    return _fitting(path, wanted, values[None])[0]
