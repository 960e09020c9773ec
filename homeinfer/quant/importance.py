"""How much each input channel of each weight counts, as llama.cpp's quantizer takes it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, printable
from homeinfer.quant.tensor_types import needs_imatrix

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class Importance:
    """values: mean squared input per channel, one flat float32 array per weight of n_expert * width.

    file and datasets are where it came from, chunks how many were read, as `quantize.imatrix.*` says in the written
    file; notes are for the user. A stand-in has no values of use: llama.cpp plans other types with an imatrix than
    without, and this is for plans.
    """

    values: Mapping[str, npt.NDArray[np.float32]]
    file: str = ""
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    notes: tuple[str, ...] = ()
    stand_in: bool = False


def read_importance(path: str | os.PathLike[str], header: Header) -> Importance:
    """An imatrix file for this model; HomeinferError when it is none, damaged, or another model's."""
    from homeinfer.quant.imatrix import check_matches, prepared, read_imatrix

    found = read_imatrix(path)
    notes = check_matches(found, header)
    return Importance(prepared(found), os.fspath(path), found.datasets, found.chunk_count, notes)


def gather_importance(
    header: Header,
    texts: Sequence[str | os.PathLike[str]],
    *,
    threads: int | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Importance:
    """What the model shows while it reads these texts; HomeinferError for what is wrong with them or the model."""
    from homeinfer.quant.calibrate import calibrate
    from homeinfer.quant.imatrix import prepared

    made = calibrate(header, texts, threads=threads, on_progress=on_progress)
    found = made.imatrix
    return Importance(prepared(found), "", found.datasets, found.chunk_count, made.notes)


def stand_in_importance(texts: Sequence[str | os.PathLike[str]] = ()) -> Importance:
    """What a plan takes instead of an imatrix that is still to be made, of these texts."""
    import numpy as np

    datasets = tuple(Path(text).name for text in texts)
    return Importance({"-": np.ones(1, np.float32)}, "", datasets, len(datasets), stand_in=True)


def refuse_missing(importance: Importance | None, types: Iterable[tuple[str, str]], ftype: int, what: str) -> None:
    """Raise HomeinferError when some (tensor, new type) needs an imatrix entry that is not there; ftype is the
    recipe's, what names it."""
    for name, type_name in types:
        if not needs_imatrix(name, type_name, ftype):
            continue
        if importance is not None and (importance.stand_in or name in importance.values):
            continue
        if importance is None:
            raise imatrix_needed(what)
        raise HomeinferError(
            f"{importance.file}: the imatrix has no entry for tensor '{printable(name)}', which {type_name} needs; "
            f"choose another type for it with --tensor, such as --tensor '{printable(name)}=Q4_K'"
        )


def imatrix_needed(what: str) -> HomeinferError:
    return HomeinferError(
        f"{what} needs an importance matrix (imatrix): make one with homeinfer imatrix MODEL -o FILE and give it "
        "with --imatrix FILE, or give texts with --text; the smallest recipe that needs none is Q2_K"
    )
