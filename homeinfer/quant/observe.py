"""What goes into a model's weights while it reads a text: squares for an imatrix, second moments for a Hessian.

llama.cpp ends its process on what it dislikes: `observe` belongs into a process of its own, see observer_process.py.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from homeinfer import _native
from homeinfer.engine import runtime
from homeinfer.engine.graph_nodes import product_operations
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, printable, read_header
from homeinfer.quant.input_sums import NOISE_ROWS, InputSums, Noise
from homeinfer.quant.mapped_model import MappedModel

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_LOGITS_BYTES = 128 << 20
_ROWS_BYTES = 512 << 20
_SMALLEST_PIECE = 32
_MOST_USES = 8
"""How often a graph may use a weight: four times in hrm_text, twice in gemma3n."""
_EXPERTS = 2


class Mode(enum.Enum):
    """What to keep of a weight's inputs."""

    SUM2 = "sum2"
    """Sums of squares per channel (and expert): what an imatrix holds."""
    GRAM = "gram"
    """Xᵀ·X over all input rows X, beside it the chunks' first rows and the noise of 8-bit rounding."""
    ROWS = "rows"
    """The input rows themselves."""
    DIAGONAL = "diagonal"
    """As GRAM, but only the diagonal of Xᵀ·X."""


class Squares(msgspec.Struct, frozen=True):
    """Sums of squared inputs, float64 [n_expert, n_in], and how many rows they are of, int64 [n_expert].

    n_expert is 1 where no experts are chosen. A weight of several matrices that every token passes (one per head)
    has 1 and n_in × matrices, as in llama.cpp's files.
    """

    in_sum2: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]


class Observed(msgspec.Struct, frozen=True):
    """What `observe` saw of each weight.

    squares is by weight. All else is by the first weight of those that share an input, and inputs says for every
    weight that is not of mode SUM2 which that is: rows (float32 [n, n_in]), grams (float32 [n_in, n_in]), diagonals
    (float64 [n_in]), and for both of these firsts (float32 [n, n_in]: what the first token of each chunk puts in, none
    where experts are chosen) and noise. n_rows is how many rows there were. unused are weights that no product has.
    """

    tokens: int
    squares: dict[str, Squares]
    grams: dict[str, Floats]
    diagonals: dict[str, Doubles]
    firsts: dict[str, Floats]
    noise: dict[str, Noise]
    rows: dict[str, Floats]
    n_rows: dict[str, int]
    inputs: dict[str, str]
    unused: tuple[str, ...]

    def gram(self, weight: str) -> Floats:
        """Xᵀ·X of a weight's inputs, float32 [n_in, n_in]."""
        return self.grams[self.inputs[weight]]


def observable(header: Header, *, output_tensor: bool) -> tuple[str, ...]:
    """Weights that may have inputs: the layers' matrices, and with output_tensor the output matrix (which is
    token_embd.weight where both are tied). tools/imatrix names the same, but not a tied output."""
    names = [t.name for t in header.tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    if output_tensor:
        names.append("output.weight" if header.tensor("output.weight") else "token_embd.weight")
    return tuple(name for name in names if name.endswith(".weight"))


def observe(
    model_path: str | os.PathLike[str],
    token_chunks: Sequence[Ints],
    weights: Mapping[str, Mode],
    n_threads: int,
    on_progress: Callable[[float], None] | None = None,
) -> Observed:
    """Run each chunk of tokens (int32 [n]) by itself and keep what reaches `weights`.

    The model is mapped, not read. Memory beside it: 128 MiB for logits, up to 512 MiB for rows (fewer tokens go at
    a time when rows are wide), the sums, and with ROWS all rows. Weights late in a model cost more than
    early ones: every graph but the first ends with its last observed weight. All but SUM2 take the rows of all
    experts of a weight as one. A row counts as often as the graph uses the weight.

    Raises HomeinferError for weights that the model does not have, and when llama.cpp fails.
    """
    header = read_header(model_path)
    chunks = [np.ascontiguousarray(chunk, np.int32) for chunk in token_chunks if len(chunk)]
    if not chunks or not weights:
        raise HomeinferError(f"{_name(header)}: there is nothing to observe: no tokens, or no weights")
    collector = _Collector(header, weights, chunks)
    callback, user = _native.tap_pointers(collector.tap)

    def listen(params: Any) -> None:
        params.n_ctx = max(map(len, chunks))
        params.n_batch = params.n_ubatch = collector.piece
        params.cb_eval = runtime.llama().ggml_backend_sched_eval_callback(callback)
        params.cb_eval_user_data = user

    with MappedModel(header, n_threads, listen) as model, ThreadPoolExecutor(n_threads) as pool:
        total, done = sum(map(len, chunks)), 0
        for chunk in chunks:
            model.forget()
            for start in range(0, len(chunk), collector.piece):
                piece = chunk[start : start + collector.piece]
                collector.begin()
                collector.check(model.decode(piece))
                collector.drain(len(piece), pool, is_start=start == 0)
                done += len(piece)
                if on_progress is not None:
                    on_progress(done / total)
    return collector.result(total)


class _Collector:
    """The buffers of a tap, and what they add up to."""

    def __init__(self, header: Header, weights: Mapping[str, Mode], chunks: Sequence[Ints]) -> None:
        self._path = _name(header)
        self._modes = dict(weights)
        self._names = tuple(weights)
        shapes = [_shape(header, name) for name in self._names]
        widths = [n_in for (n_in, _), mode in zip(shapes, self._modes.values(), strict=True) if mode is not Mode.SUM2]
        self.piece = _piece(header, sum(widths), max(map(len, chunks)))
        per_token = _experts_used(header)
        self._values: list[npt.NDArray[Any]] = []
        self._counts: list[npt.NDArray[np.int64]] = []
        for (n_in, n_mat), mode in zip(shapes, self._modes.values(), strict=True):
            room = self.piece * (per_token if n_mat > 1 else 1) * _MOST_USES
            is_sum = mode is Mode.SUM2
            # pages of an empty array that nobody writes to (a shared input's, a weight's used once) cost nothing
            self._values.append(np.zeros((n_mat, n_in)) if is_sum else np.empty((room, n_in), np.float32))
            self._counts.append(np.zeros(n_mat, np.int64))
        entries = [
            (name, int(self._modes[name] is not Mode.SUM2), n_in, n_mat, values, counts)
            for name, (n_in, n_mat), values, counts in zip(self._names, shapes, self._values, self._counts, strict=True)
        ]
        mul_mat, mul_mat_id = product_operations()
        self.tap = _native.tap_new(
            runtime.address("ggml_nbytes"), runtime.address("ggml_backend_tensor_get"), mul_mat, mul_mat_id, entries
        )
        self._noise_step = -(-sum(map(len, chunks)) // NOISE_ROWS)
        self._sums: dict[str, InputSums] = {}
        self._rows: dict[str, list[Floats]] = {}
        self._n_rows: dict[str, int] = {}

    def begin(self) -> None:
        _native.tap_begin(self.tap)

    def check(self, status: int) -> None:
        problem, culprit, _ = _native.tap_state(self.tap)
        if problem is not None:
            raise HomeinferError(f"{self._path}: {printable(self._names[culprit])} can't be observed: {problem}")
        if status:
            why = runtime.reason("a token that the model does not have, or no memory")
            raise HomeinferError(f"{self._path}: llama_decode failed with {status}: {why}")

    def drain(self, tokens: int, pool: Executor, *, is_start: bool) -> None:
        """Take the rows of the last piece, of so many tokens, out of the buffers; is_start: it begins a chunk."""
        summed = []
        for index, (kind, n, leader) in enumerate(_native.tap_state(self.tap)[2]):
            name = self._names[index]
            if leader != index or self._modes[name] is Mode.SUM2:
                continue
            rows = self._values[index][:n]
            self._n_rows[name] = self._n_rows.get(name, 0) + n
            if self._modes[name] is Mode.ROWS:
                self._rows.setdefault(name, []).append(rows.copy())
                continue
            sums = self._sums_of(name, rows.shape[1])
            summed.append((sums, rows))
            if is_start and kind != _EXPERTS and n % tokens == 0:
                sums.add_firsts(rows[::tokens])
        for _ in pool.map(lambda pair: pair[0].add(pair[1]), summed):
            pass

    def _sums_of(self, name: str, width: int) -> InputSums:
        if name not in self._sums:
            is_gram = self._modes[name] is Mode.GRAM
            self._sums[name] = InputSums(width, is_gram=is_gram, noise_step=self._noise_step)
        return self._sums[name]

    def result(self, tokens: int) -> Observed:
        state = _native.tap_state(self.tap)[2]
        squares, inputs = {}, {}
        for name, (kind, _, leader), values, counts in zip(self._names, state, self._values, self._counts, strict=True):
            if kind and self._modes[name] is Mode.SUM2:
                experts = kind == _EXPERTS
                squares[name] = Squares(values if experts else values.reshape(1, -1), counts if experts else counts[:1])
            elif kind:
                inputs[name] = self._names[leader]
        observed = Observed(
            tokens=tokens,
            squares=squares,
            grams={name: sums.gram() for name, sums in self._sums.items() if self._modes[name] is Mode.GRAM},
            diagonals={
                name: sums.diagonal() for name, sums in self._sums.items() if self._modes[name] is Mode.DIAGONAL
            },
            firsts={name: sums.firsts() for name, sums in self._sums.items()},
            noise={name: sums.noise() for name, sums in self._sums.items()},
            rows={name: np.concatenate(parts) for name, parts in self._rows.items()},
            n_rows=self._n_rows,
            inputs=inputs,
            unused=tuple(name for name, (kind, _, _) in zip(self._names, state, strict=True) if not kind),
        )
        sums = {name: each.in_sum2 for name, each in squares.items()}
        self._require_finite(sums | observed.grams | observed.diagonals | observed.rows)
        return observed

    def _require_finite(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        for name, array in arrays.items():
            # a sum is finite only if all its terms are (or it overflows, which is as bad)
            if not np.isfinite(array.sum(dtype=np.float64)):
                raise HomeinferError(
                    f"{self._path}: the inputs of {printable(name)} are not all finite numbers: a weight of the model "
                    "before it is NaN or Inf, or its values overflow; take another file of this model"
                )


def _shape(header: Header, name: str) -> tuple[int, int]:
    """Row width and number of matrices of a weight."""
    tensor = header.tensor(name)
    if tensor is None or len(tensor.shape) < 2:
        raise HomeinferError(f"{_name(header)}: there is no matrix {printable(name)} in this model to observe")
    return tensor.shape[0], tensor.n_weights // (tensor.shape[0] * tensor.shape[1])


def _experts_used(header: Header) -> int:
    used = header.arch_get("expert_used_count", 1)
    return used if isinstance(used, int) and 1 <= used <= 1024 else 1


def _piece(header: Header, row_width: int, longest: int) -> int:
    """Tokens per llama_decode such that their logits and rows stay within bounds."""
    embedding = header.tensor("token_embd.weight")
    n_vocab = embedding.shape[-1] if embedding is not None else 1
    room = min(_LOGITS_BYTES // (4 * n_vocab), _ROWS_BYTES // (4 * max(row_width, 1)))
    pieces = -(-longest // max(room, _SMALLEST_PIECE))
    return -(-longest // pieces)


def _name(header: Header) -> str:
    return printable(str(Path(header.files[0].path)), 1000)
