"""The child that loads MNN's runtime; ``runtime.py`` starts it as a file, it imports nothing of this package.

Arguments: model, folder, repeats, warm-up runs. In the folder it finds ``names.json`` (input names) and
``inputs.npz`` (arrays "0", "1", ... in that order) and leaves ``result.json`` and ``outputs.npz`` alike.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Dict, Iterable, List

import MNN
import numpy as np

_HALIDE_TYPES = {
    "float32": MNN.Halide_Type_Float,
    "int32": MNN.Halide_Type_Int,
    "uint8": MNN.Halide_Type_Uint8,
    "int64": MNN.Halide_Type_Int64,
}
# The session is sized once, for the inputs that come: sized again it crashes where two float operations read a tensor
# of integers (MNN 3.6). The wheel has no name for the number.
_RESIZE_DEFER = 7


def main(model: str, folder: str, repeats: int, warm_up: int) -> None:
    """Run ``model`` once for its outputs, then ``warm_up + repeats`` times against the clock."""
    with open(os.path.join(folder, "names.json"), encoding="utf-8") as file:
        names = json.load(file)
    with np.load(os.path.join(folder, "inputs.npz"), allow_pickle=False) as arrays:
        inputs = {name: arrays[str(index)] for index, name in enumerate(names)}
    try:
        interpreter = MNN.Interpreter(model)
    except Exception as error:  # it has no class of its own
        sys.exit("MNN cannot read the model: %s" % error)
    interpreter.setSessionMode(_RESIZE_DEFER)
    session = interpreter.createSession({"backend": "CPU", "numThread": 1})
    tensors = interpreter.getSessionInputAll(session)
    layout = _layout(tensors.values())
    inputs = _matched(inputs, list(tensors))
    for name, array in inputs.items():
        interpreter.resizeTensor(tensors[name], array.shape)
    interpreter.resizeSession(session)
    _run(interpreter, session, inputs, layout)
    outputs = {
        name: _read(tensor, layout) for name, tensor in interpreter.getSessionOutputAll(session).items()
    }
    seconds = [_run(interpreter, session, inputs, layout) for _ in range(warm_up + repeats)][warm_up:]
    numbered = {str(index): array for index, array in enumerate(outputs.values())}
    np.savez(os.path.join(folder, "outputs.npz"), **numbered)
    with open(os.path.join(folder, "result.json"), "w", encoding="utf-8") as file:
        json.dump({"names": list(outputs), "milliseconds": [1000 * value for value in seconds]}, file)


def _matched(inputs: Dict[str, Any], wanted: List[str]) -> Dict[str, Any]:
    if list(inputs) == [""] and len(wanted) == 1:
        return {wanted[0]: inputs[""]}
    if set(inputs) != set(wanted):
        sys.exit(f"the model's inputs are {sorted(wanted)}, given were {sorted(inputs)}")
    return inputs


def _layout(inputs: Iterable[Any]) -> Any:
    """Channels first or last, as the model was before conversion.

    The outputs do not tell: a convolution at the end of a channels-last model leaves its own layout behind.
    """
    last = MNN.Tensor_DimensionType_Tensorflow
    is_last = all(tensor.getDimensionType() == last for tensor in inputs)
    return last if is_last else MNN.Tensor_DimensionType_Caffe


def _run(interpreter: Any, session: Any, inputs: Dict[str, Any], layout: Any) -> float:
    """Seconds of one inference. Inputs are written each time: a run may reuse their memory."""
    for name, array in inputs.items():
        # As bytes: a wheel built for another numpy takes no arrays.
        host = MNN.Tensor(array.shape, _HALIDE_TYPES[array.dtype.name], array.tobytes(), layout)
        interpreter.getSessionInput(session, name).copyFrom(host)
    begin = time.perf_counter()
    status = interpreter.runSession(session)
    seconds = time.perf_counter() - begin
    if status:
        sys.exit(f"running the model failed with MNN's error code {status}")
    return seconds


def _read(tensor: Any, layout: Any) -> Any:
    names = [name for name, kind in _HALIDE_TYPES.items() if kind == tensor.getDataType()]
    if not names:
        sys.exit("an output is neither float32, int32, int64 nor uint8")
    host = MNN.Tensor(tensor, layout)
    tensor.copyToHostTensor(host)
    return np.array(host.getData(), dtype=names[0]).reshape(host.getShape())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
