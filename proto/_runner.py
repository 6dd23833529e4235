"""The child that loads MNN's runtime, started by ``runtime.py`` as a file: it imports nothing of this package.

Arguments: model, folder, repeats, warm-up runs. In the folder it finds ``names.json`` (input names) and ``inputs.npz``
(arrays "0", "1", ... in that order) and leaves ``result.json`` and ``outputs.npz`` in the same way.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Dict, List

import MNN
import numpy as np

_HALIDE = {np.dtype(np.float32): MNN.Halide_Type_Float, np.dtype(np.int32): MNN.Halide_Type_Int,
           np.dtype(np.uint8): MNN.Halide_Type_Uint8, np.dtype(np.int64): MNN.Halide_Type_Int64}


def main(model: str, folder: str, repeats: int, warm_up: int) -> None:
    """Run ``model`` once, then ``warm_up + repeats`` times more against the clock."""
    with open(os.path.join(folder, "names.json"), encoding="utf-8") as file:
        names = json.load(file)
    with np.load(os.path.join(folder, "inputs.npz"), allow_pickle=False) as arrays:
        inputs = {name: np.ascontiguousarray(arrays[str(index)]) for index, name in enumerate(names)}
    interpreter = MNN.Interpreter(model)
    session = interpreter.createSession({"backend": "CPU", "numThread": 1})
    inputs = _matched(inputs, list(interpreter.getSessionInputAll(session)))
    for name, array in inputs.items():
        interpreter.resizeTensor(interpreter.getSessionInput(session, name), array.shape)
    interpreter.resizeSession(session)
    _run(interpreter, session, inputs)
    outputs = {name: _read(tensor) for name, tensor in interpreter.getSessionOutputAll(session).items()}
    times = [_run(interpreter, session, inputs) for _ in range(warm_up + repeats)][warm_up:]
    np.savez(os.path.join(folder, "outputs.npz"), **{str(i): array for i, array in enumerate(outputs.values())})
    with open(os.path.join(folder, "result.json"), "w", encoding="utf-8") as file:
        json.dump({"names": list(outputs), "milliseconds": [1000 * seconds for seconds in times]}, file)


def _matched(inputs: Dict[str, Any], wanted: List[str]) -> Dict[str, Any]:
    if list(inputs) == [""] and len(wanted) == 1:
        return {wanted[0]: inputs[""]}
    if set(inputs) != set(wanted):
        sys.exit("the model's inputs are {}, given were {}".format(sorted(wanted), sorted(inputs)))
    return inputs


def _layout(tensor: Any) -> Any:
    """The model's own layout, channels first or last; never the packed one that MNN may keep inside."""
    if tensor.getDimensionType() == MNN.Tensor_DimensionType_Tensorflow:
        return MNN.Tensor_DimensionType_Tensorflow
    return MNN.Tensor_DimensionType_Caffe


def _run(interpreter: Any, session: Any, inputs: Dict[str, Any]) -> float:
    """Seconds of one inference. Inputs are written each time, because their memory is reused while it runs."""
    for name, array in inputs.items():
        tensor = interpreter.getSessionInput(session, name)
        # Bytes: where the wheel was built for another numpy it takes no arrays.
        tensor.copyFrom(MNN.Tensor(array.shape, _HALIDE[array.dtype], array.tobytes(), _layout(tensor)))
    begin = time.perf_counter()
    status = interpreter.runSession(session)
    seconds = time.perf_counter() - begin
    if status:
        sys.exit("running the model failed with MNN's error code {}".format(status))
    return seconds


def _read(tensor: Any) -> Any:
    shape = tensor.getShape()
    host = MNN.Tensor(tensor, _layout(tensor))
    tensor.copyToHostTensor(host)
    dtype = {halide: dtype for dtype, halide in _HALIDE.items()}.get(tensor.getDataType(), np.dtype(np.float32))
    return np.asarray(host.getData(), dtype=dtype).reshape(shape)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
