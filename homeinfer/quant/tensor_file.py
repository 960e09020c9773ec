"""A GGUF with a model's metadata and tensors of our own making, written a piece at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import gguf
import numpy as np

from homeinfer.model.header import Header, MetaValue, ValueType
from homeinfer.quant.output_header import ALIGNMENT, padded
from homeinfer.quant.recipes import PlannedTensor

_DROPPED = ("split.no", "split.count", "split.tensors.count", "general.alignment", "general.quantization_version")


class TensorFile:
    """The file being written: the header at once, then each tensor's bytes in order.

    Raises OSError as files do. The data starts at `data_offset`; what comes in must add up to the plan.
    """

    def __init__(self, path: Path, header: Header, tensors: tuple[PlannedTensor, ...], added: Mapping[str, MetaValue]):
        _write_header(path, header, tensors, added)
        self.data_offset = padded(path.stat().st_size)
        self._file: IO[bytes] = path.open("r+b")
        self._file.truncate(self.data_offset)
        self._file.seek(self.data_offset)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, pieces: Iterable[bytes | memoryview], nbytes: int, on_bytes: Callable[[int], None]) -> None:
        """One tensor of nbytes, then padding."""
        done = 0
        for piece in pieces:
            self._file.write(piece)
            done += len(piece)
            on_bytes(len(piece))
        if done != nbytes:
            raise AssertionError(f"{done} bytes of a tensor of {nbytes}")
        self._file.write(bytes(padded(nbytes) - nbytes))

    def finish(self) -> None:
        """Everything is on the disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())


def header_size(path: Path, header: Header, tensors: tuple[PlannedTensor, ...], added: Mapping[str, MetaValue]) -> int:
    """Bytes before the tensor data; it does not depend on the tensors' types, nor on numbers in the metadata.

    `path` is written and removed."""
    try:
        _write_header(path, header, tensors, added)
        return padded(path.stat().st_size)
    finally:
        path.unlink(missing_ok=True)


def _write_header(
    path: Path, header: Header, tensors: tuple[PlannedTensor, ...], added: Mapping[str, MetaValue]
) -> None:
    values = {key: value for key, value in header.metadata.items() if key not in _DROPPED} | dict(added)
    writer = gguf.GGUFWriter(path, str(values.pop("general.architecture").value))
    writer.data_alignment = ALIGNMENT
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in values.items():
        item = None if value.item is None else gguf.GGUFValueType(int(value.item))
        plain: Any = value.value
        if value.type == ValueType.ARRAY and not plain:
            continue
        writer.add_key_value(key, plain, gguf.GGUFValueType(int(value.type)), sub_type=item)
    for info, tensor in zip(header.tensors, tensors, strict=True):
        kind = gguf.GGMLQuantizationType[tensor.type]
        # the dtype only decides how gguf-py reads the shape: as weights for any but uint8
        shape = info.shape[::-1]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), tensor.bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
