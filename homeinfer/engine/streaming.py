"""Streamed windows: weights that do not fit are read from disk into their places just before they are used.

A device keeps some windows resident and streams others. All streamed layers of an engine process form one circle in
the order in which its windows were made, and native/stream.c reads ahead in it: while this device computes, and while
the others do. Read bytes lie in anonymous memory, at most `buffer_bytes` of it, and never in the page cache; where
everything fits into the buffer, everything is read once.

Routed experts are not among them: a token uses a few of many, so they are mapped, read on demand and left to the page
cache. So is what lies outside the layers, except the output matrix, which is streamed after the last layer,
in blocks of rows where the architecture allows that (output_rows.py). Small
tensors (norms, biases) are read once and stay.

Linux only (tried); elsewhere streamed windows are mapped ones, left to the system's page cache (not tried).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import msgspec

from homeinfer import _native
from homeinfer.engine import stream_file
from homeinfer.engine.graph_nodes import product_operations
from homeinfer.engine.output_rows import OutputMatrix
from homeinfer.errors import HomeinferError
from homeinfer.model.cut_rules import n_layers
from homeinfer.model.ggml_types import TYPE_NUMBERS
from homeinfer.model.header import Header, TensorInfo, read_header
from homeinfer.model.layers import is_routed_expert, layer_of
from homeinfer.model.output_blocks import block_rows

if TYPE_CHECKING:
    from typing_extensions import CapsuleType

READERS = 8
"""Requests in flight: enough for a disk to work at full speed."""
PIECE = 1 << 20
"""Bytes of one request."""
SMALL = 64 << 10
"""Tensors of up to so many bytes (norms, biases) stay in memory."""

Places = tuple[tuple[int, int, int, int], ...]
"""Offset in the file, address, bytes, bytes of the tensor before: see native.stream_add."""

SUPPORTED = sys.platform == "linux"


class Span(msgspec.Struct, frozen=True):
    """Bytes [begin, end) of a file, in whole pages; `lead` bytes of the same tensor come before, in a shared page."""

    begin: int
    end: int
    lead: int = 0

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class StreamGroup(msgspec.Struct, frozen=True):
    """What is read and let go as one; kept: it is never let go."""

    spans: tuple[Span, ...]
    kept: bool = False

    @property
    def nbytes(self) -> int:
        return sum(span.nbytes for span in self.spans)


class StreamCounts(msgspec.Struct, frozen=True):
    """What streaming has done since it started.

    read_bytes: from disk. waits: how often a graph came to weights that were not there; waited_ms: how long, together.
    held_bytes: memory that streamed weights have now; most_bytes: the most they had.
    """

    read_bytes: int
    waits: int
    waited_ms: float
    held_bytes: int
    most_bytes: int


class Streamer:
    """The streamed layers of one engine process. Make it, then its windows (LayerWindow's `streamer`), then `start`."""

    def __init__(self, buffer_bytes: int) -> None:
        """buffer_bytes: the most memory that streamed weights may take. Raises HomeinferError for none."""
        if buffer_bytes < 1:
            raise HomeinferError(f"a buffer of {buffer_bytes} bytes for streamed layers: give it room for two layers")
        self._limit = buffer_bytes
        self._native: CapsuleType | None = _native.stream_new(buffer_bytes, READERS, PIECE) if SUPPORTED else None
        self._paths: list[str] = []
        self._windows: list[tuple[StreamGroup, ...]] = []
        self._handles: list[int] = []
        self.mappings: list[stream_file.Mapping] = []
        """Where the windows are in memory."""
        self._started = False
        self.output: OutputMatrix | None = None
        """Of the window that was loaded last, where it is to be used in blocks."""

    def load(self, path: str, takes_tokens: bool, is_last: bool, load: Callable[[str], Any]) -> Any:
        """The llama_model of a window file, loaded by `load` (path to model) without reading its weights, which are
        streamed from now on. takes_tokens, is_last: the graph begins with tokens, ends with logits. A split model is
        loaded as it is.

        Raises HomeinferError what `load` raises, and when the file can't be mapped or read.
        """
        self.output = None
        header = read_header(path, vocabulary=False)
        if self._native is None or len(header.files) != 1:
            return load(path)
        check_tensor_layout()
        model, mappings = stream_file.load_unread(header, load)
        if not model:
            return model
        self._handles.append(stream_file.open_direct(path))
        self.mappings += mappings
        for tensor in header.tensors:
            at = stream_file.place(mappings, tensor.offset, tensor.offset + tensor.nbytes)
            if at is not None and is_routed_expert(tensor.name):
                stream_file.advise_random(at, tensor.nbytes)
        groups = [placed(group, mappings) for group in stream_groups(header, takes_tokens, is_last)]
        self._windows.append(tuple(group for group, _ in groups if group.spans))
        self.output = output_matrix(header, takes_tokens, mappings) if is_last else None
        for group, places in groups:
            if places:
                self._add(path, group.kept, places)
        return model

    def _add(self, path: str, kept: bool, places: Places) -> None:
        assert self._native is not None
        try:
            _native.stream_add(self._native, self._handles[-1], len(self._handles), kept, places)
        except OSError as problem:
            raise HomeinferError(f"{path}: no room for streamed layers: {problem.strerror}") from problem
        self._paths.append(path)

    def attach(self, capture: CapsuleType) -> None:
        """Let a window's graph wait for its weights."""
        if self._native is not None:
            _native.capture_stream(capture, self._native)

    @property
    def streamed_bytes(self) -> int:
        """All streamed weights together: what a token reads, about, where they don't fit into the buffer."""
        return sum(group.nbytes for groups in self._windows for group in groups)

    @property
    def least_bytes(self) -> int:
        """The smallest buffer: what is kept, and in each window the two largest tensors, or blocks of one, at once."""
        return least_buffer(self._windows)

    def start(self) -> None:
        """Begin to read, in the order in which the windows were made. Raises HomeinferError for a buffer below
        `least_bytes`."""
        if self._native is None or self._started:
            return
        self._check_limit(self._limit)
        try:
            _native.stream_start(self._native)
        except OSError as problem:
            raise HomeinferError(f"no thread to read weights with: {problem.strerror}") from problem
        self._started = True

    def _check_limit(self, limit: int) -> None:
        if limit < self.least_bytes:
            raise HomeinferError(
                f"a buffer of {limit / 1e6:,.1f} MB for streamed layers, which need {self.least_bytes / 1e6:,.1f} MB "
                "at least: give it more"
            )

    def resize(self, buffer_bytes: int) -> None:
        """Another limit from now on; memory above it is let go at once. Raises HomeinferError as `start`."""
        self._check_limit(buffer_bytes)
        self._limit = buffer_bytes
        if self._native is not None:
            _native.stream_resize(self._native, buffer_bytes)

    def after_graph(self) -> None:
        """To be called after each graph of a streamed window. Raises HomeinferError when weights could not be read,
        or the streamer is closed: what the graph computed is of no use then."""
        if self._native is None:
            return
        _native.stream_done(self._native)
        *_, problem, culprit, closed = _native.stream_state(self._native)
        if problem:
            said = "it has become shorter" if problem < 0 else os.strerror(problem)
            raise HomeinferError(f"{self._paths[culprit]}: weights can't be read: {said}; check the disk and the file")
        if closed or not self._started:
            raise HomeinferError("streamed layers are used, but nobody reads them: start the streamer first")

    def counts(self) -> StreamCounts:
        """What it has done so far."""
        return (
            StreamCounts(0, 0, 0.0, 0, 0)
            if self._native is None
            else StreamCounts(*_native.stream_state(self._native)[:5])
        )

    def close(self) -> None:
        """Stop reading: to be called before any of its windows is freed. Safe to call twice."""
        if self._native is not None:
            _native.stream_close(self._native)
        while self._handles:
            os.close(self._handles.pop())


def placed(group: StreamGroup, mappings: Sequence[stream_file.Mapping]) -> tuple[StreamGroup, Places]:
    """What of a group is in memory, and as native/stream.c takes it: llama.cpp leaves out tensors it does not use."""
    found = [(span, stream_file.place(mappings, span.begin, span.end)) for span in group.spans]
    spans = tuple(span for span, at in found if at is not None)
    places = tuple((span.begin, at, span.nbytes, span.lead) for span, at in found if at is not None)
    return StreamGroup(spans, group.kept), places


def least_buffer(windows: Sequence[tuple[StreamGroup, ...]]) -> int:
    """The smallest buffer that windows can be streamed through: while one tensor is used, the next must fit."""
    kept = sum(group.nbytes for groups in windows for group in groups if group.kept)
    pairs = (sorted(group.nbytes for group in groups if not group.kept)[-2:] for groups in windows)
    return kept + max((sum(pair) for pair in pairs), default=0)


def stream_groups(header: Header, takes_tokens: bool, is_last: bool) -> tuple[StreamGroup, ...]:
    """What is streamed of a window's file: one group of the small tensors, which is kept, then each other tensor of
    the layers in about the order of use, the output matrix last.

    A page that holds bytes of two tensors, or blocks (in files other than window files; on machines with pages larger
    than 4 kB), belongs to neither and stays mapped.
    """
    tensors = sorted(header.tensors, key=lambda tensor: tensor.offset)
    output = _output(header, takes_tokens) if is_last else None
    small: list[Span] = []
    found: list[tuple[tuple[int, bool, int], StreamGroup]] = []
    for i, tensor in enumerate(tensors):
        layer = _layer(header, tensor, output)
        is_small = tensor.nbytes <= SMALL and not is_routed_expert(tensor.name) and _is_used(tensor.name, is_last)
        if layer is None and not is_small:
            continue
        free_from = tensors[i - 1].offset + tensors[i - 1].nbytes if i else 0
        free_to = tensors[i + 1].offset if i + 1 < len(tensors) else header.files[0].size
        parts = _parts(header, tensor, tensor.name == output, free_from, free_to)
        if is_small:
            small += parts
        else:
            found += [((layer or 0, ".ffn_" in tensor.name, part.begin), StreamGroup((part,))) for part in parts]
    streamed = tuple(group for _, group in sorted(found, key=lambda each: each[0]))
    return (StreamGroup(tuple(small), kept=True), *streamed) if small else streamed


def output_matrix(header: Header, takes_tokens: bool, mappings: Sequence[stream_file.Mapping]) -> OutputMatrix | None:
    """The output matrix that is streamed in blocks, None where it is not."""
    matrix = header.tensor(_output(header, takes_tokens) or "")
    rows = block_rows(header) if matrix is not None else 0
    if matrix is None or not rows:
        return None
    at = stream_file.place(mappings, matrix.offset, matrix.offset + matrix.nbytes)
    if at is None:
        raise HomeinferError(f"{header.files[0].path}: llama.cpp has not mapped the output matrix as a whole")
    n_embd, n_rows = matrix.shape[:2]
    return OutputMatrix(at, TYPE_NUMBERS[matrix.type], n_embd, n_rows, matrix.nbytes // n_rows, rows)


def _is_used(name: str, is_last: bool) -> bool:
    """Whether a window's graph may use a tensor: no graph looks tokens up in a small matrix (a window file has one in
    place of the real one), and only the last window's goes on after its layers."""
    return not name.startswith("token_embd." if is_last else ("token_embd.", "output.", "output_norm."))


def _output(header: Header, takes_tokens: bool) -> str | None:
    """The output matrix's name; None where it is also what tokens are looked up in."""
    if header.tensor("output.weight") is not None:
        return "output.weight"
    return None if takes_tokens else "token_embd.weight"


def _layer(header: Header, tensor: TensorInfo, output: str | None) -> int | None:
    """The layer with which a tensor is streamed, the output matrix after the last; None when it is not."""
    n = n_layers(header)
    if tensor.name == output:
        return n
    layer = layer_of(tensor.name)
    return None if layer is None or layer >= n or is_routed_expert(tensor.name) else layer


def _parts(header: Header, tensor: TensorInfo, is_output: bool, free_from: int, free_to: int) -> tuple[Span, ...]:
    """A tensor's whole pages, the output matrix's by blocks of rows, when bytes before `free_from` and from `free_to`
    on are others'."""
    end = tensor.offset + tensor.nbytes
    step = block_rows(header) * (tensor.nbytes // tensor.shape[-1]) if is_output else 0
    edges = [*range(tensor.offset, end, step or max(tensor.nbytes, 1)), end]
    bounds = [free_from, *edges[1:-1], free_to]
    spans = (_pages(*edge, *bound) for edge, bound in zip(pairwise(edges), pairwise(bounds), strict=False))
    return tuple(span for span in spans if span.nbytes > 0)


def _pages(begin: int, end: int, free_from: int, free_to: int) -> Span:
    """The whole pages of bytes [begin, end) of a file."""
    page = stream_file.PAGE
    down, up = begin // page * page, -(-end // page) * page
    first = down if down >= free_from else down + page
    return Span(first, up if up <= free_to else up - page, max(0, first - begin))


def check_tensor_layout() -> None:
    """Raises HomeinferError when a graph node of the loaded library looks otherwise than native/tensor.h says."""
    product_operations()
