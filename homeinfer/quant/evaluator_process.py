"""The process in which llama.cpp runs the models of an evaluation; it ends its process on what it dislikes.

Started as `python -m homeinfer.quant.evaluator_process`. One Request comes in on stdin, one JSON line; out go
Messages on stdout, one JSON line each: Opening before each model, Opened, a Scored per batch of tokens, and
Finished, or Failed at any point. Logits never leave the process but into the file that keeps them. When stdin
ends, the parent is gone: the process removes that file and ends.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from homeinfer.engine import runtime
from homeinfer.errors import HomeinferError
from homeinfer.model.records import printable
from homeinfer.quant.kld import Floats, Ints, NotFiniteError, Records, Scores, compare, pack
from homeinfer.quant.logits_file import LogitsFile, LogitsWriter, Tokens, made_for, matching_chunks
from homeinfer.quant.to_parent import open_to_parent

_BATCH = 512
"""Tokens of a llama_decode, and so a bound for the memory that logits take."""


class Request(msgspec.Struct, frozen=True):
    """What to compute. Paths are the file system's bytes, text is UTF-8.

    A model is compared with a reference, which is a model as well or kept logits; or, without a model, the
    reference's logits are written to `keep`.
    """

    model: bytes | None
    reference: bytes
    reference_is_kept: bool
    keep: bytes | None
    text: bytes
    n_ctx: int
    chunks: int | None
    threads: int


class Opening(msgspec.Struct, frozen=True, tag="opening"):
    """llama.cpp is at work on the model of this path from here on."""

    path: bytes


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """The text gave this many chunks; scoring begins."""

    chunks: int


class Scored(msgspec.Struct, frozen=True, tag="scored"):
    """A batch is done, with it the `fraction` of all; `scores` are of those of its positions that count."""

    fraction: float
    scores: Scores | None


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """Nothing follows."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The reason, one line."""

    reason: str


Message = Opening | Opened | Scored | Finished | Failed


class Model:
    """A whole model and a context of one sequence."""

    def __init__(self, path: bytes, n_ctx: int, threads: int) -> None:
        """Raises HomeinferError when llama.cpp refuses the model or has no memory for the context."""
        self.name = printable(os.fsdecode(path), 1000)
        self._lib: Any = runtime.llama()
        runtime.forget_log()
        self._context: Any = None
        self._model: Any = self._lib.llama_model_load_from_file(path, self._lib.llama_model_default_params())
        if not self._model:
            raise HomeinferError(f"{self.name} can't be loaded: {runtime.reason('llama.cpp gives no reason')}")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_vocab = int(self._lib.llama_vocab_n_tokens(self._vocab))
        if self._lib.llama_vocab_type(self._vocab) == self._lib.LLAMA_VOCAB_TYPE_NONE:
            raise HomeinferError(f"{self.name} has no vocabulary: it can't be given text")
        if self._lib.llama_model_has_encoder(self._model):
            raise HomeinferError(f"{self.name} has an encoder: its perplexity is not that of a text alone")
        self._context = self._make_context(n_ctx, threads)
        self._batch = self._lib.llama_batch_init(min(n_ctx, _BATCH), 0, 1)

    def _make_context(self, n_ctx: int, threads: int) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = min(n_ctx, _BATCH)
        params.n_threads = params.n_threads_batch = threads
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            raise HomeinferError(
                f"{self.name}: no context of {n_ctx} tokens can be made: {runtime.reason('try a smaller --ctx')}"
            )
        return context

    @property
    def bos(self) -> int:
        """The token that begins every chunk, -1 when the model wants none."""
        wanted = self._lib.llama_vocab_get_add_bos(self._vocab)
        return int(self._lib.llama_vocab_bos(self._vocab)) if wanted else -1

    def tokenize(self, text: bytes, n_ctx: int) -> Tokens:
        """The text's whole chunks, int32 [n, n_ctx], tokenized at once as llama-perplexity does it."""
        room = len(text) + 16
        tokens = np.empty(room, np.int32)
        pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        count = int(self._lib.llama_tokenize(self._vocab, text, len(text), pointer, room, True, False))
        if count < 0:
            raise HomeinferError(f"{self.name}: the text can't be tokenized; give a shorter one")
        if count < n_ctx:
            raise HomeinferError(
                f"the text is too short: it has {count:,} tokens, a chunk has {n_ctx:,}; give a longer text, or a "
                "smaller --ctx"
            )
        return tokens[: count - count % n_ctx].reshape(-1, n_ctx).copy()

    def forget(self) -> None:
        """Clear the context's memory, for the next chunk."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def logits(self, tokens: Ints, start: int, wanted: slice) -> Floats:
        """Run tokens at positions start, start + 1, …; the logits of the wanted ones among them, float32
        [wanted, n_vocab], valid until the next call. Raises HomeinferError when llama_decode fails."""
        batch, n = self._batch, len(tokens)
        batch.n_tokens = n
        np.ctypeslib.as_array(batch.token, (n,))[:] = tokens
        np.ctypeslib.as_array(batch.pos, (n,))[:] = np.arange(start, start + n)
        np.ctypeslib.as_array(batch.n_seq_id, (n,))[:] = 1
        flags = np.ctypeslib.as_array(batch.logits, (n,))
        flags[:] = 0
        flags[wanted] = 1
        for i in range(n):
            batch.seq_id[i][0] = 0
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise HomeinferError(f"{self.name}: llama_decode failed with {status}: {runtime.reason('no reason given')}")
        rows = wanted.stop - wanted.start
        if not rows:
            return np.empty((0, self.n_vocab), np.float32)
        logits = self._lib.llama_get_logits(self._context)
        if not logits:
            raise HomeinferError(f"{self.name}: this model gives no logits: it is no language model")
        return np.ctypeslib.as_array(logits, (rows, self.n_vocab))

    def close(self) -> None:
        """Free context and weights."""
        if self._context:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)


class Span(msgspec.Struct, frozen=True):
    """Tokens [start, end) of a chunk, run at once; `wanted` of them are scored, counted from start."""

    chunk: int
    start: int
    end: int
    wanted: slice


def spans(n_chunks: int, n_ctx: int) -> Iterator[Span]:
    """All batches in order. Scored are positions n_ctx/2 to n_ctx-2 of a chunk."""
    for chunk in range(n_chunks):
        for start in range(0, n_ctx, _BATCH):
            end = min(start + _BATCH, n_ctx)
            first = min(max(n_ctx // 2, start), end)
            yield Span(chunk, start, end, slice(first - start, max(min(end, n_ctx - 1), first) - start))


class Run:
    """One request, with everything it needs open."""

    def __init__(self, request: Request, send: Callable[[Message], None], stack: ExitStack) -> None:
        self._request, self._send, self._stack = request, send, stack
        self._pool: Executor = stack.enter_context(ThreadPoolExecutor(request.threads))
        self._kept: LogitsFile | None = None
        self._reference: Model | None = None
        if request.reference_is_kept:
            self._kept = stack.enter_context(closing(LogitsFile(os.fsdecode(request.reference))))
        else:
            self._reference = self._open(request.reference)
        self._model = None if request.model is None else self._open(request.model)
        self._tokens = self._checked_tokens()

    def _open(self, path: bytes) -> Model:
        self._send(Opening(path))
        return self._stack.enter_context(closing(Model(path, self._request.n_ctx, self._request.threads)))

    def _checked_tokens(self) -> Tokens:
        """Chunks that every model here and the kept logits have alike, int32 [n, n_ctx]."""
        request = self._request
        first, *others = [model for model in (self._model, self._reference) if model is not None]
        tokens = first.tokenize(request.text, request.n_ctx)
        for other in others:
            same = (other.n_vocab, other.bos) == (first.n_vocab, first.bos)
            if not same or not np.array_equal(other.tokenize(request.text, request.n_ctx), tokens):
                raise HomeinferError(
                    f"{first.name} and {other.name} have different vocabularies: only models that share one can be "
                    "compared"
                )
        if self._kept is not None:
            return tokens[: matching_chunks(self._kept, tokens, first.n_vocab, first.bos, request.chunks)]
        if request.chunks is not None and request.chunks > len(tokens):
            raise HomeinferError(
                f"the text has {len(tokens)} chunks of {request.n_ctx} tokens, {request.chunks} are wanted; give a "
                f"longer text, or --chunks {len(tokens)}"
            )
        return tokens[: request.chunks]

    def score(self) -> None:
        """Compare the model with the reference, or keep the reference's logits."""
        writer = self._writer()
        n_chunks, n_ctx = self._tokens.shape
        self._send(Opened(n_chunks))
        for span in spans(n_chunks, n_ctx):
            following = self._tokens[span.chunk, span.start + 1 : span.end + 1][span.wanted]
            records = self._reference_records(span, following)
            scores = None
            if writer is not None:
                writer.write(records)
            elif self._model is not None:
                scores = self._compared(self._model, span, records, following)
            self._send(Scored((span.chunk + span.end / n_ctx) / n_chunks, scores))
        if writer is not None:
            writer.finish()

    def _writer(self) -> LogitsWriter | None:
        if self._request.keep is None or self._reference is None:
            return None
        reference = self._reference
        name = Path(os.fsdecode(self._request.reference)).name
        header = made_for(self._tokens, reference.n_vocab, reference.bos, printable(name))
        return LogitsWriter(os.fsdecode(self._request.keep), header, self._tokens)

    def _run(self, model: Model, span: Span) -> Floats:
        tokens = self._tokens[span.chunk, span.start : span.end].copy()
        if span.start == 0:
            model.forget()
            if model.bos >= 0:
                tokens[0] = model.bos
        return model.logits(tokens, span.start, span.wanted)

    def _reference_records(self, span: Span, following: Ints) -> Records:
        if self._reference is None:
            assert self._kept is not None
            first = span.start + span.wanted.start - self._tokens.shape[1] // 2
            return self._kept.read(span.chunk, first, len(following))
        logits = self._run(self._reference, span)
        try:
            return pack(logits, following, self._pool, self._request.threads)
        except NotFiniteError:
            raise _not_finite(self._reference, span) from None

    def _compared(self, model: Model, span: Span, records: Records, following: Ints) -> Scores | None:
        logits = self._run(model, span)
        try:
            return compare(records, logits, following, self._pool, self._request.threads)
        except NotFiniteError:
            raise _not_finite(model, span) from None


def _not_finite(model: Model, span: Span) -> HomeinferError:
    return HomeinferError(
        f"{model.name}: its logits in chunk {span.chunk + 1} are not finite (NaN): the weights are damaged, or the "
        "quantization failed"
    )


def _end_with_parent(keep: bytes | None) -> None:
    """Runs in a thread: the parent holds stdin open for as long as it lives and wants the result."""
    while os.read(0, 4096):
        pass
    _give_up(keep)


def _give_up(keep: bytes | None) -> None:
    if keep is not None:
        Path(os.fsdecode(keep)).unlink(missing_ok=True)
    os._exit(1)


def main() -> None:
    tell = open_to_parent()
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=Request)
    threading.Thread(target=_end_with_parent, args=(request.keep,), daemon=True).start()

    def send(message: Message) -> None:
        try:
            tell(message)
        except BrokenPipeError:
            _give_up(request.keep)

    try:
        with ExitStack() as stack:
            Run(request, send, stack).score()
        send(Finished())
    except (HomeinferError, MemoryError) as error:
        send(Failed(str(error) or "memory ran out; try fewer threads or a smaller --ctx"))


if __name__ == "__main__":
    main()
