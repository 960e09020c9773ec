"""The tokens that a model reads while its weights are observed."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from homeinfer.errors import HomeinferError
from homeinfer.model.header import printable

Ints = npt.NDArray[np.int32]

DEFAULT_NAME = "Python's help topics and modules"

_LARGEST = 256 << 20
_TOPICS_CHARACTERS = 60_000
_MODULE_CHARACTERS = 5_000
_MODULES = (
    "subprocess", "ast", "statistics", "random", "csv", "datetime", "logging", "http.client", "collections", "shutil",
    "typing", "ipaddress",
)  # fmt: skip
_HELD_OUT_TOPICS = 150_000
_HELD_OUT_MODULES = ("argparse", "textwrap", "zipfile")


def read_texts(paths: Sequence[str | os.PathLike[str]]) -> str:
    """The texts of these UTF-8 files, joined by blank lines.

    Raises HomeinferError for one that can't be read, is empty, not UTF-8, or larger than 256 MiB.
    """
    return "\n\n".join(_read_text(Path(path)) for path in paths)


def _read_text(path: Path) -> str:
    name = printable(str(path), 1000)
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise HomeinferError(f"{name}: the text can't be read: {error.strerror}; check the path") from None
    if len(data) > _LARGEST:
        raise HomeinferError(f"{name}: a text of more than {_LARGEST >> 20} MiB; a few MB are more than enough")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HomeinferError(
            f"{name}: byte {error.start:,} is not UTF-8: this is no text, or in another encoding; save it as UTF-8"
        ) from None
    if not text.strip():
        raise HomeinferError(f"{name}: the text is empty; give another one")
    return text


def chunks_of(tokens: Ints, size: int, begin: int | None = None) -> list[Ints]:
    """Whole chunks of `size` tokens, int32 [size] each; what is left over is dropped, unless it is all there is.

    `begin`, where the model wants a token before every text, takes the place of each chunk's first token, as in
    tools/imatrix and llama-perplexity. Raises HomeinferError when there are no tokens.
    """
    if not len(tokens):
        raise HomeinferError("the text has no tokens; give another one")
    whole = max(len(tokens) // size, 1)
    chunks = [np.array(tokens[i * size : (i + 1) * size], np.int32) for i in range(whole)]
    if begin is not None:
        for chunk in chunks:
            chunk[0] = begin
    return chunks


def default_text() -> str:
    """English and code that every Python brings: its help topics and the start of some of its modules.

    For an imatrix, text that the model itself generated and random tokens were measured as well: on padded SmolLM2
    (135M, Q3_K_M, mean KLD on English, code and chat of other origin) all are within 8 % and none is the best
    everywhere, while without an imatrix KLD is 55 to 85 % higher. This one takes no time. Hessian-aware rounding
    depends more on its text: there the model's own is added (self_text.py). Raises HomeinferError for a Python that
    brings neither.
    """
    parts = [text for text in (_help_topics(), *map(_source, _MODULES)) if text]
    if not parts:
        raise HomeinferError("this Python has neither its help topics nor its source: give a text with --text")
    return "\n\n".join(parts)


def held_out_text() -> tuple[str, str]:
    """English and code that `default_text` has none of, and what to call it: what a result is measured on.

    Raises HomeinferError for a Python that brings neither.
    """
    modules = [text for text in map(_source, _HELD_OUT_MODULES) if text]
    parts = [_all_topics()[_HELD_OUT_TOPICS : _HELD_OUT_TOPICS + _TOPICS_CHARACTERS // 4], *modules]
    if not any(parts):
        raise HomeinferError("this Python has neither its help topics nor its source to measure on")
    return "\n\n".join(parts), "other help topics and modules of Python"


def _help_topics() -> str:
    return _all_topics()[:_TOPICS_CHARACTERS]


def _all_topics() -> str:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return ""
    return "\n\n".join(topics[name] for name in sorted(topics))


def _source(module: str) -> str:
    """The start of a module's source; nothing where only its byte code is there."""
    try:
        found = importlib.util.find_spec(module)
        return Path(found.origin).read_text(encoding="utf-8")[:_MODULE_CHARACTERS] if found and found.origin else ""
    except (ImportError, OSError, ValueError):
        return ""
