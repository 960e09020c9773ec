"""Writes GGUF headers byte by byte, right or wrong: gguf-py's writer makes right ones only."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from homeinfer.model.ggml_types import TYPE_NUMBERS, TYPE_SIZES
from homeinfer.model.header import Header, MetaValue, ValueType

_CODES = "BbHhIif?  Qqd"
U8, U32, BOOL, STRING, ARRAY = 0, 4, 7, 8, 9
ARCHITECTURE = {"general.architecture": MetaValue(ValueType.STRING, "llama")}


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def prologue(n_tensors: int, n_keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def tensor(name: str | bytes, shape: Sequence[int], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dims + struct.pack("<IQ", kind, offset)


ARCH = key("general.architecture", STRING, string("llama"))


def file_of_keys(*keys: bytes) -> bytes:
    return prologue(0, len(keys)) + b"".join(keys)


def value(meta: MetaValue) -> bytes:
    if isinstance(meta.value, list):
        assert meta.item is not None
        return array(meta.item, len(meta.value), b"".join(_scalar(meta.item, item) for item in meta.value))
    return _scalar(meta.type, meta.value)


def _scalar(kind: ValueType, item: bool | int | float | str) -> bytes:
    return string(item) if isinstance(item, str) else struct.pack("<" + _CODES[kind], item)


def gguf(
    metadata: Mapping[str, MetaValue],
    tensors: Sequence[tuple[str, tuple[int, ...], str]] = (),
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A whole file, its tensor data zeros."""
    start, data_bytes = head(metadata, tensors, version, alignment)
    return start + bytes(data_bytes)


def shrunk(header: Header, n_tensors: int, n_items: int) -> bytes:
    """The header of a real model with only its first tensors and the first items of its arrays."""
    metadata = {
        name: MetaValue(meta.type, meta.value[:n_items] if isinstance(meta.value, list) else meta.value, meta.item)
        for name, meta in header.metadata.items()
    }
    tensors = [(tensor.name, tensor.shape, tensor.type) for tensor in header.tensors[:n_tensors]]
    return head(metadata, tensors, header.version, header.files[0].alignment)[0]


def head(
    metadata: Mapping[str, MetaValue],
    tensors: Sequence[tuple[str, tuple[int, ...], str]],
    version: int = 3,
    alignment: int = 32,
) -> tuple[bytes, int]:
    """The header up to where the data starts, and how many bytes the data takes."""
    out = prologue(len(tensors), len(metadata), version)
    out += b"".join(key(name, meta.type, value(meta)) for name, meta in metadata.items())
    end = 0
    for name, shape, type_name in tensors:
        offset = -(-end // alignment) * alignment
        out += tensor(name, shape, TYPE_NUMBERS[type_name], offset)
        block, block_bytes = TYPE_SIZES[type_name]
        n_weights = 1
        for extent in shape:
            n_weights *= extent
        end = offset + n_weights // block * block_bytes
    return out + bytes(-len(out) % alignment), end
