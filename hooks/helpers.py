"""Names of layers, to be given to ``skip_quant_layers`` and the like."""
from __future__ import annotations

from typing import List, Sequence

import tensorflow.compat.v1 as tf

from slimtrain.hooks.compositions import computing_scopes, replaced_layers

#: the operations that can be quantized
LAYER_TYPES = ("Conv2D", "DepthwiseConv2dNative", "MatMul")


def get_op_name_of_type(graph: tf.Graph, types: Sequence[str] = LAYER_TYPES) -> List[str]:
    """Names of the operations of ``graph`` whose type is one of ``types``, in the order they were made."""
    wanted, replaced, computing = set(types), replaced_layers(graph), computing_scopes(graph)
    return [op.name for op in graph.get_operations()
            if op.type in wanted and op.name not in replaced and not op.name.startswith(computing)]
