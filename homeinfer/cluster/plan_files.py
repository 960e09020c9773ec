"""Files beside a plan: which model it is for, and the picture of a token."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from homeinfer.cluster.planning.report import PlannedModel
from homeinfer.errors import HomeinferError
from homeinfer.model.cut_rules import n_layers
from homeinfer.model.header import Header, printable
from homeinfer.whole_file import whole_file

_PART = re.compile(r"-\d{5}-of-\d{5}$")


def planned_model(header: Header) -> PlannedModel:
    """What a plan says of its model; reads the headers again for their digest. Raises HomeinferError when gone."""
    files = tuple(printable(Path(file.path).name) for file in header.files)
    return PlannedModel(
        name=_PART.sub("", Path(files[0]).stem),
        files=files,
        digest=header_digest(header),
        architecture=printable(header.architecture),
        n_layer=n_layers(header),
        nbytes=header.nbytes,
    )


def header_digest(header: Header) -> str:
    """SHA-256 of everything before the tensors' data, all parts one after the other."""
    digest = hashlib.sha256()
    for file in header.files:
        try:
            with Path(file.path).open("rb") as opened:
                digest.update(opened.read(file.data_offset))
        except OSError as error:
            raise HomeinferError(
                f"{printable(file.path, 1000)} can't be read any more: {error.strerror}; check the path"
            ) from None
    return digest.hexdigest()


def check_writable(path: Path) -> None:
    """Raises HomeinferError for what is plain before any work: a directory, or a file in none."""
    name = printable(str(path), 1000)
    if path.is_dir():
        raise HomeinferError(f"{name}: this is a directory; name a file")
    if not path.parent.is_dir():
        raise HomeinferError(f"{name}: it can't be written: there is no such folder; make it first")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises HomeinferError where that can't be."""
    check_writable(path)
    name = printable(str(path), 1000)
    try:
        with whole_file(Path(os.path.realpath(path))) as file:
            file.write(text.encode())
    except OSError as error:
        raise HomeinferError(f"{name}: it can't be written: {error.strerror}; check the path and its disk") from None
