"""Measured groups in a file, so that an interrupted measurement goes on where it was."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, printable
from homeinfer.whole_file import whole_file

_VERSION = 1
_FILE = "sensitivity.json"


class MeasuredGroup(msgspec.Struct, frozen=True):
    """Tensors of one role in some layers (none outside the layers), the sum of their relative errors, and the mean
    KLD (nats) that these caused with its standard error; None where the model gave no finite logits with them."""

    role: str
    layers: tuple[int, ...]
    tensors: tuple[str, ...]
    error: float
    kld: float | None
    stderr: float | None

    @property
    def sensitivity(self) -> float | None:
        """KLD per unit of relative error; None where the measurement says nothing."""
        if self.kld is None or not 0 < self.kld < math.inf or not 0 < self.error < math.inf:
            return None
        value = self.kld / self.error
        return value if 0 < value < math.inf else None


class _Kept(msgspec.Struct, frozen=True):
    """The file. `of` is a digest of what was measured: the tensors' names, shapes and types, and the tokens."""

    version: int
    of: str
    groups: tuple[MeasuredGroup, ...]


class KeptGroups:
    """The groups kept in a folder for this model and these tokens. A file that is damaged, or of something else, is
    as good as none. The folder is expected to be the model's own: weights are not looked at."""

    def __init__(self, folder: Path, header: Header, chunks: Sequence[npt.NDArray[np.int32]]) -> None:
        self._path = folder / _FILE
        self._of = _digest(header, chunks)
        self._groups = {group.tensors: group for group in self._read(header)}

    def find(self, tensors: tuple[str, ...]) -> MeasuredGroup | None:
        return self._groups.get(tensors)

    def add(self, group: MeasuredGroup) -> None:
        """Keep one more. Raises HomeinferError when it can't be written."""
        self._groups[group.tensors] = group
        data = msgspec.json.encode(_Kept(_VERSION, self._of, tuple(self._groups.values())))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self._path) as file:
                file.write(data)
        except OSError as problem:
            raise HomeinferError(
                f"{printable(str(self._path), 1000)}: cannot be written: {problem.strerror}; free some space, or "
                "choose another folder"
            ) from None

    def _read(self, header: Header) -> tuple[MeasuredGroup, ...]:
        try:
            kept = msgspec.json.decode(self._path.read_bytes(), type=_Kept)
        except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError):
            return ()
        if kept.version != _VERSION or kept.of != self._of:
            return ()
        return tuple(group for group in kept.groups if _is_sane(group, header))


def _is_sane(group: MeasuredGroup, header: Header) -> bool:
    numbers = (group.error, group.kld or 0.0, group.stderr or 0.0)
    known = all(name in header.by_name for name in group.tensors)
    return known and bool(group.tensors) and all(math.isfinite(number) for number in numbers) and group.error >= 0


def _digest(header: Header, chunks: Sequence[npt.NDArray[np.int32]]) -> str:
    table = [(tensor.name, tensor.shape, tensor.type) for tensor in header.tensors]
    digest = hashlib.sha256(msgspec.json.encode((_VERSION, table, [len(chunk) for chunk in chunks])))
    for chunk in chunks:
        digest.update(np.ascontiguousarray(chunk, "<i4").tobytes())
    return digest.hexdigest()
