"""Headers without files, for what is decided from headers alone."""

from __future__ import annotations

import math

from homeinfer.model.header import TYPE_SIZES, Header, HeaderFile, MetaValue, TensorInfo, ValueType

Plain = bool | int | float | str | list[int] | list[bool] | list[float]
_TYPES = {
    bool: ValueType.BOOL,
    int: ValueType.UINT32,
    float: ValueType.FLOAT32,
    str: ValueType.STRING,
    list: ValueType.ARRAY,
}


def header_of(
    architecture: str, *, layers: int, tensors: dict[str, tuple[int, ...]] | None = None, **keys: Plain
) -> Header:
    """A model of `architecture` with `layers` layers: `keys` follow "<architecture>." with "__" for ".", `tensors` are
    F32 shapes in ggml's order."""
    said: dict[str, Plain] = {"block_count": layers, "embedding_length": 64, "attention__head_count": 4, **keys}
    metadata = {f"{architecture}.{key.replace('__', '.')}": _value(value) for key, value in said.items()}
    metadata["general.architecture"] = _value(architecture)
    table, at = [], 0
    for name, shape in (tensors or {}).items():
        table.append(TensorInfo(name, shape, "F32", at, math.prod(shape) * TYPE_SIZES["F32"][1], 0))
        at += table[-1].nbytes
    return Header(3, (HeaderFile("model.gguf", at, 0, 32, at),), metadata, tuple(table))


def _value(value: Plain) -> MetaValue:
    item = _TYPES[type(value[0])] if isinstance(value, list) else None
    return MetaValue(_TYPES[type(value)], value, item)
