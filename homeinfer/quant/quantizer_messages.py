"""What the quantizer's process and its parent say to each other, one JSON line each; worker.py has the order."""

from __future__ import annotations

import msgspec

GO = b"go\n"


class Request(msgspec.Struct, frozen=True):
    """What to quantize. Paths are the file system's bytes; overrides are (regular expression, ggml_type),
    the first that matches a tensor's name decides; metadata is set beside what the source says; imatrix are
    (weight, number of values) in the order in which the values follow."""

    source: bytes
    output: bytes
    ftype: int
    copy: bool
    requantize: bool
    threads: int
    overrides: tuple[tuple[str, int], ...]
    metadata: dict[str, str | int]
    imatrix: tuple[tuple[str, int], ...] = ()


class Planned(msgspec.Struct, frozen=True, tag="planned"):
    """What llama.cpp is going to write: (tensor, type) in its order, and (tensor, type that its rows
    do not fit) for those that get another type than their recipe's."""

    types: tuple[tuple[str, str], ...]
    misfits: tuple[tuple[str, str], ...]
    needs_imatrix: bool


class Started(msgspec.Struct, frozen=True, tag="started"):
    """Tensor number `index` of `count`, from 1, is being quantized."""

    index: int
    count: int
    name: str


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The output is complete."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """llama.cpp's reason, one line, and the tensor that it was at, empty before the first."""

    reason: str
    tensor: str = ""


Message = Planned | Started | Finished | Failed
