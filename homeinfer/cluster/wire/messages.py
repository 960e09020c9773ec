"""The messages of the ring: one small header, then frames of plain numbers.

Nothing in a header decides an allocation: receivers compare it with the plan they were given and with the
length of the frames that are already there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from homeinfer.engine.pipeline import Batch, Flags, Floats, Ints, KvEdit
from homeinfer.errors import HomeinferError

PROTOCOL = 1

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]


class Spent(msgspec.Struct, frozen=True, array_like=True):
    """What a step cost one window, microseconds: inside llama_decode, and in all from message in to message out."""

    computing: float
    holding: float


class Step(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """n tokens on their way: hop is the window they are for. Frames: positions and sequences (int32 [n] each),
    wanted (uint8 [n]); then tokens (int32 [n], width 0), hidden states (float32 [n, width]) or, back
    at the head, logits (float32 [wanted, width]). spent: one entry for each window it has passed."""

    epoch: int
    step: int
    hop: _Count
    n: _Count
    width: _Count
    spent: tuple[Spent, ...] = ()


class Edits(msgspec.Struct, frozen=True, array_like=True, tag="edits"):
    """Changes of the memory, applied by every window in the order of the stream."""

    epoch: int
    step: int
    hop: _Count
    edits: tuple[KvEdit, ...]


class Failure(msgspec.Struct, frozen=True, array_like=True, tag="failure"):
    """A step that a device could not do; it goes on around the ring to the head."""

    epoch: int
    step: int
    hop: _Count
    device: str
    message: str


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """The ring ends: each device passes it on and leaves."""

    epoch: int
    hop: _Count


Message = Step | Edits | Failure | Stop
Frames = Sequence[Any]

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


class Payload(msgspec.Struct, frozen=True, eq=False):
    """What a Step carries: rows are int32 [n] or float32 [n or wanted, width]."""

    positions: Ints
    sequences: Ints
    wanted: Flags
    rows: npt.NDArray[Any]


def encode(message: Message, payload: Payload | None = None) -> list[Any]:
    """Frames for send_multipart; arrays go as they are."""
    frames: list[Any] = [_encoder.encode(message)]
    if payload is not None:
        index = np.concatenate((payload.positions, payload.sequences))
        frames += [
            index.data.cast("B"),
            payload.wanted.view(np.uint8).data,
            np.ascontiguousarray(payload.rows).data.cast("B") if payload.rows.size else b"",
        ]
    return frames


def decode(frames: Frames) -> tuple[Message, Payload | None]:
    """The message and its arrays, which view the frames. Raises HomeinferError for what is no message."""
    try:
        message = _decoder.decode(_bytes(frames[0]))
        if not isinstance(message, Step):
            return message, None
        return message, _payload(message, [_bytes(f) for f in frames[1:]])
    except (msgspec.MsgspecError, ValueError, IndexError, TypeError) as problem:
        raise HomeinferError(f"a message of the ring can't be read: {problem}") from problem


def _bytes(frame: Any) -> memoryview:
    return memoryview(getattr(frame, "buffer", frame))


def _payload(step: Step, frames: list[memoryview]) -> Payload:
    index, flags, rows = frames
    both = np.frombuffer(index, np.int32)
    wanted = np.frombuffer(flags, np.bool_)
    if len(both) != 2 * step.n or len(wanted) != step.n:
        raise ValueError("frames and header differ")
    if step.width == 0:
        values: npt.NDArray[Any] = np.frombuffer(rows, np.int32)
        if len(values) != step.n:
            raise ValueError("frames and header differ")
    else:
        values = np.frombuffer(rows, np.float32).reshape(-1, step.width)
    return Payload(both[: step.n], both[step.n :], wanted, values)


def first_payload(batch: Batch) -> Payload:
    """What the head sends to the first window."""
    return Payload(batch.positions, batch.sequences, batch.wanted, batch.tokens)


def logits_of(payload: Payload) -> Floats:
    """The rows that came back, copied out of the message."""
    return np.array(payload.rows, np.float32)
