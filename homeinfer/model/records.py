"""A GGUF header as frozen data: what header.py reads and everything else asks."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

import msgspec

from homeinfer.errors import HomeinferError

MAX_LAYERS = 512
"""LLAMA_MAX_LAYERS: llama.cpp aborts on more, and on none."""


class ValueType(enum.IntEnum):
    """The type of a metadata value (enum gguf_type)."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


class MetaValue(msgspec.Struct, frozen=True):
    """One metadata value; strings that are not UTF-8 keep their bytes as surrogate escapes."""

    type: ValueType
    value: bool | int | float | str | list[Any]
    item: ValueType | None = None


class TensorInfo(msgspec.Struct, frozen=True):
    """One line of the tensor table.

    shape is in ggml's order (shape[0] is the row width), offset counts bytes from the start of
    the tensor's own file, file is an index into Header.files.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int
    file: int

    @property
    def n_weights(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count


class HeaderFile(msgspec.Struct, frozen=True):
    """One file of a model, all numbers in bytes.

    data_bytes is what the tensor table says the data takes: from data_offset to the end of the
    last tensor, without padding after it.
    """

    path: str
    size: int
    data_offset: int
    alignment: int
    data_bytes: int

    @property
    def truncated(self) -> bool:
        return self.data_offset + self.data_bytes > self.size


class Header(msgspec.Struct, frozen=True, dict=True):
    """Everything a GGUF says before its tensor data; several files when the model is split.

    metadata is the first file's, `split.*` keys included; tensors are those of all files in order.
    """

    version: int
    files: tuple[HeaderFile, ...]
    metadata: dict[str, MetaValue]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        return str(self.get("general.architecture", ""))

    @property
    def truncated(self) -> bool:
        """Whether some file ends before its tensor data does."""
        return any(file.truncated for file in self.files)

    @property
    def n_layer(self) -> int:
        """`<architecture>.block_count`; HomeinferError when it is missing or no layer count."""
        key = f"{self.architecture}.block_count"
        count = self.get(key)
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_LAYERS:
            problem = "is missing" if count is None else f"is not a number from 1 to {MAX_LAYERS}"
            raise HomeinferError(
                f"{printable(self.files[0].path)}: key '{key}' {problem}: "
                "this is not a language model that llama.cpp can run, choose another file"
            )
        return count

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def n_weights(self) -> int:
        return sum(tensor.n_weights for tensor in self.tensors)

    @cached_property
    def by_name(self) -> Mapping[str, TensorInfo]:
        return MappingProxyType({tensor.name: tensor for tensor in self.tensors})

    def tensor(self, name: str) -> TensorInfo | None:
        return self.by_name.get(name)

    def get(self, key: str, default: Any = None) -> Any:
        """The plain value of a metadata key."""
        found = self.metadata.get(key)
        return default if found is None else found.value

    def arch_get(self, key: str, default: Any = None) -> Any:
        """The plain value of `<architecture>.<key>`."""
        return self.get(f"{self.architecture}.{key}", default)


def printable(text: str, limit: int = 200) -> str:
    """Text from a file, safe to show in one line: control characters escaped, the rest cut off."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
