"""Reading and editing an ONNX graph by tensor name."""
from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import onnx
from onnx import numpy_helper


class OnnxGraph:
    """An ONNX graph with its producers, consumers and constants at hand.

    ``nodes`` is a list of its own: what a protobuf list hands out does not survive changes of the list.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._counter = 0
        self.nodes: List[onnx.NodeProto] = list(onnx.ModelProto.FromString(model.SerializeToString()).graph.node)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self.refresh()

    def refresh(self) -> None:
        """Index the nodes anew, after an edit."""
        self.producer: Dict[str, onnx.NodeProto] = {name: node for node in self.nodes for name in node.output}
        self.consumers: Dict[str, List[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def model(self) -> onnx.ModelProto:
        """The edited model, without constants that nothing reads."""
        used = {name for node in self.nodes for name in node.input} | self.outputs
        result = onnx.ModelProto()
        result.CopyFrom(self._model)
        del result.graph.node[:]
        del result.graph.initializer[:]
        del result.graph.value_info[:]
        result.graph.node.extend(self.nodes)
        result.graph.initializer.extend(tensor for name, tensor in self.initializers.items() if name in used)
        return result

    @property
    def opset(self) -> int:
        """Version of the standard operator set."""
        return max(entry.version for entry in self._model.opset_import if entry.domain in ("", "ai.onnx"))

    def constant(self, name: str) -> Optional[np.ndarray]:
        """The value of a constant tensor, seen through Identity and Transpose; None for anything computed."""
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        node = self.producer.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            value = attribute(node, "value")
            return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else None
        if node.op_type in ("Identity", "Transpose"):
            source = self.constant(node.input[0])
            if source is None or node.op_type == "Identity":
                return source
            return np.transpose(source, attribute(node, "perm"))
        return None

    def only_consumer(self, name: str) -> Optional[onnx.NodeProto]:
        """The node that alone reads a tensor, if there is one and the tensor is no output of the graph."""
        readers = self.consumers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def add_constant(self, value: np.ndarray, hint: str) -> str:
        """Store a constant under a new name."""
        name = self.new_name(hint)
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def new_name(self, hint: str) -> str:
        """A tensor name that the graph does not use."""
        while True:
            name = hint if not self._counter else "%s_%d" % (hint, self._counter)
            if name not in self.producer and name not in self.consumers and name not in self.initializers:
                return name
            self._counter += 1

    def replace(self, old: Sequence[onnx.NodeProto], new: Sequence[onnx.NodeProto]) -> None:
        """Put ``new`` where the last of ``old`` stood."""
        last = max(index for index, node in enumerate(self.nodes) if any(node is gone for gone in old))
        kept = [node for node in self.nodes[:last + 1] if not any(node is gone for gone in old)]
        self.nodes = kept + list(new) + self.nodes[last + 1:]
        self.refresh()

    def insert_behind(self, name: str, nodes: Sequence[onnx.NodeProto], output: str) -> None:
        """Put nodes behind a tensor: all that read ``name`` read ``output``; an output of the graph keeps its name."""
        for node in self.consumers.get(name, []):
            for index, read in enumerate(node.input):
                if read == name:
                    node.input[index] = output
        position = next((index + 1 for index, node in enumerate(self.nodes) if name in node.output), 0)
        self.nodes[position:position] = nodes
        self.refresh()
        if name in self.outputs:
            inner = self.new_name(name + "/inner")
            for node in self.nodes:
                node.input[:] = [inner if read == name else name if read == output else read for read in node.input]
                node.output[:] = [inner if made == name else name if made == output else made for made in node.output]
            self.refresh()

    def shapes(self) -> Dict[str, List[Optional[int]]]:
        """Inferred shapes, None for dimensions that are not fixed."""
        inferred = onnx.shape_inference.infer_shapes(self.model())
        values = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
        return {value.name: [dim.dim_value if dim.HasField("dim_value") else None
                             for dim in value.type.tensor_type.shape.dim] for value in values}


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default
