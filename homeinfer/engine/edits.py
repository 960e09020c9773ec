"""Changes of a memory that keeps what a model has read (KV cache)."""

from __future__ import annotations

import msgspec


class Remove(msgspec.Struct, frozen=True, tag="remove"):
    """Forget positions [start, end) of a sequence; end -1: to the end (llama_memory_seq_rm)."""

    sequence: int
    start: int = 0
    end: int = -1


class Keep(msgspec.Struct, frozen=True, tag="keep"):
    """Forget every other sequence."""

    sequence: int


class Copy(msgspec.Struct, frozen=True, tag="copy"):
    """Give all of `sequence` to `target` as well (llama_memory_seq_cp; of parts, [start, end), llama.cpp can't)."""

    sequence: int
    target: int
    start: int = 0
    end: int = -1


class Shift(msgspec.Struct, frozen=True, tag="shift"):
    """Add `delta` to the positions [start, end) of a sequence (llama_memory_seq_add).

    Positions that a Copy shares with another sequence move there too: shift before copying.
    """

    sequence: int
    start: int
    end: int
    delta: int


KvEdit = Remove | Keep | Copy | Shift
