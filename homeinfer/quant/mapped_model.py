"""A model that llama.cpp runs from its mapped file, for work on its weights rather than for answers."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from homeinfer.engine import runtime
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, printable

Ints = npt.NDArray[np.int32]


class MappedModel:
    """A model and a context, freed when the `with` block ends. set_params changes llama_context_params before.

    Raises HomeinferError where llama.cpp can't load it or the model does not continue text.
    """

    def __init__(self, header: Header, n_threads: int, set_params: Callable[[Any], None]) -> None:
        self._lib = runtime.llama()
        self._path = printable(header.files[0].path, 1000)
        self._context: Any = None
        params = self._lib.llama_model_default_params()
        params.load_mode = self._lib.LLAMA_LOAD_MODE_MMAP
        params.use_extra_bufts = False  # a repacked copy of the weights would be as large as the model
        params.n_gpu_layers = 0
        runtime.forget_log()
        self._model: Any = self._lib.llama_model_load_from_file(os.fsencode(header.files[0].path), params)
        if not self._model:
            raise HomeinferError(f"{self._path} can't be loaded: {runtime.reason('llama.cpp gives no reason')}")
        try:
            self._open(n_threads, set_params)
        except HomeinferError:
            self._close()
            raise

    def _open(self, n_threads: int, set_params: Callable[[Any], None]) -> None:
        lib = self._lib
        if lib.llama_model_has_encoder(self._model) or not lib.llama_model_has_decoder(self._model):
            raise HomeinferError(f"{self._path}: this model does not continue text, and only those that do work here")
        params = lib.llama_context_default_params()
        params.n_threads = params.n_threads_batch = n_threads
        params.no_perf = True
        set_params(params)
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            why = runtime.reason("take fewer tokens at a time")
            raise HomeinferError(f"{self._path}: no memory for a context of {params.n_ctx} tokens: {why}")

    def forget(self) -> None:
        """Start the sequence anew."""
        memory = self._lib.llama_get_memory(self._context)
        if memory:
            self._lib.llama_memory_clear(memory, True)

    def decode(self, tokens: Ints) -> int:
        """llama_decode's status for the next tokens, int32 [n], of the one sequence there is.

        Every row is an output: the last layer would drop the others.
        """
        wanted = np.ones(len(tokens), np.int8)
        batch = self._lib.llama_batch(
            n_tokens=len(tokens),
            token=tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            logits=wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        return int(self._lib.llama_decode(self._context, batch))

    def _close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def __enter__(self) -> MappedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
