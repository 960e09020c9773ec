"""What the token loop knows of an engine: one process and a ring of eight machines look the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from homeinfer.engine.device_info import DeviceInfo
from homeinfer.engine.edits import KvEdit

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
