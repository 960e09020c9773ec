"""The importance matrix: how large the inputs of each weight were, in llama.cpp's imatrix GGUF format.

Per weight the file has `NAME.in_sum2`, sums of squared inputs, and `NAME.counts`, how many inputs they are of
(IMatrixCollector::save_imatrix); a mixture's weights have a row for each expert.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from homeinfer.errors import HomeinferError
from homeinfer.model.parser import parse_file
from homeinfer.model.records import Header, TensorInfo, ValueType, printable
from homeinfer.quant.observe import Observed, observable
from homeinfer.quant.tensor_types import keeps_type
from homeinfer.whole_file import whole_file

Floats = npt.NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_ALIGNMENT: Final = 32
_MOST_ROWS: Final = 2.0**53
_LARGEST_MEAN: Final = 1e20
"""A mean square above this overflows float32 in llama.cpp's searches for scales; real ones stay below 1e12."""
_SMALLEST_SHARE: Final = np.float32(1e-6)
"""Of the mean of a matrix' channels. Blocks of only zeros make llama.cpp divide 0 by 0."""
_MAKE_ANOTHER: Final = "make another with homeinfer imatrix MODEL -o FILE"


class Entry(NamedTuple):
    """One weight's sums of squared inputs, float32 [n_expert, n_in], and how many inputs, float32 [n_expert].

    n_expert is 1 where one count stands for the whole weight.
    """

    in_sum2: Floats
    counts: Floats


class Imatrix(msgspec.Struct, frozen=True):
    """chunk_count chunks of chunk_size tokens of the texts `datasets`, and what they gave by weight."""

    chunk_size: int
    chunk_count: int
    datasets: tuple[str, ...]
    entries: dict[str, Entry]


def from_observed(observed: Observed, chunk_size: int, chunk_count: int, datasets: tuple[str, ...]) -> Imatrix:
    """The imatrix of observed squares, rounded to the file's float32."""
    entries = {
        name: Entry(squares.in_sum2.astype(np.float32), squares.counts.astype(np.float32))
        for name, squares in sorted(observed.squares.items())
    }
    return Imatrix(chunk_size, chunk_count, datasets, entries)


def prepared(imatrix: Imatrix) -> dict[str, Floats]:
    """Mean squares by weight, float32 [n_expert · n_in], all positive: what llama_model_imatrix_data takes.

    An expert that no token reached gets the mean of those that were reached (llama-quantize would take 1 for each
    of its channels, which weighs them all alike). Weights without any count are left out.
    """
    return {name: _means(entry) for name, entry in imatrix.entries.items() if entry.counts.any()}


def _means(entry: Entry) -> Floats:
    reached = entry.counts > 0
    pooled = entry.in_sum2.sum(axis=0, dtype=np.float64) / entry.counts.sum(dtype=np.float64)
    means = np.where(reached[:, None], entry.in_sum2 / np.where(reached, entry.counts, 1)[:, None], pooled)
    levels = means.mean(axis=1, keepdims=True, dtype=np.float64)
    floors = np.where(levels > 0, np.maximum(levels * _SMALLEST_SHARE, np.finfo(np.float32).tiny), 1)
    return np.maximum(means, floors).astype(np.float32).ravel()


def unreached(imatrix: Imatrix) -> dict[str, int]:
    """How many experts no token reached, by weight, where there are some."""
    missing = {name: int((entry.counts == 0).sum()) for name, entry in imatrix.entries.items()}
    return {name: count for name, count in missing.items() if count}


def check_matches(imatrix: Imatrix, header: Header) -> tuple[str, ...]:
    """Notes on what the imatrix lacks for this model.

    Raises HomeinferError when it is another model's: a weight that is not there, or of another width or number of
    experts.
    """
    for name, entry in imatrix.entries.items():
        tensor = header.tensor(name)
        if tensor is None:
            if " (" in name:  # llama.cpp's imatrix also has views of weights, as "NAME (reshaped)"
                continue
            raise _mismatch(f"the model has no weight {printable(name)}")
        n_in, n_mat = _width(tensor)
        if entry.in_sum2.size != n_in * n_mat or len(entry.counts) not in (1, n_mat):
            raise _mismatch(
                f"{printable(name)} has {n_mat} × {n_in:,} input channels in the model, {entry.in_sum2.size:,} with "
                f"{len(entry.counts)} counts in the imatrix"
            )
    return (*_missing_note(imatrix, header), *unreached_notes(imatrix))


def _mismatch(how: str) -> HomeinferError:
    return HomeinferError(f"this imatrix is of another model: {how}; {_MAKE_ANOTHER}")


def _width(tensor: TensorInfo) -> tuple[int, int]:
    return tensor.shape[0], math.prod(tensor.shape[2:])


def _missing_note(imatrix: Imatrix, header: Header) -> Iterator[str]:
    matrices = (header.by_name[name] for name in observable(header, output_tensor=False))
    wanted = [tensor.name for tensor in matrices if not keeps_type(tensor, header.architecture)]
    missing = [name for name in wanted if name not in imatrix.entries]
    if missing:
        few = ", ".join(map(printable, missing[:3])) + ", …" * (len(missing) > 3)
        yield f"the imatrix has no entry for {len(missing)} of {len(wanted)} weights ({few})"


def unreached_notes(imatrix: Imatrix) -> tuple[str, ...]:
    """What to tell the user about experts that the text never reached; nothing when there are none."""
    lost = unreached(imatrix)
    if not lost:
        return ()
    worst = max(lost, key=lambda name: lost[name])
    total = sum(len(imatrix.entries[name].counts) for name in lost)
    return (
        f"{sum(lost.values())} of {total} experts in {len(lost)} tensors were never reached by the text, most in "
        f"{printable(worst)} ({lost[worst]}); they get the mean of the others, more text would reach them",
    )


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """An imatrix file, checked: every count and sum finite, not negative and of a believable size.

    Raises HomeinferError for everything else, also for the older .dat format.
    """
    path = Path(path)
    name = printable(str(path), 1000)
    with _mapped(path, name) as data:
        if not data[:4].startswith(b"GGUF"):
            raise HomeinferError(
                f"{name}: this is no imatrix in GGUF format; if it is llama.cpp's older .dat, make it a GGUF with "
                f"llama-imatrix --in-file OLD.dat -o NEW.gguf, or {_MAKE_ANOTHER}"
            )
        header = parse_file(data, len(data), str(path), 0)
        if header.get("general.type") != "imatrix":
            raise HomeinferError(f"{name}: this GGUF is not an imatrix; {_MAKE_ANOTHER}")
        if header.truncated:
            raise HomeinferError(f"{name}: the imatrix is cut short; copy it again, or {_MAKE_ANOTHER}")
        try:
            return Imatrix(*_metadata(header), _entries(header, data))
        except ValueError as problem:
            raise HomeinferError(f"{name}: the imatrix is damaged: {problem}; {_MAKE_ANOTHER}") from None


def _mapped(path: Path, name: str) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or not found.st_size:
                what = "is empty" if stat.S_ISREG(found.st_mode) else "is not a regular file"
                raise HomeinferError(f"{name}: this {what}; give an imatrix file")
            return mmap.mmap(file.fileno(), found.st_size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise HomeinferError(f"{name}: the imatrix cannot be read: {reason}; check the path") from None


def _metadata(header: Header) -> tuple[int, int, tuple[str, ...]]:
    """chunk_size, chunk_count, datasets; llama-quantize refuses files without any of them."""
    numbers = []
    for key in ("imatrix.chunk_size", "imatrix.chunk_count"):
        found = header.metadata.get(key)
        if found is None or found.type is not ValueType.UINT32 or not isinstance(found.value, int):
            raise ValueError(f"key '{key}' is missing or no UINT32")
        numbers.append(found.value)
    datasets = header.metadata.get("imatrix.datasets")
    if datasets is None or datasets.item is not ValueType.STRING or not isinstance(datasets.value, list):
        raise ValueError("key 'imatrix.datasets' is missing or no list of strings")
    return numbers[0], numbers[1], tuple(map(str, datasets.value))


def _entries(header: Header, data: mmap.mmap) -> dict[str, Entry]:
    entries = {}
    for tensor in header.tensors:
        weight, suffix = _split_name(tensor)
        if suffix == _COUNTS:
            if header.tensor(weight + _SUMS) is None:
                raise ValueError(f"{printable(weight)} has counts and no sums")
            continue
        counts = header.tensor(weight + _COUNTS)
        if counts is None:
            raise ValueError(f"{printable(weight)} has sums and no counts")
        if tensor.n_weights % counts.n_weights:
            raise ValueError(f"{printable(weight)} has {counts.n_weights} counts for {tensor.n_weights} sums")
        entry = Entry(_array(tensor, data).reshape(counts.n_weights, -1), _array(counts, data))
        _check_entry(weight, entry)
        entries[weight] = entry
    if not entries:
        raise ValueError("it has no entry")
    return entries


def _split_name(tensor: TensorInfo) -> tuple[str, str]:
    for suffix in (_SUMS, _COUNTS):
        if tensor.name.endswith(suffix) and len(tensor.name) > len(suffix) and tensor.type == "F32":
            return tensor.name.removesuffix(suffix), suffix
    raise ValueError(f"tensor {printable(tensor.name)} ({tensor.type}) is neither sums nor counts in F32")


def _array(tensor: TensorInfo, data: mmap.mmap) -> Floats:
    return np.frombuffer(data[tensor.offset : tensor.offset + tensor.nbytes], "<f4").astype(np.float32)


def _check_entry(weight: str, entry: Entry) -> None:
    name = printable(weight)
    for what, values in (("sums", entry.in_sum2), ("counts", entry.counts)):
        if not np.isfinite(values).all() or values.min() < 0:
            raise ValueError(f"the {what} of {name} hold NaN, Inf or a negative number")
    if (entry.counts != np.rint(entry.counts)).any() or entry.counts.max() > _MOST_ROWS:
        raise ValueError(f"the counts of {name} are not whole numbers of a believable size")
    if (entry.in_sum2.max(axis=1) > _LARGEST_MEAN * np.maximum(entry.counts, 1)).any():
        raise ValueError(f"the sums of {name} are larger than any model's inputs")


def write_imatrix(path: str | os.PathLike[str], imatrix: Imatrix) -> None:
    """Write the file that llama-quantize --imatrix reads, atomically: whole, or not at all.

    Raises HomeinferError when it can't be written, and for an imatrix without entries.
    """
    target = Path(os.path.realpath(path))
    if not imatrix.entries:
        raise HomeinferError(
            f"{printable(str(path), 1000)}: the text reached no weight of this model: nothing to write"
        )
    try:
        with whole_file(target) as file:
            file.writelines(_file_parts(imatrix))
    except OSError as error:
        name = printable(str(path), 1000)
        raise HomeinferError(f"{name}: the imatrix can't be written: {error.strerror}; try another folder") from None


def _file_parts(imatrix: Imatrix) -> Iterator[bytes]:
    tensors: dict[str, Floats] = {}
    for name, entry in sorted(imatrix.entries.items()):
        tensors[name + _SUMS] = entry.in_sum2
        tensors[name + _COUNTS] = entry.counts[:, None]
    head = _head(imatrix, tensors)
    yield head + bytes(-len(head) % _ALIGNMENT)
    for array in tensors.values():
        data = array.astype("<f4").tobytes()
        yield data + bytes(-len(data) % _ALIGNMENT)


def _head(imatrix: Imatrix, tensors: Mapping[str, Floats]) -> bytes:
    keys = [
        _string("general.type") + struct.pack("<I", ValueType.STRING) + _string("imatrix"),
        _string("imatrix.datasets")
        + struct.pack("<IIQ", ValueType.ARRAY, ValueType.STRING, len(imatrix.datasets))
        + b"".join(map(_string, imatrix.datasets)),
        _string("imatrix.chunk_count") + struct.pack("<II", ValueType.UINT32, imatrix.chunk_count),
        _string("imatrix.chunk_size") + struct.pack("<II", ValueType.UINT32, imatrix.chunk_size),
    ]
    table, offset = [], 0
    for name, array in tensors.items():
        rows, width = array.shape
        table.append(_string(name) + struct.pack("<IQQIQ", 2, width, rows, 0, offset))
        offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return b"".join([struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys)), *keys, *table])


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data
