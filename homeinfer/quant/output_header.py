"""What llama.cpp writes before and around the tensor data: metadata, tensor table, padding, to the byte.

Pure functions from the source's header, so that a dry run and a budget know a file's size exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from homeinfer.model.header import Header, MetaValue, TensorInfo, ValueType
from homeinfer.quant.importance import Importance
from homeinfer.quant.recipes import PlannedTensor, Recipe

ALIGNMENT: Final = 32
"""Bytes; llama.cpp pads tensor data so, whatever `general.alignment` the source has."""
LONGEST_TEXT: Final = 127
"""Bytes of a text that llama_model_kv_override can hold."""

_SCALAR_BYTES: Final = {
    ValueType.UINT8: 1,
    ValueType.INT8: 1,
    ValueType.BOOL: 1,
    ValueType.UINT16: 2,
    ValueType.INT16: 2,
    ValueType.UINT32: 4,
    ValueType.INT32: 4,
    ValueType.FLOAT32: 4,
    ValueType.UINT64: 8,
    ValueType.INT64: 8,
    ValueType.FLOAT64: 8,
}
_PROLOGUE_BYTES: Final = 4 + 4 + 8 + 8
_DROPPED: Final = ("split.no", "split.count", "split.tensors.count")
_ALWAYS_WRITTEN: Final = ("general.quantization_version", "general.file_type")


def added_metadata(header: Header, recipe: Recipe, importance: Importance | None) -> dict[str, str | int]:
    """Keys that the written file has beside the source's; the `quantize.imatrix.*` ones are llama-quantize's."""
    metadata: dict[str, str | int] = {"homeinfer.recipe": recipe.name} if recipe.overrides else {}
    metadata |= dict(recipe.metadata)
    if recipe.file_type is not None:
        metadata["general.file_type"] = recipe.file_type
    if any(file.alignment != ALIGNMENT for file in header.files):
        # llama.cpp copies the key but aligns to 32: the file would be unreadable
        metadata["general.alignment"] = ALIGNMENT
    if importance is not None:
        if importance.file:
            metadata["quantize.imatrix.file"] = importance.file
        if importance.datasets:
            metadata["quantize.imatrix.dataset"] = importance.datasets[0]
        metadata["quantize.imatrix.entries_count"] = len(importance.values)
        if importance.chunks > 0:
            metadata["quantize.imatrix.chunks_count"] = importance.chunks
    return {key: _shortened(value) if isinstance(value, str) else value for key, value in metadata.items()}


def header_bytes(header: Header, added: Mapping[str, str | int]) -> int:
    """Bytes before the tensor data of a file that llama_model_quantize makes of this source
    (gguf_get_meta_size), padding included."""
    written = {*_ALWAYS_WRITTEN, *added}
    size = _PROLOGUE_BYTES
    for key, value in header.metadata.items():
        if key not in written and key not in _DROPPED:
            size += _key_bytes(key) + _value_bytes(value)
    for key in written:
        text = added.get(key)
        size += _key_bytes(key) + (8 + len(text.encode()) if isinstance(text, str) else 4)
    size += sum(_table_line_bytes(tensor) for tensor in header.tensors)
    return padded(size)


def file_bytes(header: Header, tensors: Iterable[PlannedTensor], added: Mapping[str, str | int]) -> int:
    """The whole written file."""
    return header_bytes(header, added) + sum(padded(tensor.bytes) for tensor in tensors)


def padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _shortened(text: str) -> str:
    """At most as long as llama.cpp can take it, without half a character at the end."""
    return text.encode("utf-8", "replace")[:LONGEST_TEXT].decode("utf-8", "ignore")


def _key_bytes(key: str) -> int:
    return 8 + len(key.encode("utf-8", "surrogateescape")) + 4


def _value_bytes(value: MetaValue) -> int:
    if value.type is ValueType.STRING:
        assert isinstance(value.value, str)
        return 8 + _text_bytes([value.value])
    if value.type is not ValueType.ARRAY:
        return _SCALAR_BYTES[value.type]
    assert isinstance(value.value, list)
    if value.item is ValueType.STRING:
        return 4 + 8 + 8 * len(value.value) + _text_bytes(value.value)
    assert value.item is not None
    return 4 + 8 + _SCALAR_BYTES[value.item] * len(value.value)


def _text_bytes(texts: list[str]) -> int:
    """llama.cpp copies texts as C strings: they end before their first NUL."""
    joined = "".join(texts)
    if "\0" in joined:
        joined = "".join(text.partition("\0")[0] for text in texts)
    return len(joined.encode("utf-8", "surrogateescape"))


def _table_line_bytes(tensor: TensorInfo) -> int:
    """ggml_n_dims drops extents of 1 at the end."""
    n_dims = max([index + 1 for index, extent in enumerate(tensor.shape) if extent > 1], default=1)
    return 8 + len(tensor.name.encode("utf-8", "surrogateescape")) + 4 + 8 * n_dims + 4 + 8
