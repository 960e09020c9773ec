"""The text that a model wrote, kept as a .npy file: int32 [n_sequences, length]."""

from __future__ import annotations

import tokenize
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from homeinfer.errors import HomeinferError
from homeinfer.model.header import printable
from homeinfer.whole_file import whole_file

Ints = npt.NDArray[np.int32]


def read_generated(path: Path, n_sequences: int, length: int, n_vocab: int) -> list[Ints] | None:
    """The kept sequences, at most so many and so long; None for a file that isn't there, is damaged or of others."""
    try:
        # mapped: a damaged shape must not ask for memory before the file's size is checked against it
        mapped = np.lib.format.open_memmap(path, mode="r")
        if mapped.dtype != np.int32 or mapped.ndim != 2 or not mapped.size:
            return None
        if mapped.shape[0] > n_sequences or mapped.shape[1] > length or path.stat().st_size != _bytes(mapped):
            return None
        texts = np.array(mapped, np.int32)
    except (
        OSError,
        ValueError,
        SyntaxError,
        TypeError,
        OverflowError,
        tokenize.TokenError,
    ):  # numpy, of a damaged head
        return None
    return list(texts) if texts.min() >= 0 and texts.max() < n_vocab else None


def _bytes(mapped: np.memmap[tuple[int, ...], np.dtype[np.int32]]) -> int:
    return mapped.offset + mapped.nbytes


def write_generated(path: Path, texts: Sequence[Ints]) -> None:
    """Keep sequences (int32, all of one length), whole or not at all. Raises HomeinferError when it can't be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            np.save(file, np.array(texts, np.int32), allow_pickle=False)
    except OSError as problem:
        raise HomeinferError(
            f"{printable(str(path), 1000)}: cannot be written: {problem.strerror}; free some space, or set "
            "HOMEINFER_KEPT to another folder"
        ) from None
