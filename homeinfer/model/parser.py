"""The bytes of one GGUF file's header into records, refusing whatever llama.cpp's gguf.cpp refuses.

Every count is compared with the bytes that are left before anything is allocated for it, so a
header can ask for no more than a small multiple of its own size.
"""

from __future__ import annotations

import mmap
import struct
import sys
from typing import Any, Final, NoReturn

from homeinfer.errors import HomeinferError
from homeinfer.model.ggml_types import REMOVED_TYPES, TYPE_NAMES, TYPE_SIZES
from homeinfer.model.records import Header, HeaderFile, MetaValue, TensorInfo, ValueType, printable

Buffer = bytes | memoryview | mmap.mmap

DAMAGED: Final = "the file is damaged, download it again"
_CUT: Final = "the file is damaged or cut short, download it again"

_MAX_HEADER: Final = 64 << 20
_MAX_ARRAY: Final = 1 << 24
_MAX_KEYS: Final = 1 << 16
_MAX_TENSORS: Final = 1 << 20
_MAX_KEY_BYTES: Final = 65535
_MAX_NAME_BYTES: Final = 63
_MAX_DIMS: Final = 4
_MAX_ALIGNMENT: Final = 1 << 20
_DEFAULT_ALIGNMENT: Final = 32
_INT64_MAX: Final = (1 << 63) - 1
_MIN_KEY_VALUE: Final = 8 + 1 + 4 + 1
_MIN_TENSOR: Final = 8 + 1 + 4 + 8 + 4 + 8

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_PREFIX: Final = struct.Struct("<4sI")
_COUNTS: Final = struct.Struct("<QQ")
_ARRAY_HEAD: Final = struct.Struct("<IQ")
_TYPE_AND_OFFSET: Final = struct.Struct("<IQ")
_DIMS: Final = tuple(struct.Struct(f"<{n}Q") for n in range(_MAX_DIMS + 1))

_SCALARS: Final = {
    number: struct.Struct("<" + code)
    for number, code in enumerate(("B", "b", "H", "h", "I", "i", "f", "B", "", "", "Q", "q", "d"))
    if code
}
_STRING: Final = int(ValueType.STRING)
_ARRAY: Final = int(ValueType.ARRAY)
_BOOL: Final = int(ValueType.BOOL)
_TYPES: Final = tuple(ValueType)
_TOKENIZER: Final = "tokenizer."


class Cursor:
    """A position in the header that never passes its end; place names what is being read, and arrays of what is not
    kept are empty."""

    __slots__ = ("data", "end", "file", "keeps", "place", "pos")

    def __init__(self, data: Buffer, file: str) -> None:
        self.data = data
        self.file = file
        self.keeps = True
        self.place = "the start of the file"
        self.pos = 0
        self.end = min(len(data), _MAX_HEADER)

    def fail(self, problem: str, advice: str = DAMAGED) -> NoReturn:
        raise HomeinferError(f"{printable(self.file, 1000)}: {self.place}: {problem}; {advice}")

    def take(self, count: int) -> int:
        """Claims count bytes and returns where they start."""
        start = self.pos
        if count > self.end - start:
            self._fail_at_end(count)
        self.pos = start + count
        return start

    def _fail_at_end(self, count: int) -> NoReturn:
        if self.end < len(self.data):
            self.fail(f"metadata of more than {_MAX_HEADER >> 20} MiB, which no model has")
        self.fail(f"{count:,} bytes expected and only {self.end - self.pos:,} left", _CUT)

    def u32(self) -> int:
        value: int = _U32.unpack_from(self.data, self.take(4))[0]
        return value

    def u64(self) -> int:
        value: int = _U64.unpack_from(self.data, self.take(8))[0]
        return value

    def raw(self) -> bytes:
        """The bytes of a string: a 64-bit length and as many bytes."""
        length = self.u64()
        start = self.take(length)
        return bytes(self.data[start : start + length])


def parse_file(data: Buffer, size: int, path: str, index: int, *, vocabulary: bool = True) -> Header:
    """One GGUF file's version, sizes, metadata and tensors (gguf.cpp, gguf_init_from_reader).

    data holds the file's first bytes (all of the header), size is the whole file's length in bytes,
    index becomes TensorInfo.file. vocabulary: whether arrays of the tokenizer are among the metadata. Tensor data past
    the end of the file is not an error here: see HeaderFile.truncated. Raises HomeinferError for everything else that
    is wrong.
    """
    cursor = Cursor(data, path or "GGUF header")
    version, n_tensors, n_keys = _prologue(cursor)
    metadata = _metadata(cursor, n_keys, vocabulary)
    alignment = _alignment(cursor, metadata)
    rows = _tensor_table(cursor, n_tensors)
    data_offset = cursor.pos if not rows else _padded(cursor.pos, alignment)
    tensors = []
    end = 0
    for name, shape, type_name, offset, nbytes in rows:
        if offset != _padded(end, alignment):
            cursor.place = f"tensor '{name}'"
            _fail_offset(cursor, offset, end, alignment)
        end = offset + nbytes
        tensors.append(TensorInfo(name, shape, type_name, data_offset + offset, nbytes, index))
    if data_offset + end > _INT64_MAX - _MAX_ALIGNMENT:
        cursor.place = "the tensor table"
        cursor.fail(f"tensors of {end:,} bytes in all")
    file = HeaderFile(path=path, size=size, data_offset=data_offset, alignment=alignment, data_bytes=end)
    return Header(version, (file,), metadata, tuple(tensors))


def _prologue(cursor: Cursor) -> tuple[int, int, int]:
    magic, version = _PREFIX.unpack_from(cursor.data, cursor.take(_PREFIX.size))
    if magic != b"GGUF":
        cursor.fail(f"'GGUF' expected, {bytes(magic)!r} found", "this is not a GGUF file, choose another")
    if version & 0xFFFF == 0 and version:
        cursor.fail("a big-endian GGUF", "download the little-endian one, which is the usual")
    if version not in (2, 3):
        advice = "convert the model again with a newer llama.cpp" if version == 1 else DAMAGED
        cursor.fail(f"GGUF version {version}, only 2 and 3 are known", advice)
    n_tensors, n_keys = _COUNTS.unpack_from(cursor.data, cursor.take(_COUNTS.size))
    room = cursor.end - cursor.pos
    if n_keys > _MAX_KEYS or n_keys * _MIN_KEY_VALUE > room:
        cursor.fail(f"{n_keys:,} metadata keys announced with {room:,} bytes left", _CUT)
    if n_tensors > _MAX_TENSORS or n_tensors * _MIN_TENSOR > room - n_keys * _MIN_KEY_VALUE:
        cursor.fail(f"{n_tensors:,} tensors announced with {room:,} bytes left", _CUT)
    return version, n_tensors, n_keys


def _metadata(cursor: Cursor, n_keys: int, vocabulary: bool) -> dict[str, MetaValue]:
    metadata: dict[str, MetaValue] = {}
    for number in range(n_keys):
        cursor.place = f"metadata key {number + 1} of {n_keys}"
        length = cursor.u64()
        if not 0 < length <= _MAX_KEY_BYTES:
            cursor.fail(f"a key of {length:,} bytes, 1 to {_MAX_KEY_BYTES:,} are allowed")
        key = _name(cursor, length)
        cursor.place = f"key '{printable(key)}'"
        if key in metadata:
            cursor.fail("it stands there twice")
        cursor.keeps = vocabulary or not key.startswith(_TOKENIZER)
        metadata[key] = _value(cursor)
    if vocabulary:
        return metadata
    return {key: value for key, value in metadata.items() if value.item is None or not key.startswith(_TOKENIZER)}


def _name(cursor: Cursor, length: int) -> str:
    start = cursor.take(length)
    raw = bytes(cursor.data[start : start + length])
    try:
        name = str(raw, "utf-8")
    except UnicodeDecodeError:
        cursor.fail(f"a name that is not UTF-8: {printable(repr(raw), 80)}")
    if "\0" in name:
        cursor.fail(f"a name with a zero byte: '{printable(name, 80)}'")
    return name


def _value(cursor: Cursor) -> MetaValue:
    kind = cursor.u32()
    if kind == _STRING:
        return MetaValue(ValueType.STRING, str(cursor.raw(), "utf-8", "surrogateescape"))
    if kind == _ARRAY:
        return _array(cursor)
    scalar = _SCALARS.get(kind)
    if scalar is None:
        cursor.fail(f"value type {kind}, which does not exist")
    value = scalar.unpack_from(cursor.data, cursor.take(scalar.size))[0]
    if kind == _BOOL:
        if value > 1:
            cursor.fail(f"a boolean of {value}, only 0 and 1 are allowed")
        value = value == 1
    return MetaValue(_TYPES[kind], value)


def _array(cursor: Cursor) -> MetaValue:
    kind, count = _ARRAY_HEAD.unpack_from(cursor.data, cursor.take(_ARRAY_HEAD.size))
    if kind == _ARRAY:
        cursor.fail("an array of arrays, which llama.cpp does not read")
    scalar = _SCALARS.get(kind)
    if scalar is None and kind != _STRING:
        cursor.fail(f"an array of value type {kind}, which does not exist")
    nbytes = count * (8 if scalar is None else scalar.size)
    if count > _MAX_ARRAY or nbytes > cursor.end - cursor.pos:
        room = cursor.end - cursor.pos
        cursor.fail(f"an array of {count:,} values announced with {room:,} bytes left", _CUT)
    values = _strings(cursor, count) if scalar is None else _numbers(cursor, kind, scalar, nbytes)
    return MetaValue(ValueType.ARRAY, values, _TYPES[kind])


def _numbers(cursor: Cursor, kind: int, scalar: struct.Struct, nbytes: int) -> list[Any]:
    start = cursor.take(nbytes)
    if not cursor.keeps:
        return []
    raw = bytes(cursor.data[start : start + nbytes])
    values: list[Any]
    if sys.byteorder == "little":
        values = memoryview(raw).cast(scalar.format[1:]).tolist()  # type: ignore[call-overload]
    else:
        values = [value for (value,) in scalar.iter_unpack(raw)]
    if kind == _BOOL:
        if raw.strip(b"\0\1"):
            cursor.fail(f"a boolean of {max(values)}, only 0 and 1 are allowed")
        return [value == 1 for value in values]
    return values


def _strings(cursor: Cursor, count: int) -> list[str]:
    """Written out instead of calling Cursor.raw: a vocabulary holds hundreds of thousands."""
    data, pos, end, keeps = cursor.data, cursor.pos, cursor.end, cursor.keeps
    unpack = _U64.unpack_from
    values = []
    for number in range(count):
        start = pos + 8
        if start > end:
            cursor.fail(f"string {number + 1:,} of {count:,} lies past the end of the file", _CUT)
        pos = start + unpack(data, pos)[0]
        if pos > end:
            cursor.fail(f"string {number + 1:,} of {count:,} runs past the end of the file", _CUT)
        if keeps:
            values.append(str(data[start:pos], "utf-8", "surrogateescape"))
    cursor.pos = pos
    return values


def _alignment(cursor: Cursor, metadata: dict[str, MetaValue]) -> int:
    found = metadata.get("general.alignment")
    if found is None:
        return _DEFAULT_ALIGNMENT
    cursor.place = "key 'general.alignment'"
    if found.type is not ValueType.UINT32 or not isinstance(found.value, int):
        cursor.fail(f"a {found.type.name} value, UINT32 expected")
    alignment = found.value
    if not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        cursor.fail(f"an alignment of {alignment}, a power of two up to {_MAX_ALIGNMENT:,} expected")
    return alignment


Row = tuple[str, tuple[int, ...], str, int, int]


def _tensor_table(cursor: Cursor, n_tensors: int) -> list[Row]:
    rows: list[Row] = []
    seen: set[str] = set()
    for number in range(n_tensors):
        cursor.place = f"tensor {number + 1} of {n_tensors}"
        length = cursor.u64()
        if not 0 < length <= _MAX_NAME_BYTES:
            cursor.fail(f"a name of {length:,} bytes, 1 to {_MAX_NAME_BYTES} are allowed")
        name = _name(cursor, length)
        cursor.place = f"tensor '{printable(name)}'"
        if name in seen:
            cursor.fail("it stands there twice")
        seen.add(name)
        rows.append(_tensor(cursor, name))
    return rows


def _tensor(cursor: Cursor, name: str) -> Row:
    """The rest of a tensor's line; its offset is still relative to the tensor data."""
    n_dims = cursor.u32()
    if not 0 < n_dims <= _MAX_DIMS:
        cursor.fail(f"{n_dims:,} dimensions, 1 to {_MAX_DIMS} are allowed")
    shape: tuple[int, ...] = _DIMS[n_dims].unpack_from(cursor.data, cursor.take(8 * n_dims))
    n_weights = 1
    for extent in shape:
        n_weights *= extent
    if n_weights == 0 or n_weights > _INT64_MAX:
        cursor.fail(f"the shape {' × '.join(map(str, shape))} is empty or too large")
    number, offset = _TYPE_AND_OFFSET.unpack_from(cursor.data, cursor.take(_TYPE_AND_OFFSET.size))
    type_name = TYPE_NAMES.get(number)
    if type_name is None:
        _fail_type(cursor, number)
    block, block_bytes = TYPE_SIZES[type_name]
    if shape[0] % block:
        cursor.fail(f"rows of {shape[0]:,} weights, {type_name} has blocks of {block}")
    nbytes = n_weights // block * block_bytes
    if nbytes > _INT64_MAX:
        cursor.fail(f"{nbytes:,} bytes, more than any file holds")
    return name, shape, type_name, offset, nbytes


def _fail_type(cursor: Cursor, number: int) -> NoReturn:
    removed = REMOVED_TYPES.get(number)
    if removed is not None:
        cursor.fail(f"type {removed}, which llama.cpp no longer reads", "quantize the model again")
    cursor.fail(f"type number {number}, which is unknown", "the file is damaged, or needs a newer homeinfer")


def _fail_offset(cursor: Cursor, offset: int, end: int, alignment: int) -> NoReturn:
    if offset % alignment:
        cursor.fail(f"its data at offset {offset:,} is not aligned to {alignment} bytes")
    if offset < end:
        cursor.fail(f"its data at offset {offset:,} overlaps the tensors before it, which end at {end:,}")
    cursor.fail(f"its data at offset {offset:,} does not follow the tensors before it, which end at {end:,}")


def _padded(position: int, alignment: int) -> int:
    return (position + alignment - 1) & -alignment
