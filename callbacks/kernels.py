"""Compiling a function of tensors into one kernel that is called without ceremony.

``torch.compile`` checks on every call which of its kernels fits the arguments, which costs more than a kernel on a
small tensor takes. A function that does the same for every size needs no such check: it is traced once with symbolic
sizes, and TorchInductor's kernel for them is what is called.
"""
from __future__ import annotations

from typing import Any, Callable, Sequence

import torch
from torch import Tensor


def compile_kernel(function: Callable[..., Any], examples: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile a function that branches on no size and no value.

    Args:
        function: takes tensors without gradients and returns a tuple of tensors.
        examples: arguments like those of every call: the same dtypes, devices and dimensions, contiguous. A dimension
            of size 1 stays of size 1, any other may have any size; sizes that are equal stay equal, and so does a
            tensor that is given twice.

    Returns:
        the compiled function. Its results are new tensors.

    Raises:
        Exception: of many types, where this machine has no compiler that works.
    """
    # torch would trace the function modes that are active into the kernel
    modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    try:
        from torch._inductor.compile_fx import compile_fx_inner  # takes seconds, which only large models shall pay
        from torch._inductor.decomposition import select_decomp_table
        from torch.fx.experimental.proxy_tensor import make_fx

        with torch.no_grad(), torch.autocast(examples[0].device.type, enabled=False):
            # a lambda, because torch cannot keep a kernel on disk whose trace has annotations that are strings
            graph = make_fx(lambda *tensors: function(*tensors), select_decomp_table(), "symbolic")(*examples)
            symbolic = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
            kernel = compile_fx_inner(graph, symbolic)
            kernel(list(examples))  # a part of the machine's problems shows only here
            # what it calls, without asking each time whether somebody records what it calls
            call = getattr(kernel, "current_callable", None) or kernel
            return lambda *tensors: call(list(tensors))
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)
