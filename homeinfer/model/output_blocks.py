"""Which models' output matrix can be used in blocks of rows, one after the other, instead of as a whole. Pure."""

from __future__ import annotations

import math

from homeinfer.model.ggml_types import TYPE_SIZES
from homeinfer.model.header import Header, TensorInfo

PAGE = 4096
"""Most machines'. In window files no two blocks share one; where pages are larger, those shared stay mapped."""
BLOCK_BYTES = 8 << 20
"""As much as several requests to a disk, and less than most models' largest tensor of a layer."""
_PLAIN = ("llama", "qwen2", "qwen3")
"""Where nothing but one product stands between the final norm (`result_norm`) and the logits."""

_MORE_TENSORS = ("output.bias", "output.scale")
_MORE_KEYS = ("logit_scale", "final_logit_softcapping")


def output_matrix(header: Header) -> TensorInfo | None:
    """What the logits are made with; where a model has none of its own, it is what tokens are looked up in."""
    return header.tensor("output.weight") or header.tensor("token_embd.weight")


def block_rows(header: Header) -> int:
    """Rows of the output matrix in one block, which is as many bytes as some pages; 0 where it is used as a whole."""
    matrix = output_matrix(header)
    if matrix is None or len(matrix.shape) != 2 or header.architecture not in _PLAIN:
        return 0
    if any(header.tensor(name) is not None for name in _MORE_TENSORS) or any(map(header.arch_get, _MORE_KEYS)):
        return 0
    weights, size = TYPE_SIZES[matrix.type]
    row_bytes = matrix.shape[0] // weights * size
    step = PAGE // math.gcd(row_bytes, PAGE)
    rows = max(BLOCK_BYTES // row_bytes // step, 1) * step
    return rows if 2 * rows < matrix.shape[1] else 0


def block_bytes(header: Header) -> int:
    """Bytes of a block; 0 where the matrix is used as a whole."""
    matrix, rows = output_matrix(header), block_rows(header)
    return matrix.nbytes // matrix.shape[1] * rows if matrix is not None else 0
