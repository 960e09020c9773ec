"""A strict reader of GGUF headers: opens the files of a model, joins their parts, checks the whole.

It needs no tensor data, reads through mmap, and refuses whatever llama.cpp would refuse or abort on.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from pathlib import Path
from typing import Final

from homeinfer.errors import HomeinferError
from homeinfer.model.ggml_types import TYPE_SIZES
from homeinfer.model.parser import DAMAGED, parse_file
from homeinfer.model.records import Header, HeaderFile, MetaValue, TensorInfo, ValueType, printable

__all__ = [
    "TYPE_SIZES",
    "Header",
    "HeaderFile",
    "MetaValue",
    "TensorInfo",
    "ValueType",
    "printable",
    "read_header",
    "read_header_bytes",
]

_PART_NAME: Final = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_MIXED: Final = "the parts do not belong together, download them again"
_SPLIT_KEYS: Final = {
    "split.no": ValueType.UINT16,
    "split.count": ValueType.UINT16,
    "split.tensors.count": ValueType.INT32,
}


def read_header(path: str | os.PathLike[str], *, allow_truncated: bool = False, vocabulary: bool = True) -> Header:
    """The header of a GGUF file, of all its parts when it is one of a split model.

    allow_truncated accepts files that end before their tensor data does (a header without data);
    headers themselves must be whole. vocabulary False leaves out the arrays of the tokenizer, tens of megabytes that
    processes which stay do without. Raises HomeinferError, in one line, for whatever is broken.
    """
    path = Path(path)
    part = _read_part(path, 0, vocabulary)
    is_split = _split_value(part, "split.count") > 1
    return _checked(_read_split(path, part, vocabulary) if is_split else part, allow_truncated)


def read_header_bytes(data: memoryview | bytes, size: int | None = None, *, allow_truncated: bool = False) -> Header:
    """The header of one file from its first bytes; size is the whole file's, in bytes.

    Parts of a split model are not joined. Raises HomeinferError like read_header.
    """
    header = parse_file(data, len(data) if size is None else size, "", 0)
    return _checked(header, allow_truncated)


def _read_part(path: Path, index: int, vocabulary: bool) -> Header:
    with _mapped(path) as data:
        _refuse_other_formats(printable(str(path), 1000), data[:64])
        return parse_file(data, len(data), str(path), index, vocabulary=vocabulary)


def _mapped(path: Path) -> mmap.mmap:
    name = printable(str(path), 1000)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise HomeinferError(f"{name}: this is {what}; give the path of a GGUF file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise HomeinferError(f"{name}: the file is empty; download it again")
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise HomeinferError(f"{name}: there is no such file; check the path") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise HomeinferError(f"{name}: it cannot be read: {reason}; check the path and its rights") from None


def _refuse_other_formats(name: str, start: bytes) -> None:
    """Says what a file is that is no GGUF, as far as its first 64 bytes tell."""
    if start.startswith(b"GGUF"):
        return
    if start.startswith(b"version https://git-lfs"):
        problem = "this is a Git LFS pointer, not the model itself; run 'git lfs pull'"
    elif start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        problem = "this is a web page, not a model; download the GGUF file itself"
    elif start.startswith(b"PK\3\4"):
        problem = "this is a ZIP or PyTorch file; convert it to GGUF with llama.cpp's convert_hf_to_gguf.py"
    elif start[8:10] == b'{"':
        problem = "this is a safetensors file; convert it to GGUF with llama.cpp's convert_hf_to_gguf.py"
    elif _is_text(start):
        problem = "this is a text file, not a GGUF model; choose another file"
    else:
        problem = f"this is no GGUF file, it starts with {start[:4]!r}; choose another file"
    raise HomeinferError(f"{name}: {problem}")


def _is_text(start: bytes) -> bool:
    text = start.decode("utf-8", "ignore")
    lost = len(start) - len(text.encode())
    return lost < 4 and all(c.isprintable() or c in "\t\n\r\f\ufeff" for c in text)


def _read_split(path: Path, part: Header, vocabulary: bool) -> Header:
    """All parts of the split model that the given part belongs to (llama_get_list_splits)."""
    count = _split_value(part, "split.count")
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        number = _split_value(part, "split.no") + 1
        raise HomeinferError(
            f"{_name(part)}: this is part {number} of {count}, and llama.cpp finds the others by name only; "
            f"name the files NAME-00001-of-{count:05d}.gguf and so on"
        )
    parts = []
    for index in range(count):
        part_path = path.with_name(f"{match['prefix']}-{index + 1:05d}-of-{count:05d}.gguf")
        if not part_path.exists():
            raise HomeinferError(
                f"{printable(str(part_path), 1000)}: part {index + 1} of {count} is missing; "
                "put all parts into one directory"
            )
        parts.append(_checked_part(_read_part(part_path, index, vocabulary), index, count))
    return _joined(parts)


def _checked_part(part: Header, index: int, count: int) -> Header:
    for key, wanted in (("split.no", index), ("split.count", count)):
        if key not in part.metadata or _split_value(part, key) != wanted:
            found = _split_value(part, key) if key in part.metadata else "nothing"
            raise HomeinferError(
                f"{_name(part)}: key '{key}': {wanted} expected in part {index + 1} of {count}, {found} found; {_MIXED}"
            )
    return part


def _joined(parts: list[Header]) -> Header:
    seen: set[str] = set()
    for part in parts:
        for tensor in part.tensors:
            if tensor.name in seen:
                raise HomeinferError(
                    f"{_name(part)}: tensor '{printable(tensor.name)}': an earlier part has it too; {_MIXED}"
                )
            seen.add(tensor.name)
    wanted = _split_value(parts[0], "split.tensors.count")
    if len(seen) != wanted:
        raise HomeinferError(
            f"{_name(parts[0])}: key 'split.tensors.count': {wanted} tensors expected, "
            f"all parts together have {len(seen)}; {_MIXED}"
        )
    first = parts[0]
    files = tuple(part.files[0] for part in parts)
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    return Header(first.version, files, first.metadata, tensors)


def _split_value(part: Header, key: str) -> int:
    """A `split.*` number, 0 when absent; llama.cpp aborts on one of another type."""
    found = part.metadata.get(key)
    if found is None:
        return 0
    if found.type is not _SPLIT_KEYS[key] or not isinstance(found.value, int):
        raise HomeinferError(
            f"{_name(part)}: key '{key}': a {found.type.name} value, {_SPLIT_KEYS[key].name} expected; {DAMAGED}"
        )
    return found.value


def _checked(header: Header, allow_truncated: bool) -> Header:
    architecture = header.metadata.get("general.architecture")
    if architecture is None:
        raise HomeinferError(
            f"{_name(header)}: key 'general.architecture' is missing: this is no model; choose another file"
        )
    text = architecture.value
    if not isinstance(text, str) or not 0 < len(text) <= 64 or not text.isprintable():
        raise HomeinferError(f"{_name(header)}: key 'general.architecture': a short name expected; {DAMAGED}")
    if not allow_truncated:
        for index, file in enumerate(header.files):
            if file.truncated:
                _refuse_truncated(header, index, file)
    return header


def _refuse_truncated(header: Header, index: int, file: HeaderFile) -> None:
    lost = next(t for t in header.tensors if t.file == index and t.offset + t.nbytes > file.size)
    raise HomeinferError(
        f"{_path(file)}: tensor '{printable(lost.name)}': the file is cut short, it has {file.size:,} of "
        f"{file.data_offset + file.data_bytes:,} bytes; download it again"
    )


def _name(header: Header) -> str:
    return _path(header.files[0])


def _path(file: HeaderFile) -> str:
    return printable(file.path, 1000) or "GGUF header"
