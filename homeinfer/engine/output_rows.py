"""Logits from a streamed output matrix, block by block: it is the largest tensor of a window by far, and a device need
not have all of it in memory at once.

The graph ends at the final norm. Each block of rows is then multiplied by ggml in a graph of its own, with the kernels
that the whole matrix would have: a row's product does not depend on the others, so the numbers are the same.
"""

from __future__ import annotations

import ctypes
from typing import Any

import msgspec
import numpy as np

from homeinfer.engine.graph_nodes import GgmlTensor, no_memory_context, typed_ggml
from homeinfer.engine.pipeline import Floats
from homeinfer.errors import HomeinferError

NORM = "result_norm"
"""What llama.cpp calls the rows that go into the output matrix."""
_F32 = 0
_GRAPH_BYTES, _SPARE = 256 << 10, 4096


class OutputMatrix(msgspec.Struct, frozen=True):
    """A streamed output matrix in memory: n_rows rows of n_embd weights of a ggml type, row_bytes each, read and
    let go block_rows at a time."""

    address: int
    type: int
    n_embd: int
    n_rows: int
    row_bytes: int
    block_rows: int


class OutputRows:
    """Multiplies by an output matrix. on_node, user: the eval callback by which a graph waits for what it touches."""

    def __init__(self, matrix: OutputMatrix, n_threads: int, on_node: int, user: int) -> None:
        self._matrix, self._n_threads, self._user = matrix, n_threads, user
        self._on_node = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(on_node)
        self._ggml = typed_ggml()

    def logits(self, hidden: bytes) -> bytes:
        """float32 [n, n_rows] of rows float32 [n, n_embd]; of no use where the streamer then says that weights could
        not be read. Raises HomeinferError when ggml can't."""
        matrix = self._matrix
        rows = np.frombuffer(hidden, np.float32).reshape(-1, matrix.n_embd)
        found = np.empty((len(rows), matrix.n_rows), np.float32)
        for begin in range(0, matrix.n_rows if len(rows) else 0, matrix.block_rows):
            end = min(begin + matrix.block_rows, matrix.n_rows)
            block = self._block(rows, begin, end - begin)
            if block is None:
                break
            found[:, begin:end] = block
        return found.tobytes()

    def _block(self, rows: Floats, begin: int, count: int) -> Floats | None:
        ggml, matrix = self._ggml, self._matrix
        out = np.empty((len(rows), count), np.float32)
        with no_memory_context(ggml, _GRAPH_BYTES) as context:
            weight = ggml.ggml_new_tensor_2d(context, matrix.type, matrix.n_embd, count)
            inputs = ggml.ggml_new_tensor_2d(context, _F32, matrix.n_embd, len(rows))
            product = ggml.ggml_mul_mat(context, weight, inputs)
            _put(weight, matrix.address + begin * matrix.row_bytes)
            _put(inputs, rows.ctypes.data)
            _put(product, out.ctypes.data)
            graph = ggml.ggml_new_graph(context)
            ggml.ggml_build_forward_expand(graph, product)
            goes_on = self._compute(graph, product)
        return out if goes_on else None

    def _compute(self, graph: Any, product: Any) -> bool:
        """Whether there is a next one: not where the weights could not be read."""
        ggml = self._ggml
        work = ggml.ggml_graph_plan(graph, self._n_threads, None).work_size
        with no_memory_context(ggml, work + _SPARE) as context:
            self._on_node(product, True, self._user)
            status = ggml.ggml_graph_compute_with_ctx(context, graph, self._n_threads)
            goes_on = self._on_node(product, False, self._user)
        if status:
            raise HomeinferError(f"ggml can't multiply by the output matrix: status {status}")
        return bool(goes_on)


def _put(tensor: Any, address: int) -> None:
    """Let a tensor's data be there."""
    GgmlTensor.from_address(tensor).data = address
