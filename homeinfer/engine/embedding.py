"""Embedding rows, looked up outside the graph (native/runner.c).

llama.cpp would look them up in the first window too, but then that window needs the whole vocabulary, and
llama_decode copies n_tokens x n_vocab logits that nobody computed: 0.5 GB for 512 tokens of Gemma.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from homeinfer.errors import HomeinferError
from homeinfer.model.header import TYPE_SIZES, Header

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class EmbeddingSource(msgspec.Struct, frozen=True):
    """Where a model's embedding rows are: bytes at `offset` of a file, `n_rows` rows of `n_embd` weights.

    `scale`: what the graph multiplies tokens' rows by, but not hidden states (gemma3).
    """

    path: str
    offset: int
    type: str
    n_embd: int
    n_rows: int
    scale: float = 1.0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        weights, size = TYPE_SIZES[self.type]
        return self.n_embd // weights * size


def embedding_source(header: Header) -> EmbeddingSource:
    """The embedding matrix of a model. Raises HomeinferError for a model without."""
    import numpy as np

    from homeinfer.model.architectures import rule_for

    tensor = header.tensor("token_embd.weight")
    if tensor is None or len(tensor.shape) != 2:
        raise HomeinferError("the model has no token_embd.weight matrix")
    n_embd, n_rows = tensor.shape
    scale = float(np.sqrt(np.float32(n_embd))) if rule_for(header).embedding_scale == "tokens" else 1.0
    return EmbeddingSource(header.files[tensor.file].path, tensor.offset, tensor.type, n_embd, n_rows, scale)


def map_rows(source: EmbeddingSource) -> npt.NDArray[np.uint8]:
    """The matrix, mapped: uint8 [n_rows, row_bytes], of which only the rows that are used are ever read.
    Raises HomeinferError when it is not inside the file."""
    import numpy as np

    try:
        return np.memmap(source.path, np.uint8, "r", source.offset, (source.n_rows, source.row_bytes))
    except (OSError, ValueError) as problem:
        raise HomeinferError(f"{source.path}: the embedding can't be read: {problem}") from problem
