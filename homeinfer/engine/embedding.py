"""Embedding rows, looked up outside the graph.

llama.cpp would look them up in the first window too, but then that window needs the whole vocabulary, and
llama_decode copies n_tokens x n_vocab logits that nobody computed: 0.5 GB for 512 tokens of Gemma.
"""

from __future__ import annotations

import ctypes

import msgspec
import numpy as np

from homeinfer.engine import runtime
from homeinfer.engine.pipeline import Floats, Ints
from homeinfer.errors import HomeinferError
from homeinfer.model.architectures import rule_for
from homeinfer.model.ggml_types import TYPE_NUMBERS, TYPE_SIZES
from homeinfer.model.header import Header


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


def embedding_source(header: Header) -> EmbeddingSource:
    """The embedding matrix of a model. Raises HomeinferError for a model without."""
    tensor = header.tensor("token_embd.weight")
    if tensor is None or len(tensor.shape) != 2:
        raise HomeinferError("the model has no token_embd.weight matrix")
    n_embd, n_rows = tensor.shape
    scale = float(np.sqrt(np.float32(n_embd))) if rule_for(header).embedding_scale == "tokens" else 1.0
    return EmbeddingSource(header.files[tensor.file].path, tensor.offset, tensor.type, n_embd, n_rows, scale)


class EmbeddingTable:
    """Rows of the embedding matrix as ggml's own dequantizer gives them (ggml_get_rows), read from a mapping."""

    def __init__(self, source: EmbeddingSource) -> None:
        """Map the file. Raises HomeinferError when the matrix is not inside it."""
        weights, size = TYPE_SIZES[source.type]
        self._source = source
        self._row_bytes = source.n_embd // weights * size
        try:
            self._rows = np.memmap(source.path, np.uint8, "r", source.offset, (source.n_rows, self._row_bytes))
        except (OSError, ValueError) as problem:
            raise HomeinferError(f"{source.path}: the embedding can't be read: {problem}") from problem
        self._to_float = runtime.to_float(TYPE_NUMBERS[source.type])

    def rows(self, tokens: Ints) -> Floats:
        """Hidden states entering layer 0: float32 [n, n_embd] for int32 [n]. Raises HomeinferError for
        a token outside the vocabulary."""
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._source.n_rows:
            raise HomeinferError(f"a token is outside the vocabulary of {self._source.n_rows}")
        out = np.empty((len(tokens), self._source.n_embd), np.float32)
        for i, token in enumerate(tokens):
            row = self._rows[token]
            if self._to_float is None:
                out[i] = row.view(np.float32)
            else:
                self._to_float(
                    ctypes.c_void_p(row.ctypes.data), ctypes.c_void_p(out[i].ctypes.data), self._source.n_embd
                )
        if self._source.scale != 1.0:
            out *= np.float32(self._source.scale)
        return out
