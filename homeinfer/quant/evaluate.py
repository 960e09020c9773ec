"""How close a model stays to a reference: perplexity of both and the divergence between them on a text.

The convention is llama-perplexity's: the text is tokenized at once and cut into chunks of n_ctx tokens, each chunk
begins with the model's BOS in place of its own first token, and positions n_ctx/2 to n_ctx-2 are scored. llama.cpp
runs in a process of its own; nothing of it is left when a function here returns or raises.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from homeinfer.engine.child import Child
from homeinfer.errors import HomeinferError
from homeinfer.model.architectures import check_generates
from homeinfer.model.header import Header, printable, read_header
from homeinfer.quant.evaluator_process import Failed, Finished, Message, Opened, Opening, Request, Scored
from homeinfer.quant.kld import Scores, statistics
from homeinfer.quant.logits_file import is_logits_file, scored_positions

FEWEST_TOKENS = 8
"""The smallest chunk: three of its positions are scored."""

MOST_TOKENS = 1 << 24
"""The largest chunk, where a model does not say how long a text it was trained on."""

StrPath = str | os.PathLike[str]
OnProgress = Callable[[float], None]
"""Called with the share of the work that is done, 0 to 1."""


class Evaluation(msgspec.Struct, frozen=True):
    """A model measured against a reference.

    ppl, ppl_reference: perplexities, on the same positions. mean_kld and its standard error, kld_median, kld_p99:
    Kullback-Leibler divergence of the model from the reference per position, in nats. same_top: share of positions,
    0 to 1, where both find the same token likeliest. size_bytes: the model's files; bpw: bits of its tensors per
    weight. tokens: positions scored, in `chunks` chunks of n_ctx tokens.
    """

    ppl: float
    ppl_reference: float
    mean_kld: float
    mean_kld_stderr: float
    kld_median: float
    kld_p99: float
    same_top: float
    size_bytes: int
    bpw: float
    chunks: int
    n_ctx: int
    tokens: int


class KeptLogits(msgspec.Struct, frozen=True):
    """What keep_logits wrote: the file, its bytes, and its chunks of n_ctx tokens."""

    path: str
    size_bytes: int
    chunks: int
    n_ctx: int


def evaluate(
    model: StrPath,
    reference: StrPath,
    text: str,
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Compare a model (GGUF, any part of a split one) with a reference (another, or a file from keep_logits).

    chunks: only so many from the text's beginning; without it all, or as many as are kept. threads: all cores unless
    given. Two models are in memory at once, and the logits of 512 tokens of each. Raises HomeinferError for whatever
    is wrong with the models, the text or the kept file; KeyboardInterrupt and what on_progress raises pass through.
    """
    header = checked_model(model, n_ctx)
    kept = is_logits_file(reference)
    first = os.fspath(reference) if kept else checked_model(reference, n_ctx).files[0].path
    request = Request(
        model=os.fsencode(header.files[0].path),
        reference=os.fsencode(first),
        reference_is_kept=kept,
        keep=None,
        text=_encoded(text),
        n_ctx=n_ctx,
        chunks=_checked_count(chunks),
        threads=threads or _usable_cores(),
    )
    with _Evaluator(request) as evaluator:
        n_chunks = evaluator.open()
        scores = list(evaluator.scores(on_progress))
    return Evaluation(
        **msgspec.structs.asdict(statistics(scores)),
        size_bytes=sum(file.size for file in header.files),
        bpw=8 * header.nbytes / header.n_weights,
        chunks=n_chunks,
        n_ctx=n_ctx,
        tokens=n_chunks * scored_positions(n_ctx),
    )


def keep_logits(
    reference: StrPath,
    text: str,
    destination: StrPath,
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> KeptLogits:
    """Write the reference's logits on a text to a file that evaluate takes in the reference's place.

    A chunk takes about n_ctx * n_vocab bytes. The file appears when it is complete. Raises HomeinferError like
    evaluate, and when the file can't be written, is there already (without force), or the disk has too little room.
    """
    header = checked_model(reference, n_ctx)
    target = _checked_destination(Path(destination), header, force)
    partial = target.with_name(f".homeinfer-{secrets.token_hex(4)}.partial")
    request = Request(
        model=None,
        reference=os.fsencode(header.files[0].path),
        reference_is_kept=False,
        keep=os.fsencode(partial),
        text=_encoded(text),
        n_ctx=n_ctx,
        chunks=_checked_count(chunks),
        threads=threads or _usable_cores(),
    )
    with _Evaluator(request) as evaluator:
        n_chunks = evaluator.open()
        for _ in evaluator.scores(on_progress):
            pass
        try:
            size = partial.stat().st_size
            partial.replace(target)
        except OSError as error:
            raise HomeinferError(f"{_name(target)}: cannot be written: {error.strerror}; try another folder") from None
    return KeptLogits(os.fspath(destination), size, n_chunks, n_ctx)


def read_text(path: StrPath) -> str:
    """A text file's contents, without the newline at its end. Raises HomeinferError when it is missing or no UTF-8."""
    name = _name(Path(path))
    try:
        return Path(path).read_bytes().decode().removesuffix("\n")
    except OSError as error:
        raise HomeinferError(f"{name}: the text can't be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise HomeinferError(f"{name}: byte {error.start:,} is no UTF-8; give a text file in UTF-8") from None


class _Evaluator:
    """The child process. Leaving the context ends it and removes the file it was writing, if still there."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._child = Child("homeinfer.quant.evaluator_process", verb="run", name="the evaluation")
        self._child.subject = _name(Path(os.fsdecode(request.reference)))

    def __enter__(self) -> _Evaluator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._child.end()
        finally:
            if self._request.keep is not None:
                Path(os.fsdecode(self._request.keep)).unlink(missing_ok=True)

    def open(self) -> int:
        """Load everything and tokenize; returns the number of chunks."""
        self._child.send(msgspec.json.encode(self._request) + b"\n")
        while isinstance(message := self._receive(), Opening):
            self._child.subject = _name(Path(os.fsdecode(message.path)))
        assert isinstance(message, Opened)
        return message.chunks

    def scores(self, on_progress: OnProgress | None) -> Iterator[Scores]:
        """What every batch gave, as it comes."""
        while not isinstance(message := self._receive(), Finished):
            assert isinstance(message, Scored)
            if message.scores is not None:
                yield message.scores
            if on_progress is not None:
                on_progress(message.fraction)

    def _receive(self) -> Message:
        message: Message = msgspec.json.decode(self._child.receive(), type=Message)
        if isinstance(message, Failed):
            raise HomeinferError(message.reason)
        return message


def checked_model(path: StrPath, n_ctx: int) -> Header:
    """The header of a model that writes text and takes chunks of n_ctx tokens; HomeinferError for another."""
    header = read_header(path)
    check_generates(header)
    said = header.arch_get("context_length")
    longest = said if isinstance(said, int) and 0 < said < MOST_TOKENS else MOST_TOKENS
    if n_ctx < FEWEST_TOKENS:
        raise HomeinferError(f"a chunk of {n_ctx} tokens is too short; give --ctx {FEWEST_TOKENS} or more")
    if n_ctx > longest:
        raise HomeinferError(
            f"{_name(Path(path))}: a chunk of {n_ctx:,} tokens is longer than the {longest:,} that this model was "
            f"trained on; give --ctx {longest} or less"
        )
    return header


def _checked_count(chunks: int | None) -> int | None:
    if chunks is not None and chunks < 1:
        raise HomeinferError(f"{chunks} chunks can't be scored; give --chunks 1 or more, or none for all")
    return chunks


def _checked_destination(destination: Path, header: Header, force: bool) -> Path:
    """The file to write, symbolic links followed."""
    name = _name(destination)
    target = Path(os.path.realpath(destination))
    try:
        if not target.parent.is_dir():
            raise HomeinferError(f"{name}: the folder {_name(target.parent)} does not exist; create it first")
        if target.exists():
            if not target.is_file() or any(target.samefile(file.path) for file in header.files):
                raise HomeinferError(f"{name}: this is no file for logits; name another one to write")
            if not force:
                raise HomeinferError(f"{name}: the file exists already; give it as --reference, or name another one")
    except OSError as error:
        raise HomeinferError(f"{name}: {error.strerror}; name another file to write") from None
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise HomeinferError(f"{name}: no permission to write in {_name(target.parent)}; choose another folder")
    return target


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise HomeinferError(f"the text has no UTF-8 form at character {error.start:,}; give another text") from None


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _name(path: Path) -> str:
    return printable(str(path), 1000)
