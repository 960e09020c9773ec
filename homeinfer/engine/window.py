"""LayerWindow: layers [first, last) of a model as a model of their own under unmodified llama.cpp."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from homeinfer import _native
from homeinfer.engine import runtime
from homeinfer.engine.edits import Copy, Keep, KvEdit, Remove, Shift
from homeinfer.engine.embedding import map_rows
from homeinfer.engine.gpus import one_gpu
from homeinfer.engine.huge_pages import ask_for_huge_pages, blocks_now
from homeinfer.engine.output_rows import NORM, OutputRows
from homeinfer.engine.pipeline import Flags, Floats, Ints
from homeinfer.engine.streaming import Streamer
from homeinfer.engine.window_spec import WindowSpec
from homeinfer.errors import HomeinferError
from homeinfer.model.cut_rules import OUTPUT_KEY
from homeinfer.model.ggml_types import TYPE_NUMBERS

if TYPE_CHECKING:
    from typing_extensions import CapsuleType

_NO_NODE = "no node"
"""A name that llama.cpp gives none: nothing is captured."""

_MROPE_TYPES = (8, 40)
"""LLAMA_ROPE_TYPE_MROPE and IMROPE: positions have four sections when hidden states come in."""


class LayerWindow:
    """A loaded window. Not thread-safe; one per engine process and window."""

    def __init__(
        self,
        spec: WindowSpec,
        progress: Callable[[float], bool] | None = None,
        streamer: Streamer | None = None,
    ) -> None:
        """Load the weights and make the memory. `progress` gets 0..1 and may return False to stop. With a `streamer`,
        a window that is not resident is streamed, after those made before it; call the streamer's `start` then.

        Raises HomeinferError when llama.cpp can't load the file. llama.cpp ends the process on what it
        dislikes: this belongs into a process of its own.
        """
        self.spec = spec
        self.is_whole = (spec.first, spec.last) == (0, spec.n_layer)
        self.is_last = spec.last == spec.n_layer
        self._lib = runtime.llama()
        self._context: Any = None
        self._streamer = None if spec.resident or spec.gpu_layers else streamer
        self._model: Any = self._load(progress)
        self._capture: CapsuleType | None = None
        self._output: OutputRows | None = None
        self._runner: CapsuleType | None = None
        try:
            self._context = self._make_context()
        except HomeinferError:
            self.close()
            raise
        self._memory = self._lib.llama_get_memory(self._context)
        self.n_embd = int(self._lib.llama_model_n_embd_inp(self._model))
        self.n_vocab = int(self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model)))
        can_shift = bool(self._lib.llama_memory_can_shift(self._memory))
        self.can_shift = can_shift and spec.can_shift and not self._is_recurrent()
        self.computing = 0.0
        """Seconds that the last `forward` spent computing."""
        self._runner = self._make_runner()

    def _is_recurrent(self) -> bool:
        return bool(self._lib.llama_model_is_recurrent(self._model) or self._lib.llama_model_is_hybrid(self._model))

    def _output_name(self) -> str:
        """What the graph calls the hidden states leaving the last layer: most architectures l_out-N, and the
        window file of the others says it."""
        said = ctypes.create_string_buffer(64)
        length = int(self._lib.llama_model_meta_val_str(self._model, OUTPUT_KEY.encode(), said, len(said)))
        return said.value.decode() if length > 0 else f"l_out-{self.spec.last - self.spec.first - 1}"

    def _norm(self) -> str:
        """Where the graph of the last window ends: before an output matrix that is used in blocks."""
        return NORM if self._streamer is not None and self._streamer.output is not None else _NO_NODE

    def _load(self, progress: Callable[[float], bool] | None) -> Any:
        params = self._lib.llama_model_default_params()
        params.load_mode = self._lib.LLAMA_LOAD_MODE_NONE if self.spec.resident else self._lib.LLAMA_LOAD_MODE_MMAP
        params.use_extra_bufts = self.spec.resident
        params.n_gpu_layers = self.spec.gpu_layers
        if self.spec.gpu_layers and self.spec.gpu is not None:
            only = one_gpu(self.spec.gpu)  # must outlive the call
            params.devices, params.main_gpu = ctypes.cast(only, ctypes.c_void_p), 0
            params.split_mode = self._lib.LLAMA_SPLIT_MODE_NONE
        # must outlive the call: ctypes frees the trampoline with the last reference
        callback = self._lib.llama_progress_callback(_with_huge_pages(progress))
        params.progress_callback = callback
        runtime.forget_log()

        def load(path: str) -> Any:
            return self._lib.llama_model_load_from_file(path.encode(), params)

        if self._streamer is None:
            model = load(self.spec.path)
        else:
            model = self._streamer.load(self.spec.path, self.is_whole, self.is_last, load)
        if not model:
            raise HomeinferError(f"{self.spec.path} can't be loaded: {runtime.reason('llama.cpp gives no reason')}")
        return model

    def _make_context(self) -> Any:
        spec = self.spec
        params = self._lib.llama_context_default_params()
        params.n_ctx = spec.n_ctx * spec.n_seq
        params.n_batch = params.n_ubatch = spec.n_batch
        params.n_seq_max = spec.n_seq
        # each sequence has a buffer of its own, so that its numbers do not depend on what else is in memory
        params.kv_unified = False
        params.n_threads = params.n_threads_batch = spec.n_threads
        params.flash_attn_type = int(spec.flash_attention)
        params.no_perf = True
        # a GPU would be given weights before anybody has waited for them to be read
        params.op_offload = self._streamer is None
        if not self.is_last or self._streamer is not None:
            self._capture = _native.capture_new(
                runtime.address("ggml_get_name"),
                runtime.address("ggml_nbytes"),
                runtime.address("ggml_backend_tensor_get"),
                self._output_name() if not self.is_last else self._norm(),
            )
            if self._streamer is not None:
                self._streamer.attach(self._capture)
            callback, user = _native.capture_pointers(self._capture)
            params.cb_eval = self._lib.ggml_backend_sched_eval_callback(callback)
            params.cb_eval_user_data = user
            if self._streamer is not None and self._streamer.output is not None and self.is_last:
                self._output = OutputRows(self._streamer.output, spec.n_threads, callback, user)
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            raise HomeinferError(
                f"{spec.path}: no memory for a context of {spec.n_ctx} tokens: {runtime.reason('try a smaller --ctx')}"
            )
        return context

    def _make_runner(self) -> CapsuleType:
        spec, lib = self.spec, self._lib
        check_batch_layout()
        source = spec.embedding
        sections = int(lib.llama_model_rope_type(self._model)) in _MROPE_TYPES
        return _native.runner_new(
            decode=runtime.llama_address("llama_decode"),
            logits_ith=runtime.llama_address("llama_get_logits_ith"),
            context=ctypes.cast(self._context, ctypes.c_void_p).value or 0,
            capture=None if self.is_last and self._output is None else self._capture,
            capacity=spec.n_batch,
            n_embd=self.n_embd,
            n_vocab=self.n_vocab,
            n_seq=spec.n_seq,
            n_ctx=spec.n_ctx,
            sections=4 if sections and not self.is_whole else 1,
            scale=source.scale if source is not None else spec.input_scale,
            takes_tokens=self.is_whole,
            embedding=None if source is None else map_rows(source),
            n_rows=0 if source is None else source.n_rows,
            row_bytes=0 if source is None else source.row_bytes,
            to_float=0 if source is None else runtime.to_float_address(TYPE_NUMBERS[source.type]),
            only_wanted=self.is_last,
        )

    @property
    def takes_tokens(self) -> bool:
        """Whether tokens go in (the first window), rather than hidden states."""
        return self.spec.first == 0

    @property
    def width(self) -> int:
        """Numbers in a row that comes out: n_vocab from the last window, else n_embd."""
        return self.n_vocab if self.is_last else self.n_embd

    def forward(self, inputs: Ints | Floats, positions: Ints, sequences: Ints, wanted: Flags) -> Floats:
        """Run tokens (int32 [n], first window) or hidden states (float32 [n, n_embd]) through the layers.

        Tokens of one sequence, or one token each of neighbouring sequences in their order: llama.cpp would take others
        apart (llama_batch_allocr::split_equal). Returns hidden states, float32 [n, n_embd], or from the last window the
        wanted rows' logits, float32 [wanted, n_vocab]. Raises HomeinferError for what does not fit, and when
        llama_decode fails.
        """
        kind = np.int32 if inputs.ndim == 1 else np.float32
        index = b"".join(
            np.ascontiguousarray(part, dtype).tobytes()
            for part, dtype in ((positions, np.int32), (sequences, np.int32), (wanted, np.bool_))
        )
        out = self.forward_bytes(len(positions), index, np.ascontiguousarray(inputs, kind))
        return np.frombuffer(out, np.float32).reshape(-1, self.width)

    def forward_bytes(self, n: int, index: bytes, rows: Any) -> bytes:
        """`forward` on memory: index is positions and sequences (int32 [n] each), then wanted (uint8 [n]).

        Every number is checked before llama.cpp sees it. Raises HomeinferError.
        """
        if self._runner is None:
            raise HomeinferError("the window is closed")
        try:
            if self.spec.n_seq > 1:
                check_sequences(n, index)
            status, out, microseconds = _native.runner_forward(self._runner, n, index, rows)
            if self._output is not None and not status:
                begin = time.perf_counter()
                out = self._output.logits(out)
                microseconds += (time.perf_counter() - begin) * 1e6
        except ValueError as problem:
            raise HomeinferError(f"layers {self.spec.first} to {self.spec.last - 1}: {problem}") from problem
        finally:
            self._after_graph()
        if status:
            raise HomeinferError(_DECODE_ERRORS.get(status, f"llama_decode failed with {status}: {runtime.reason('')}"))
        self.computing = microseconds * 1e-6
        return out

    def _after_graph(self) -> None:
        if self._streamer is not None:
            self._streamer.after_graph()

    def edit(self, edits: Sequence[KvEdit]) -> None:
        """Change the memory as llama_memory_seq_* do. Raises HomeinferError for what this memory can't, and, before
        anything changes, for numbers that llama.cpp would abort on."""
        for edit in edits:
            check_edit(edit, self.spec.n_seq, self.spec.n_ctx)
        for edit in edits:
            match edit:
                case Remove(sequence, start, end):
                    if not self._lib.llama_memory_seq_rm(self._memory, sequence, start, end):
                        raise HomeinferError("this model's memory can't forget a part of a sequence")
                case Keep(sequence):
                    for other in set(range(self.spec.n_seq)) - {sequence}:  # llama_memory_seq_keep leaves their buffers
                        self._lib.llama_memory_seq_rm(self._memory, other, 0, -1)
                case Copy(sequence, target, start, end):
                    self._lib.llama_memory_seq_cp(self._memory, sequence, target, start, end)
                case Shift(sequence, start, end, delta):
                    if not self.can_shift:
                        raise HomeinferError("this model's memory can't be shifted")
                    self._lib.llama_memory_seq_add(self._memory, sequence, start, end, delta)

    def close(self) -> None:
        """Free the memory and the weights. Safe to call twice. It ends the streaming of all windows."""
        if self._streamer is not None:
            self._streamer.close()  # its threads write into the weights
        self._runner = None  # it points into the context
        if self._context is not None:
            self._lib.llama_free(self._context)
        if self._model is not None:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None


_DECODE_ERRORS = {
    1: "the context is full: start with a larger --ctx, or with a shorter text",
    2: "the computation was stopped",
}


def _with_huge_pages(progress: Callable[[float], bool] | None) -> Callable[[float, object], bool]:
    """llama.cpp's progress callback. It is first called when the buffers are made and not filled: the moment to ask for
    huge pages. What is there already is no weights: other windows' buffers of which a step touches little."""
    is_first, before = True, blocks_now()

    def heard(share: float, _user: object) -> bool:
        nonlocal is_first
        if is_first:
            is_first = False
            ask_for_huge_pages(before)
        return progress is None or progress(share)

    return heard


def check_edit(edit: KvEdit, n_seq: int, n_ctx: int) -> None:
    """Raises HomeinferError for sequences that there are not, and positions outside the context."""
    named = (edit.sequence, edit.target) if isinstance(edit, Copy) else (edit.sequence,)
    if not all(0 <= sequence < n_seq for sequence in named):
        raise HomeinferError(f"a change of sequence {max(named, key=abs)}, where there are {n_seq}")
    if isinstance(edit, Copy) and (edit.start, edit.end) != (0, -1):
        raise HomeinferError("only a whole sequence can be copied to another one")
    positions = () if isinstance(edit, Keep) else (edit.start, edit.end)
    delta = edit.delta if isinstance(edit, Shift) else 0
    if not all(-1 <= position <= n_ctx for position in positions) or abs(delta) > n_ctx:
        raise HomeinferError(f"a change of positions outside the context of {n_ctx}")


def check_sequences(n: int, index: bytes) -> None:
    """Raises ValueError unless a batch has tokens of one sequence, or one each of neighbouring ones in order.
    index: as forward_bytes takes it; one that is too short is the runner's to refuse."""
    if len(index) < 8 * n:
        return
    steps = np.diff(np.frombuffer(index, np.int32, n, 4 * n))
    if steps.any() and not (steps == 1).all():
        raise ValueError("a batch of several sequences must have one token each of neighbouring ones, in order")


def check_batch_layout() -> None:
    """Raises HomeinferError unless native/runner.c and llama-cpp-python agree on struct llama_batch."""
    batch = runtime.llama().llama_batch
    fields = ("n_tokens", "token", "embd", "pos", "n_seq_id", "seq_id", "logits")
    known = (*(getattr(batch, name).offset for name in fields), ctypes.sizeof(batch))
    if known != _native.batch_layout():
        raise HomeinferError("this llama.cpp has another llama_batch than homeinfer knows: reinstall homeinfer")
