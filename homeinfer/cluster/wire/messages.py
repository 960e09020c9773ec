"""The messages of the ring: one small header, then the rows as plain numbers.

Nothing in a header decides an allocation: receivers compare it with the plan they were given and with the
length of the frames that are already there.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from homeinfer.engine.edits import KvEdit
from homeinfer.engine.request import Finish, Request
from homeinfer.errors import HomeinferError

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]


class Spent(msgspec.Struct, frozen=True, array_like=True):
    """What a step cost one window, microseconds: inside llama_decode, and in all from message in to message out."""

    computing: float
    holding: float


class Step(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """n tokens on their way: hop is the window they are for. step: negative numbers, downwards, are the steps of the
    engine that writes answers, positive ones, upwards, the head's own; one that is not new is dropped.

    index: positions and sequences (int32 [n] each), then wanted (uint8 [n]). Its rows: tokens (int32 [n],
    width 0), hidden states (n rows of width numbers, homeinfer.cluster.wire.rows) or, behind the last window, logits
    (float32 [wanted, width]). spent: one entry for each window it has passed.
    """

    epoch: int
    step: int
    hop: _Count
    n: _Count
    width: _Count
    index: bytes
    spent: tuple[Spent, ...] = ()


class Ask(msgspec.Struct, frozen=True, array_like=True, tag="ask"):
    """A prompt for the device that holds the last window; its rows: tokens (int32 [n]).

    can_shift: whether every window's memory can be edited in part.
    """

    epoch: int
    step: int
    hop: _Count
    n: _Count
    request: Request
    can_shift: bool


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """The answer to `step` need not go on."""

    epoch: int
    step: int
    hop: _Count


class Prefilled(msgspec.Struct, frozen=True, array_like=True, tag="prefilled"):
    """So many tokens of the prompt of `step` have gone through all windows, what was in memory included."""

    epoch: int
    step: int
    hop: _Count
    done: _Count


class Told(msgspec.Struct, frozen=True, array_like=True, tag="told"):
    """One token of the answer to `step`. spent: what it cost each window; choosing: microseconds of the sampler."""

    epoch: int
    step: int
    hop: _Count
    token: _Count
    spent: tuple[Spent, ...]
    choosing: float


class Finished(msgspec.Struct, frozen=True, array_like=True, tag="finished"):
    """The answer to `step` is whole."""

    epoch: int
    step: int
    hop: _Count
    finish: Finish


class Edits(msgspec.Struct, frozen=True, array_like=True, tag="edits"):
    """Changes of the memory, applied by every window in the order of the stream."""

    epoch: int
    step: int
    hop: _Count
    edits: tuple[KvEdit, ...]


class Failure(msgspec.Struct, frozen=True, array_like=True, tag="failure"):
    """A step that a device could not do; it goes on around the ring to where it came from. culprit: the number of the
    window whose output was at fault, where that is known."""

    epoch: int
    step: int
    hop: _Count
    device: str
    message: str
    culprit: int | None = None


class News(msgspec.Struct, frozen=True, array_like=True, tag="news"):
    """What the writer of answers has to say, in its order: one message costs its receiver less than many. step and hop
    are 0."""

    epoch: int
    step: int
    hop: _Count
    items: tuple[Prefilled | Told | Finished | Failure, ...]


Message = Step | Edits | Ask | Cancel | Prefilled | Told | Finished | Failure | News
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


_LENGTH = struct.Struct("<I")
_SPLIT = 1 << 31
_SMALL = 1 << 16
"""Rows up to this size travel in the header's frame: one frame costs half of two, and a copy of 64 kB nothing."""


def encode(message: Message, rows: Any = b"") -> list[Any]:
    """Frames to send, one or two.

    The first: the header's length (highest bit: the rows are a second frame), the header, zeros up to a
    multiple of 16, then the rows (anything with a buffer) unless they are large.
    """
    header = _encoder.encode(message)
    padding = b"\0" * (-(_LENGTH.size + len(header)) % 16)
    rows = memoryview(rows)
    if rows.nbytes <= _SMALL:
        return [b"".join((_LENGTH.pack(len(header)), header, padding, rows))]
    return [b"".join((_LENGTH.pack(len(header) | _SPLIT), header, padding)), rows]


def is_split(first: bytes) -> bool:
    """Whether a message's first frame says that its rows are a second one."""
    return len(first) >= _LENGTH.size and first[3] & 0x80 != 0


def decode(frames: Sequence[Any]) -> tuple[Message, memoryview]:
    """The message and its rows. Raises HomeinferError for what is no message."""
    try:
        first = memoryview(frames[0])
        (length,) = _LENGTH.unpack_from(first)
        end = _LENGTH.size + (length & ~_SPLIT)
        message = _decoder.decode(first[_LENGTH.size : end])
    except (
        msgspec.MsgspecError,
        struct.error,
        IndexError,
        UnicodeDecodeError,
        RecursionError,
        OverflowError,
    ) as problem:
        raise HomeinferError(f"a message of the ring can't be read: {problem}") from problem
    return message, memoryview(frames[1]) if len(frames) > 1 else first[end + -end % 16 :]
