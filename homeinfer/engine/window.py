"""LayerWindow: layers [first, last) of a model as a model of their own under unmodified llama.cpp."""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from homeinfer import _native
from homeinfer.engine import runtime
from homeinfer.engine.embedding import EmbeddingSource, EmbeddingTable
from homeinfer.engine.pipeline import Copy, Flags, Floats, Ints, Keep, KvEdit, Remove, Shift
from homeinfer.errors import HomeinferError
from homeinfer.model.cut_rules import OUTPUT_KEY

if TYPE_CHECKING:
    from typing_extensions import CapsuleType

_MROPE_TYPES = (8, 40)
"""LLAMA_ROPE_TYPE_MROPE and IMROPE: positions have four sections when hidden states come in."""


class WindowSpec(msgspec.Struct, frozen=True):
    """Everything a LayerWindow is made of.

    path: a window file, or the model itself when the window is all of it (then tokens go in as they are).
    first, last, n_layer: it holds layers [first, last) of n_layer; hidden states are embedding_length wide.
    embedding: where the first window takes its rows from; input_scale: what hidden states are multiplied by
    on the way in (the inverse of a scale in the graph).
    resident: weights are read into memory and repacked for the CPU; otherwise the file is mapped.
    gpu_layers: layers on a GPU where llama.cpp has one (-1: all). n_ctx: positions of one sequence.
    """

    path: str
    first: int
    last: int
    n_layer: int
    n_ctx: int
    embedding_length: int
    embedding: EmbeddingSource | None = None
    input_scale: float = 1.0
    resident: bool = True
    gpu_layers: int = 0
    n_batch: int = 512
    n_seq: int = 1
    n_threads: int = 2
    flash_attention: bool = False


class LayerWindow:
    """A loaded window. Not thread-safe; one per engine process and window."""

    def __init__(self, spec: WindowSpec, progress: Callable[[float], bool] | None = None) -> None:
        """Load the weights and make the memory. `progress` gets 0..1 and may return False to stop.

        Raises HomeinferError when llama.cpp can't load the file. llama.cpp ends the process on what it
        dislikes: this belongs into a process of its own.
        """
        self.spec = spec
        self.is_whole = (spec.first, spec.last) == (0, spec.n_layer)
        self.is_last = spec.last == spec.n_layer
        self._lib = runtime.llama()
        self._context: Any = None
        self._model: Any = self._load(progress)
        self._capture: CapsuleType | None = None
        try:
            self._context = self._make_context()
        except HomeinferError:
            self.close()
            raise
        self._memory = self._lib.llama_get_memory(self._context)
        self.n_embd = int(self._lib.llama_model_n_embd_inp(self._model))
        self.n_vocab = int(self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model)))
        self.can_shift = bool(self._lib.llama_memory_can_shift(self._memory)) and not self._is_recurrent()
        self._embedding = EmbeddingTable(spec.embedding) if spec.embedding is not None else None
        sections = int(self._lib.llama_model_rope_type(self._model)) in _MROPE_TYPES
        self.computing = 0.0
        """Seconds that the last `forward` spent inside llama_decode."""
        self._batch = _BatchBuffers(self._lib, spec.n_batch, 4 if sections else 1)

    def _is_recurrent(self) -> bool:
        return bool(self._lib.llama_model_is_recurrent(self._model) or self._lib.llama_model_is_hybrid(self._model))

    def _output_name(self) -> str:
        """What the graph calls the hidden states leaving the last layer: most architectures l_out-N, and the
        window file of the others says it."""
        said = ctypes.create_string_buffer(64)
        length = int(self._lib.llama_model_meta_val_str(self._model, OUTPUT_KEY.encode(), said, len(said)))
        return said.value.decode() if length > 0 else f"l_out-{self.spec.last - self.spec.first - 1}"

    def _load(self, progress: Callable[[float], bool] | None) -> Any:
        params = self._lib.llama_model_default_params()
        params.load_mode = self._lib.LLAMA_LOAD_MODE_NONE if self.spec.resident else self._lib.LLAMA_LOAD_MODE_MMAP
        params.use_extra_bufts = self.spec.resident
        params.n_gpu_layers = self.spec.gpu_layers
        # must outlive the call: ctypes frees the trampoline with the last reference
        callback = self._lib.llama_progress_callback(lambda share, _user: progress is None or progress(share))
        params.progress_callback = callback
        runtime.forget_log()
        model = self._lib.llama_model_load_from_file(self.spec.path.encode(), params)
        if not model:
            raise HomeinferError(f"{self.spec.path} can't be loaded: {runtime.reason('llama.cpp gives no reason')}")
        return model

    def _make_context(self) -> Any:
        spec = self.spec
        params = self._lib.llama_context_default_params()
        params.n_ctx = spec.n_ctx * spec.n_seq
        params.n_batch = params.n_ubatch = spec.n_batch
        params.n_seq_max = spec.n_seq
        # one buffer for all sequences: any range can be copied between them, and batches keep their order
        params.kv_unified = spec.n_seq > 1
        params.n_threads = params.n_threads_batch = spec.n_threads
        params.flash_attn_type = int(spec.flash_attention)
        params.no_perf = True
        if not self.is_last:
            self._capture = _native.capture_new(
                runtime.address("ggml_get_name"),
                runtime.address("ggml_nbytes"),
                runtime.address("ggml_backend_tensor_get"),
                self._output_name(),
            )
            callback, user = _native.capture_pointers(self._capture)
            params.cb_eval = self._lib.ggml_backend_sched_eval_callback(callback)
            params.cb_eval_user_data = user
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            raise HomeinferError(
                f"{spec.path}: no memory for a context of {spec.n_ctx} tokens: {runtime.reason('try a smaller --ctx')}"
            )
        return context

    def forward(self, inputs: Ints | Floats, positions: Ints, sequences: Ints, wanted: Flags) -> Floats:
        """Run tokens (int32 [n], first window) or hidden states (float32 [n, n_embd]) through the layers.

        Returns hidden states, float32 [n, n_embd], or from the last window the wanted rows' logits,
        float32 [wanted, n_vocab]. Raises HomeinferError when llama_decode fails.
        """
        n = len(positions)
        if not (len(inputs) == len(sequences) == len(wanted) == n) or not 0 < n <= self.spec.n_batch:
            raise HomeinferError(f"a batch of {n} tokens does not fit a window of {self.spec.n_batch}")
        if inputs.ndim == 1 and not self.is_whole:
            if self._embedding is None:
                raise HomeinferError("this window takes hidden states, not tokens")
            inputs = self._embedding.rows(np.asarray(inputs, np.int32))
        if inputs.ndim == 2 and self.spec.input_scale != 1.0 and self.spec.first > 0:
            inputs = inputs * np.float32(self.spec.input_scale)
        out = np.empty((int(wanted.sum()), self.n_vocab) if self.is_last else (n, self.n_embd), np.float32)
        row, self.computing = 0, 0.0
        for start, end in equal_runs(sequences):
            part = slice(start, end)
            row += self._decode(inputs[part], positions[part], sequences[part], wanted[part], out[row:])
        return out

    def _decode(self, inputs: Any, positions: Ints, sequences: Ints, wanted: Flags, out: Floats) -> int:
        """One llama_decode into the first rows of `out`; returns how many."""
        n = len(positions)
        # without all rows marked, llama.cpp drops them before the last layer's FFN
        batch = self._batch.fill(inputs, positions, sequences, wanted if self.is_last else np.ones(n, np.bool_))
        if self._capture is not None:
            _native.capture_aim(self._capture, out.ctypes.data, n * self.n_embd * 4)
        begin = time.perf_counter()
        status = self._lib.llama_decode(self._context, batch)
        self.computing += time.perf_counter() - begin
        if status:
            raise HomeinferError(_DECODE_ERRORS.get(status, f"llama_decode failed with {status}: {runtime.reason('')}"))
        if self._capture is None:
            rows = np.flatnonzero(wanted)
            for i, token in enumerate(rows):
                logits = self._lib.llama_get_logits_ith(self._context, int(token))
                ctypes.memmove(out[i].ctypes.data, logits, self.n_vocab * 4)
            return len(rows)
        written, seen = _native.capture_counts(self._capture)
        if written != n * self.n_embd * 4:
            raise HomeinferError(
                f"{self.spec.path}: the last layer's output had {seen} bytes, not {n * self.n_embd * 4}: "
                "this architecture can't run as a window"
            )
        return n

    def edit(self, edits: Sequence[KvEdit]) -> None:
        """Change the memory as llama_memory_seq_* do. Raises HomeinferError for what this memory can't."""
        for edit in edits:
            match edit:
                case Remove(sequence, start, end):
                    if not self._lib.llama_memory_seq_rm(self._memory, sequence, start, end):
                        raise HomeinferError("this model's memory can't forget a part of a sequence")
                case Keep(sequence):
                    self._lib.llama_memory_seq_keep(self._memory, sequence)
                case Copy(sequence, target, start, end):
                    self._lib.llama_memory_seq_cp(self._memory, sequence, target, start, end)
                case Shift(sequence, start, end, delta):
                    if not self.can_shift:
                        raise HomeinferError("this model's memory can't be shifted")
                    self._lib.llama_memory_seq_add(self._memory, sequence, start, end, delta)

    def close(self) -> None:
        """Free the memory and the weights. Safe to call twice."""
        if self._context is not None:
            self._lib.llama_free(self._context)
        if self._model is not None:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None


_DECODE_ERRORS = {
    1: "the context is full: start with a larger --ctx, or with a shorter text",
    2: "the computation was stopped",
}


def equal_runs(sequences: Ints) -> list[tuple[int, int]]:
    """Cut a batch so that llama.cpp keeps each part's order: parts in which every sequence is one run
    and all runs are equally long (llama_batch_allocr::split_equal reorders others)."""
    n = len(sequences)
    edges = [0, *(np.flatnonzero(np.diff(sequences)) + 1).tolist(), n]
    parts: list[tuple[int, int]] = []
    length, seen = 0, set[int]()
    for start, end in itertools.pairwise(edges):
        sequence = int(sequences[start])
        if parts and end - start == length and sequence not in seen:
            parts[-1] = (parts[-1][0], end)
            seen.add(sequence)
        else:
            parts.append((start, end))
            length, seen = end - start, {sequence}
    return parts


class _BatchBuffers:
    """One llama_batch, allocated once, filled again for each decode."""

    def __init__(self, lib: Any, capacity: int, sections: int) -> None:
        self._sections = sections
        self._tokens = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity * sections, np.int32)
        self._counts = np.ones(capacity, np.int32)
        self._sequences = np.zeros(capacity, np.int32)
        self._wanted = np.zeros(capacity, np.int8)
        pointer = ctypes.POINTER(ctypes.c_int32)
        base = self._sequences.ctypes.data
        self._rows = (pointer * (capacity + 1))(
            *(ctypes.cast(ctypes.c_void_p(base + 4 * i), pointer) for i in range(capacity))
        )
        self._batch = lib.llama_batch()
        self._batch.pos = self._positions.ctypes.data_as(pointer)
        self._batch.n_seq_id = self._counts.ctypes.data_as(pointer)
        self._batch.seq_id = ctypes.cast(self._rows, type(self._batch.seq_id))
        self._batch.logits = self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        self._token_pointer = self._tokens.ctypes.data_as(pointer)
        self._hidden: Floats | None = None

    def fill(self, inputs: Any, positions: Ints, sequences: Ints, wanted: Flags) -> Any:
        n = len(positions)
        self._batch.n_tokens = n
        self._sequences[:n] = sequences
        self._wanted[:n] = wanted
        if inputs.ndim == 1:
            self._tokens[:n] = inputs
            self._positions[:n] = positions
            self._batch.token, self._batch.embd = self._token_pointer, None
            return self._batch
        self._hidden = np.ascontiguousarray(inputs, np.float32)
        # llama.cpp's M-RoPE of text: time, height and width are the position, the fourth section is 0
        for section in range(self._sections):
            self._positions[section * n : (section + 1) * n] = positions if section < 3 else 0
        self._batch.token = None
        self._batch.embd = self._hidden.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        return self._batch
