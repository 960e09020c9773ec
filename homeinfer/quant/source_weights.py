"""A model's weights as float32, a few rows at a time."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, TensorInfo, printable
from homeinfer.quant.rounding import dequantize_rows
from homeinfer.quant.weights_check import require_finite

Floats = npt.NDArray[np.float32]


class SourceWeights:
    """The tensors of a GGUF (all parts), mapped; leaving the context unmaps them."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._maps: list[mmap.mmap] = []

    def __enter__(self) -> SourceWeights:
        try:
            for part in self._header.files:
                with Path(part.path).open("rb") as file:
                    self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as problem:
            self._maps.clear()
            raise HomeinferError(f"{self._name}: the weights can't be read: {problem}; check the file") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # not closed by hand: the traceback of an error may still hold an array over the map
        self._maps.clear()

    @property
    def _name(self) -> str:
        return printable(self._header.files[0].path, 1000)

    def n_rows(self, tensor: TensorInfo) -> int:
        return tensor.n_weights // tensor.shape[0]

    def packed(self, tensor: TensorInfo) -> bytes:
        """The tensor's bytes as they are."""
        return self._maps[tensor.file][tensor.offset : tensor.offset + tensor.nbytes]

    def rows(self, tensor: TensorInfo, start: int, stop: int) -> Floats:
        """Rows [start, stop) of a tensor, all its matrices one below the other: float32 [stop - start, width].

        Raises HomeinferError that names the tensor when some are NaN or infinite.
        """
        return self._read(tensor, self._matrix(tensor)[start:stop])

    def sample(self, tensor: TensorInfo, most: int) -> Floats:
        """At most so many rows, evenly spread over the tensor, those of nothing but zeros left out
        (but for one where there are no others)."""
        n = self.n_rows(tensor)
        picked = np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))
        found = self._read(tensor, self._matrix(tensor)[picked])
        is_used = found.any(axis=1)
        return found[is_used] if is_used.any() else found[:1]

    def _matrix(self, tensor: TensorInfo) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, mapped: uint8 [rows, bytes of a row]. Gone when the context is left: copy."""
        flat = np.frombuffer(self._maps[tensor.file], np.uint8, tensor.nbytes, tensor.offset)
        return flat.reshape(self.n_rows(tensor), -1)

    def _read(self, tensor: TensorInfo, packed: npt.NDArray[np.uint8]) -> Floats:
        found = dequantize_rows(tensor.type, np.array(packed), tensor.shape[0])
        require_finite(self._name, tensor.name, found)
        return found
