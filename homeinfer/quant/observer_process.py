"""The process that runs a model for its inputs, its own text or its tokens: llama.cpp may end it, and only it.

Started as `python -m homeinfer.quant.observer_process`. One Request comes in on stdin, one JSON line; out go Messages
on stdout, one JSON line each: Progress, then Finished when the result lies in the file that the request names, or
Failed. When stdin ends, the parent is gone, and the process ends as well.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from homeinfer.engine import runtime
from homeinfer.engine.child import Child
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.errors import HomeinferError
from homeinfer.model.header import printable, read_header
from homeinfer.quant.moments_file import Input, write_inputs
from homeinfer.quant.observe import Ints, Mode, Observed, observe
from homeinfer.quant.observed_file import read_observed, write_observed
from homeinfer.quant.self_text import LENGTH, N_SEQUENCES, SEED, generate
from homeinfer.quant.to_parent import open_to_parent

_PROGRESS_SECONDS = 0.1


class Observe(msgspec.Struct, frozen=True, tag="observe"):
    """`observe` of chunks with `lengths`, their tokens (int32) one after the other."""

    model: bytes
    result: bytes
    tokens: bytes
    lengths: tuple[int, ...]
    weights: dict[str, Mode]
    threads: int


class Tokenize(msgspec.Struct, frozen=True, tag="tokenize"):
    """The tokens of a text, see `tokenize_in_process`."""

    model: bytes
    result: bytes
    text: str


class Gather(msgspec.Struct, frozen=True, tag="gather"):
    """As Observe, but what is kept of `inputs`, by number, is written into `folder`, see `gather_in_process`."""

    model: bytes
    folder: bytes
    tokens: bytes
    lengths: tuple[int, ...]
    inputs: dict[int, Input]
    threads: int


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """The model's own text, see `self_text.generate`."""

    model: bytes
    result: bytes
    n_sequences: int
    length: int
    seed: int
    threads: int


Request = Observe | Tokenize | Gather | Generate


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """The `fraction` of all tokens is done."""

    fraction: float


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The result file is complete."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """What the user is to read, one line."""

    reason: str


Message = Progress | Finished | Failed


def observe_in_process(
    model_path: str | os.PathLike[str],
    token_chunks: Sequence[Ints],
    weights: Mapping[str, Mode],
    n_threads: int,
    on_progress: Callable[[float], None] | None = None,
) -> Observed:
    """`observe.observe`, whatever llama.cpp does: raises HomeinferError where that ends its process."""
    path = Path(model_path)
    tokens, lengths = _packed(token_chunks)
    with _result_file() as result:
        request = Observe(os.fsencode(path), os.fsencode(result), tokens, lengths, dict(weights), n_threads)
        _run(path, request, on_progress)
        return read_observed(result)


def gather_in_process(
    model_path: str | os.PathLike[str],
    token_chunks: Sequence[Ints],
    inputs: Mapping[int, Input],
    folder: Path,
    n_threads: int,
    on_progress: Callable[[float], None] | None = None,
) -> None:
    """Observe these inputs and keep what moments_file.write_inputs writes; raises HomeinferError as observe does."""
    path = Path(model_path)
    tokens, lengths = _packed(token_chunks)
    request = Gather(os.fsencode(path), os.fsencode(folder), tokens, lengths, dict(inputs), n_threads)
    _run(path, request, on_progress)


def _packed(chunks: Sequence[Ints]) -> tuple[bytes, tuple[int, ...]]:
    return b"".join(np.ascontiguousarray(chunk, np.int32).tobytes() for chunk in chunks), tuple(map(len, chunks))


def _unpacked(tokens: bytes, lengths: Sequence[int]) -> list[Ints]:
    return np.split(np.frombuffer(tokens, np.int32), np.cumsum(lengths)[:-1])


class Tokens(NamedTuple):
    """int32 [n], and the token that the model wants before every text, if it does."""

    ids: Ints
    begin: int | None


def tokenize_in_process(model_path: str | os.PathLike[str], text: str) -> Tokens:
    """The tokens of a text as tools/imatrix makes them: after what begins a text, names of special tokens not read.

    Raises HomeinferError, also where llama.cpp ends its process.
    """
    path = Path(model_path)
    with _result_file() as result:
        _run(path, Tokenize(os.fsencode(path), os.fsencode(result), text), None)
        begin, *_ = ids = np.load(result, allow_pickle=False)
        return Tokens(ids[1:], int(begin) if begin >= 0 else None)


def generate_in_process(
    model_path: str | os.PathLike[str],
    *,
    n_sequences: int = N_SEQUENCES,
    length: int = LENGTH,
    seed: int = SEED,
    threads: int,
    on_progress: Callable[[float], None] | None = None,
) -> list[Ints]:
    """`self_text.generate`, whatever llama.cpp does: raises HomeinferError where that ends its process."""
    path = Path(model_path)
    with _result_file() as result:
        request = Generate(os.fsencode(path), os.fsencode(result), n_sequences, length, seed, threads)
        _run(path, request, on_progress)
        return list(np.load(result, allow_pickle=False))


@contextlib.contextmanager
def _result_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="homeinfer-") as folder:
        yield Path(folder) / "result"


def _run(model: Path, request: Request, on_progress: Callable[[float], None] | None) -> None:
    environment = runtime.engine_environment(os.environ) | {
        "OPENBLAS_NUM_THREADS": "1",  # observe has threads of its own, which need not wait for each other
    }
    name, subject = "the process that ran the model", printable(str(model), 1000)
    child = Child(__name__, verb="run", name=name, subject=subject, environment=environment)
    try:
        child.send(msgspec.json.encode(request) + b"\n")
        while not isinstance(message := msgspec.json.decode(child.receive(), type=Message), Finished):
            if isinstance(message, Failed):
                raise HomeinferError(message.reason)
            if on_progress is not None:
                on_progress(message.fraction)
    finally:
        child.end()


def _work(request: Request, on_progress: Callable[[float], None]) -> None:
    model = os.fsdecode(request.model)
    match request:
        case Observe(result=result):
            chunks = _unpacked(request.tokens, request.lengths)
            write_observed(_path(result), observe(model, chunks, request.weights, request.threads, on_progress))
        case Gather(folder=folder):
            chunks = _unpacked(request.tokens, request.lengths)
            modes = {entry.name: entry.mode for entry in request.inputs.values()}
            write_inputs(_path(folder), request.inputs, observe(model, chunks, modes, request.threads, on_progress))
        case Tokenize(result=result):
            _save(_path(result), _tokens(model, request.text))
        case Generate(result=result, n_sequences=n_sequences, length=length, seed=seed, threads=threads):
            texts = generate(
                model, n_sequences=n_sequences, length=length, seed=seed, threads=threads, on_progress=on_progress
            )
            _save(_path(result), texts)


def _path(name: bytes) -> Path:
    return Path(os.fsdecode(name))


def _tokens(model: str, text: str) -> list[int]:
    """What begins a text (or -1), then the text's tokens."""
    read_header(model)
    tokenizer = Tokenizer(model)
    lib = runtime.llama()
    begin = lib.llama_vocab_bos(tokenizer.vocab) if lib.llama_vocab_get_add_bos(tokenizer.vocab) else -1
    return [begin, *tokenizer.encode(text, parse=False)]


def _save(path: Path, tokens: Sequence[int] | Sequence[Ints]) -> None:
    with path.open("wb") as file:
        np.save(file, np.array(tokens, np.int32))


def _place(request: Request, problem: str | None) -> str:
    """Where a result could not be written, and what to do."""
    if isinstance(request, Gather):
        folder = printable(os.fsdecode(request.folder), 1000)
        return f"{folder}: {problem}; make room there or set HOMEINFER_KEPT to another folder"
    return f"the temporary folder: {problem}; set TMPDIR to another one"


def _end_with_parent() -> None:
    """Runs in a thread: the parent holds stdin open for as long as it lives and wants the result."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def _throttled(send: Callable[[Message], None]) -> Callable[[float], None]:
    last = 0.0

    def report(fraction: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PROGRESS_SECONDS:
            last = now
            send(Progress(fraction))

    return report


def main() -> None:
    send = open_to_parent()
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request: Request = msgspec.json.decode(line, type=Request)
    try:
        _work(request, _throttled(send))
    except HomeinferError as error:
        send(Failed(str(error)))
    except MemoryError:
        send(Failed("there is not enough memory for what is to be observed: take fewer weights or tokens at a time"))
    except OSError as error:
        send(Failed(f"the result can't be kept in {_place(request, error.strerror)}"))
    else:
        send(Finished())


if __name__ == "__main__":
    main()
