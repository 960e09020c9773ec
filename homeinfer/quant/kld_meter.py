"""How far a running model has moved from what it was: mean KLD on the same tokens, again and again.

The model runs in a process of its own, started as `python -m homeinfer.quant.kld_meter`. One Request comes in on
stdin, one JSON line; the process keeps the log-probabilities that the weights give as they are then and says Ready.
For every further line it runs the model anew and says Measured, or Failed at any point. Whoever writes into the
mapped file meanwhile changes the weights. When stdin ends, the parent is gone: the process removes the folder that the
request names, with the file, and ends.
"""

from __future__ import annotations

import ctypes
import os
import queue
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from homeinfer.engine import runtime
from homeinfer.engine.child import Child
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, printable, read_header
from homeinfer.quant.kld import Doubles, Floats, Ints, NotFiniteError, Records, compare, pack
from homeinfer.quant.logits_file import scored_positions
from homeinfer.quant.mapped_model import MappedModel
from homeinfer.quant.to_parent import open_to_parent

_BATCH = 512
"""Tokens of a llama_decode, and so a bound for the memory that logits take."""
_MOST_RECORD_BYTES = 1 << 30
_SHORTEST = 4
_MEASURE = b"\n"


class Kld(msgspec.Struct, frozen=True):
    """Mean KLD per position in nats and its standard error; both NaN where the model's logits are not finite."""

    mean: float
    stderr: float


class Request(msgspec.Struct, frozen=True):
    """Chunks with `lengths`, their tokens (int32) one after the other; paths are the file system's bytes."""

    model: bytes
    folder: bytes
    tokens: bytes
    lengths: tuple[int, ...]
    threads: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The reference is kept, of this many positions."""

    positions: int


class Measured(msgspec.Struct, frozen=True, tag="measured"):
    """The mean over all positions and its standard error; None where logits are not finite."""

    mean: float | None
    stderr: float | None


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The reason, one line."""

    reason: str


Message = Ready | Measured | Failed


class KldMeter:
    """A model that runs from `path` (a WorkCopy's) and is compared with what it was when the context was entered.

    chunks: tokens, int32 [n], each run by itself; positions n/2 to n-2 are scored. Of a large vocabulary only as many
    chunks are taken, from the first on, as 1 GiB has room for. folder is removed by the process should this one die.
    Raises HomeinferError, in one line, whatever llama.cpp does.
    """

    def __init__(self, path: Path, folder: Path, chunks: Sequence[Ints], threads: int) -> None:
        taken = [np.ascontiguousarray(chunk, np.int32) for chunk in chunks if len(chunk) >= _SHORTEST]
        if not taken:
            raise HomeinferError("the text is too short to measure on; give a longer one")
        self._subject = printable(str(path), 1000)
        self._request = Request(
            model=os.fsencode(path),
            folder=os.fsencode(folder),
            tokens=b"".join(chunk.tobytes() for chunk in taken),
            lengths=tuple(map(len, taken)),
            threads=threads,
        )
        self.positions = 0

    def __enter__(self) -> KldMeter:
        name = "the process that ran the model"
        environment = runtime.engine_environment(os.environ)
        self._child = Child(__name__, verb="run", name=name, subject=self._subject, environment=environment)
        try:
            self._child.send(msgspec.json.encode(self._request) + b"\n")
            message = self._receive()
            assert isinstance(message, Ready)
            self.positions = message.positions
        except BaseException:
            self._child.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.end()

    @property
    def pid(self) -> int:
        return self._child.pid

    def measure(self) -> Kld:
        """The divergence from the reference with the weights as they are now; exactly 0 where nothing changed."""
        self._child.send(_MEASURE)
        message = self._receive()
        assert isinstance(message, Measured)
        if message.mean is None or message.stderr is None:
            return Kld(float("nan"), float("nan"))
        return Kld(message.mean, message.stderr)

    def _receive(self) -> Message:
        message: Message = msgspec.json.decode(self._child.receive(), type=Message)
        if isinstance(message, Failed):
            raise HomeinferError(message.reason)
        return message


class _Model(MappedModel):
    """A mapped model that gives logits."""

    def __init__(self, header: Header, threads: int, longest: int) -> None:
        def size(params: Any) -> None:
            params.n_ctx = longest
            params.n_batch = params.n_ubatch = min(longest, _BATCH)

        super().__init__(header, threads, size)
        vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_vocab = int(self._lib.llama_vocab_n_tokens(vocab))

    def logits(self, tokens: Ints, wanted: slice) -> Floats:
        """Run the next tokens, int32 [n]; the logits of the wanted ones among them, float32 [wanted, n_vocab], valid
        until the next call. Only for those the last layer and the output are computed."""
        flags: npt.NDArray[np.int8] = np.zeros(len(tokens), np.int8)
        flags[wanted] = 1
        batch = self._lib.llama_batch(
            n_tokens=len(tokens),
            token=tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            logits=flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        status = self._lib.llama_decode(self._context, batch)
        if status:
            why = runtime.reason("a token that the model does not have, or no memory")
            raise HomeinferError(f"{self._path}: llama_decode failed with {status}: {why}")
        rows = wanted.stop - wanted.start
        if not rows:
            return np.empty((0, self.n_vocab), np.float32)
        found = self._lib.llama_get_logits(self._context)
        if not found:
            raise HomeinferError(f"{self._path}: this model gives no logits: it is no language model")
        return np.ctypeslib.as_array(found, (rows, self.n_vocab))


class _Meter:
    """The reference, and what every batch differs from it."""

    def __init__(self, model: _Model, chunks: list[Ints], threads: int, pool: ThreadPoolExecutor) -> None:
        self._model, self._threads, self._pool = model, threads, pool
        room = _MOST_RECORD_BYTES // (2 * model.n_vocab)
        rows = np.cumsum([scored_positions(len(chunk)) for chunk in chunks])
        self._chunks = chunks[: max(int(np.searchsorted(rows, room, "right")), 1)]
        self._records: list[Records] = []
        own: list[Doubles] = []
        for logits in self._run():
            records = pack(logits, np.zeros(len(logits), np.int32), pool, threads)
            self._records.append(records)
            own.append(self._divergence(records, logits))
        # what 16 bits blurred in the reference adds the same to every divergence from it
        self._own = np.concatenate(own)
        self.positions = len(self._own)

    def measure(self) -> Measured:
        parts = zip(self._records, self._run(), strict=True)
        try:
            found = np.concatenate([self._divergence(records, logits) for records, logits in parts]) - self._own
        except NotFiniteError:
            return Measured(None, None)
        spread = found.std(ddof=1) if len(found) > 1 else 0.0
        return Measured(float(found.mean()), float(spread / np.sqrt(len(found))))

    def _divergence(self, records: Records, logits: Floats) -> Doubles:
        scores = compare(records, logits, np.zeros(len(logits), np.int32), self._pool, self._threads)
        return np.array(scores.kld)

    def _run(self) -> Iterator[Floats]:
        """The logits of all scored positions, at most 512 at a time."""
        for chunk in self._chunks:
            self._model.forget()
            for start in range(0, len(chunk), _BATCH):
                end = min(start + _BATCH, len(chunk))
                first = min(max(len(chunk) // 2, start), end)
                wanted = slice(first - start, max(min(end, len(chunk) - 1), first) - start)
                logits = self._model.logits(chunk[start:end], wanted)
                if len(logits):
                    yield logits


def _work(request: Request, lines: queue.SimpleQueue[bytes], send: Callable[[Message], None]) -> None:
    chunks = np.split(np.frombuffer(request.tokens, np.int32), np.cumsum(request.lengths)[:-1])
    header = read_header(os.fsdecode(request.model))
    with _Model(header, request.threads, max(request.lengths)) as model, ThreadPoolExecutor(request.threads) as pool:
        assert isinstance(model, _Model)
        try:
            meter = _Meter(model, chunks, request.threads, pool)
        except NotFiniteError:
            raise HomeinferError(
                f"{printable(header.files[0].path, 1000)}: the model's logits are not finite (NaN): its weights are "
                "damaged; get the file again"
            ) from None
        send(Ready(meter.positions))
        while True:
            lines.get()
            send(meter.measure())


def _listen(folder: bytes, lines: queue.SimpleQueue[bytes]) -> None:
    """Runs in a thread: the parent holds stdin open for as long as it lives and wants the result."""
    while asked := os.read(0, 4096):
        for _ in asked:
            lines.put(_MEASURE)
    _give_up(folder)


def _give_up(folder: bytes) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main() -> None:
    tell = open_to_parent()
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return
    request = msgspec.json.decode(line, type=Request)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(request.folder, lines), daemon=True)
    listener.start()

    def send(message: Message) -> None:
        try:
            tell(message)
        except BrokenPipeError:
            _give_up(request.folder)

    try:
        _work(request, lines, send)
    except HomeinferError as error:
        send(Failed(str(error)))
    except MemoryError:
        send(Failed("memory ran out while KLD was measured; give fewer threads or a shorter text"))


if __name__ == "__main__":
    main()
