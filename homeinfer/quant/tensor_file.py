"""A GGUF with a model's metadata and tensors of our own making, written a piece at a time."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import gguf
import numpy as np

from homeinfer.model.ggml_types import TYPE_NUMBERS
from homeinfer.model.header import Header, MetaValue, ValueType
from homeinfer.quant.output_header import padded
from homeinfer.quant.recipes import PlannedTensor

_DROPPED = ("split.no", "split.count", "split.tensors.count", "general.alignment", "homeinfer.")
"""Beginnings of keys that are not the source's to say."""
_NUMBERS = {
    ValueType.UINT8: "u1", ValueType.INT8: "i1", ValueType.UINT16: "<u2", ValueType.INT16: "<i2",
    ValueType.UINT32: "<u4", ValueType.INT32: "<i4", ValueType.FLOAT32: "<f4", ValueType.BOOL: "u1",
    ValueType.UINT64: "<u8", ValueType.INT64: "<i8", ValueType.FLOAT64: "<f8",
}  # fmt: skip


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
    values = {key: value for key, value in header.metadata.items() if not key.startswith(_DROPPED)}
    values |= {"general.quantization_version": MetaValue(ValueType.UINT32, gguf.GGML_QUANT_VERSION), **added}
    with path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", gguf.GGUF_VERSION, len(tensors), len(values)))
        for key, value in values.items():
            file.write(_text(key) + struct.pack("<I", value.type))
            file.writelines(_packed(value))
        offset = 0
        for info, tensor in zip(header.tensors, tensors, strict=True):
            file.write(_text(tensor.name) + struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape))
            file.write(struct.pack("<IQ", TYPE_NUMBERS[tensor.type], offset))
            offset += padded(tensor.bytes)


def _packed(value: MetaValue) -> Iterator[bytes]:
    """A value's bytes (gguf_write_kv); gguf-py takes neither empty arrays nor texts that are not UTF-8."""
    items: list[Any] = [value.value]
    kind = value.type
    if isinstance(value.value, list):
        assert value.item is not None
        items, kind = value.value, value.item
        yield struct.pack("<IQ", kind, len(items))
    if kind is ValueType.STRING:
        yield from map(_text, items)
    else:
        yield np.array(items, _NUMBERS[kind]).tobytes()


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data
