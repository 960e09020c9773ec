"""The nodes of a llama.cpp graph as native/tap.c sees them, compared with real ones before they are trusted."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any

from homeinfer import _native
from homeinfer.engine import runtime
from homeinfer.errors import HomeinferError

COMPUTED = 16
"""GGML_TENSOR_FLAG_COMPUTE (native/tensor.h): a node without it is in the graph, and no work."""
_GRAPH_BYTES = 320 << 10


@functools.cache
def product_operations() -> tuple[int, int]:
    """GGML_OP_MUL_MAT and GGML_OP_MUL_MAT_ID, from graph nodes made for it.

    Raises HomeinferError when a tensor of the loaded library looks otherwise than native/tap.c was compiled for.
    """
    ggml = typed_ggml()
    with no_memory_context(ggml, _GRAPH_BYTES) as context:
        weight = ggml.ggml_new_tensor_4d(context, 1, 7, 5, 3, 1)
        inputs = ggml.ggml_new_tensor_4d(context, 0, 7, 2, 11, 1)
        chosen = ggml.ggml_new_tensor_4d(context, 26, 2, 11, 1, 1)
        plain = ggml.ggml_new_tensor_4d(context, 0, 7, 9, 1, 1)
        ggml.ggml_set_name(weight, b"probe.weight")
        dense = ggml.ggml_mul_mat(context, plain, inputs)
        experts = ggml.ggml_mul_mat_id(context, weight, inputs, chosen)
        of_weight, of_experts, of_dense = map(_native.tensor_fields, (weight, experts, dense))
        agrees = of_weight == (1, 0, (7, 5, 3, 1), (2, 14, 70, 210), (0, 0, 0), 0, "probe.weight")
        agrees &= (of_experts[0], *of_experts[2:5]) == (0, (5, 2, 11, 1), (4, 20, 40, 440), (weight, inputs, chosen))
        agrees &= of_dense[4][:2] == (plain, inputs)
        agrees &= _is_marked(ggml, context, dense)
        names = [ggml.ggml_op_name(fields[1]) if agrees else b"" for fields in (of_dense, of_experts)]
    if names != [b"MUL_MAT", b"MUL_MAT_ID"]:
        raise HomeinferError("this llama.cpp has another ggml_tensor than homeinfer knows: reinstall homeinfer")
    return of_dense[1], of_experts[1]


def _is_marked(ggml: Any, context: Any, node: int) -> bool:
    """Whether a node is COMPUTED from when it is work of a graph."""
    before = GgmlTensor.from_address(node).flags
    ggml.ggml_build_forward_expand(ggml.ggml_new_graph(context), node)
    return bool((before, GgmlTensor.from_address(node).flags) == (0, COMPUTED))


class GgmlTensor(ctypes.Structure):
    """struct ggml_tensor (native/tensor.h, which product_operations compares with real ones)."""


GgmlTensor._fields_ = (
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(GgmlTensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
)


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _GraphPlan(ctypes.Structure):
    """struct ggml_cplan, of which only the bytes that computing needs are read; room for what may follow."""

    _fields_ = (("work_size", ctypes.c_size_t), ("rest", ctypes.c_uint8 * 248))


@contextlib.contextmanager
def no_memory_context(ggml: Any, nbytes: int) -> Iterator[Any]:
    """A ggml_context whose tensors have no data, with room for nbytes of their descriptions and work buffers. Raises
    HomeinferError when ggml makes none."""
    context = ggml.ggml_init(_InitParams(nbytes, None, True))
    if not context:
        raise HomeinferError("no memory for a graph")
    try:
        yield context
    finally:
        ggml.ggml_free(context)


@functools.cache
def typed_ggml() -> Any:
    """The functions of ggml that make and compute graphs, with their types."""
    ggml: Any = runtime.ggml()
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("ggml_init", pointer, [_InitParams]),
        ("ggml_free", None, [pointer]),
        ("ggml_new_tensor_4d", pointer, [pointer, ctypes.c_int, number, number, number, number]),
        ("ggml_set_name", pointer, [pointer, ctypes.c_char_p]),
        ("ggml_mul_mat", pointer, [pointer, pointer, pointer]),
        ("ggml_mul_mat_id", pointer, [pointer, pointer, pointer, pointer]),
        ("ggml_op_name", ctypes.c_char_p, [ctypes.c_int]),
        ("ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, number, number]),
        ("ggml_new_graph", pointer, [pointer]),
        ("ggml_build_forward_expand", None, [pointer, pointer]),
        ("ggml_graph_plan", _GraphPlan, [pointer, ctypes.c_int, pointer]),
        ("ggml_graph_compute_with_ctx", ctypes.c_int, [pointer, pointer, ctypes.c_int]),
    ):
        function = getattr(ggml, name, None)
        if function is None:
            raise HomeinferError(f"this llama.cpp has no {name}: pip install 'llama-cpp-python=={runtime.OLDEST}'")
        function.restype, function.argtypes = result, arguments
    return ggml
