"""A model's weights as float32, a few rows at a time."""

from __future__ import annotations

import mmap
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from homeinfer.errors import HomeinferError
from homeinfer.model.header import TYPE_SIZES, Header, TensorInfo, printable
from homeinfer.quant.rounding import dequantize_rows
from homeinfer.quant.weights_check import require_finite

Floats = npt.NDArray[np.float32]


class SourceWeights:
    """The tensors of a GGUF (all parts), mapped; leaving the context unmaps them."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._maps: list[mmap.mmap] = []
        self._stack = ExitStack()

    def __enter__(self) -> SourceWeights:
        try:
            for part in self._header.files:
                file = self._stack.enter_context(Path(part.path).open("rb"))
                self._maps.append(self._stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        except (OSError, ValueError) as problem:
            self._stack.close()
            raise HomeinferError(f"{self._name}: the weights can't be read: {problem}; check the file") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._maps.clear()
        self._stack.close()

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
        width = tensor.shape[0]
        weights, size = TYPE_SIZES[tensor.type]
        row_bytes = width // weights * size
        at = tensor.offset + start * row_bytes
        packed = np.frombuffer(self._maps[tensor.file][at : at + (stop - start) * row_bytes], np.uint8)
        found = dequantize_rows(tensor.type, packed.reshape(stop - start, row_bytes), width)
        require_finite(self._name, tensor.name, found)
        return found

    def sample(self, tensor: TensorInfo, most: int) -> Floats:
        """At most so many rows, evenly spread over the tensor, those of nothing but zeros left out."""
        n = self.n_rows(tensor)
        picked = np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))
        found = np.concatenate([self.rows(tensor, int(row), int(row) + 1) for row in picked])
        return found[found.any(axis=1)]
