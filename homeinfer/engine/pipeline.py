"""What the token loop knows of an engine: one process and a ring of eight machines look the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]


class Batch(msgspec.Struct, frozen=True, eq=False):
    """Tokens to run, in order, at most `Pipeline.n_batch` of one sequence after the other.

    tokens, positions, sequences: int32 [n]; wanted: bool [n], the rows whose logits come back.
    """

    tokens: Ints
    positions: Ints
    sequences: Ints
    wanted: Flags

    @staticmethod
    def of(tokens: Sequence[int], first_position: int, sequence: int = 0, *, last_only: bool = True) -> Batch:
        """Consecutive tokens of one sequence; logits of the last one, or of none."""
        n = len(tokens)
        wanted = np.zeros(n, dtype=np.bool_)
        if last_only and n:
            wanted[-1] = True
        return Batch(
            tokens=np.asarray(tokens, dtype=np.int32),
            positions=np.arange(first_position, first_position + n, dtype=np.int32),
            sequences=np.full(n, sequence, dtype=np.int32),
            wanted=wanted,
        )


class Remove(msgspec.Struct, frozen=True, tag="remove"):
    """Forget positions [start, end) of a sequence; end -1: to the end (llama_memory_seq_rm)."""

    sequence: int
    start: int = 0
    end: int = -1


class Keep(msgspec.Struct, frozen=True, tag="keep"):
    """Forget every other sequence."""

    sequence: int


class Copy(msgspec.Struct, frozen=True, tag="copy"):
    """Give all of `sequence` to `target` as well (llama_memory_seq_cp; of parts, [start, end), llama.cpp can't)."""

    sequence: int
    target: int
    start: int = 0
    end: int = -1


class Shift(msgspec.Struct, frozen=True, tag="shift"):
    """Add `delta` to the positions [start, end) of a sequence (llama_memory_seq_add).

    Positions that a Copy shares with another sequence move there too: shift before copying.
    """

    sequence: int
    start: int
    end: int
    delta: int


KvEdit = Remove | Keep | Copy | Shift


class DeviceInfo(msgspec.Struct, frozen=True):
    """One device of a pipeline and the windows [first, last) it holds."""

    name: str
    windows: list[tuple[int, int]]


class Pipeline(Protocol):
    """A whole model, wherever its layers are."""

    @property
    def n_vocab(self) -> int: ...
    @property
    def n_ctx(self) -> int:
        """Positions one sequence may have."""
        ...

    @property
    def n_batch(self) -> int:
        """Most tokens of one `forward`."""
        ...

    @property
    def can_shift(self) -> bool:
        """Whether every window's memory can take Shift and partial Remove edits."""
        ...

    @property
    def devices(self) -> tuple[DeviceInfo, ...]: ...

    def forward(self, batch: Batch) -> Floats:
        """Run a batch: logits, float32 [wanted rows, n_vocab]. Raises HomeinferError when an engine fails."""
        ...

    def edit(self, edits: Sequence[KvEdit]) -> None:
        """Change every window's memory, in order with the batches. Raises HomeinferError."""
        ...

    def close(self) -> None: ...
