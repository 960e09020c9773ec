"""What devices say to get weights from each other: DEALER to ROUTER inside CURVE; a request one frame, an answer two,
the second of them the bytes."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from homeinfer.cluster.wire.control import Bytes, Count, Digest, decoded

PIECE_BYTES: Final = 256 << 10
"""What one request asks for, the last of a tensor less: small enough to leave room between for the ring's messages."""
MOST_PIECE_BYTES: Final = 1 << 20
MOST_REQUEST_BYTES: Final = 512
MOST_ANSWER_BYTES: Final = MOST_PIECE_BYTES + 512

_Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class Want(msgspec.Struct, frozen=True, array_like=True, tag="want"):
    """Bytes [offset, offset + nbytes) of a file of the model with these headers, inside one tensor or a header."""

    id: _Id
    digest: Digest
    file: Count
    offset: Bytes
    nbytes: Annotated[int, msgspec.Meta(ge=1, le=MOST_PIECE_BYTES)]


class Have(msgspec.Struct, frozen=True, array_like=True, tag="have"):
    """The bytes are the next frame."""

    id: _Id


class HaveNot(msgspec.Struct, frozen=True, array_like=True, tag="have_not"):
    """Not here, or no longer; the next frame is empty."""

    id: _Id


_encoder = msgspec.msgpack.Encoder()
_want: msgspec.msgpack.Decoder[Want] = msgspec.msgpack.Decoder(Want)
_answer: msgspec.msgpack.Decoder[Have | HaveNot] = msgspec.msgpack.Decoder(Have | HaveNot)


def encode(message: Want | Have | HaveNot) -> bytes:
    """One frame."""
    return _encoder.encode(message)


def want_of(frame: Any) -> Want:
    """Raises HomeinferError for what is no request."""
    return decoded(_want, frame, "a request for weights")


def answer_of(frame: Any) -> Have | HaveNot:
    """Raises HomeinferError for what is no answer."""
    return decoded(_answer, frame, "an answer with weights")
