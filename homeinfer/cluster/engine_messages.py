"""What an engine process and its supervisor say to each other, one JSON object a line (stdin, stdout)."""

from __future__ import annotations

from typing import Annotated

import msgspec

from homeinfer.cluster.planning.plan import Wire
from homeinfer.cluster.wire.peers import Keys, Peer
from homeinfer.engine.window_spec import WindowSpec

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]


class Setup(msgspec.Struct, frozen=True, tag="setup"):
    """First line to the engine: who it is, where it listens, what it loads, which it begins at once.

    vocabulary: a file with the model's tokens, for grammars, where the last window is. stream_bytes: memory for the
    weights of windows that are not resident; 0 leaves them to the page cache. wire: how hidden states go from device
    to device, the same on all of a ring. keys.allowed: who may send until the first Routes come.
    """

    name: str
    listen: str
    windows: tuple[WindowSpec, ...]
    keys: Keys | None = None
    vocabulary: str = ""
    stream_bytes: int = 0
    wire: Wire = "f32"


class Hop(msgspec.Struct, frozen=True):
    """Messages for window number `hop` of the ring are for window `window` of this engine; what comes
    out goes to `next`, as hop + 1, or stays here for the next window where that is None."""

    hop: int
    window: int
    next: Peer | None


class Pace(msgspec.Struct, frozen=True):
    """How the engine with the last window feeds the ring; 0 leaves a number to it.

    chunk: tokens of a prompt in one step. ahead: such steps under way at once. groups: most decode steps under way at
    once, each with its share of the sequences; whether so many or one are faster is found out while it runs. replay:
    engine.scheduler.Limits. gather_ms: tokens that follow each other faster are told together, so that the head and
    its clients need not wake up for each while this device computes the next.
    """

    chunk: _Count = 0
    ahead: _Count = 0
    groups: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0
    replay: _Count = 0
    gather_ms: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 0.0


class Routes(msgspec.Struct, frozen=True, tag="routes"):
    """Further lines to the engine, at any time, also while it loads: where messages go in this epoch. Whatever was
    under way is dropped and the memory of all sequences emptied; answered by Joined, after Ready.

    n_hops: windows in the ring, of which the engine with the last one writes answers, for the head, and starts
    its steps at `first` (None: here). allowed: public keys of those who may send to this engine from now on; not
    asked where it listens at a file.
    """

    epoch: int
    hops: tuple[Hop, ...]
    n_hops: int
    head: Peer
    first: Peer | None
    allowed: tuple[str, ...] = ()
    pace: Pace = Pace()


class Listening(msgspec.Struct, frozen=True, tag="listening"):
    """The engine's address."""

    address: str


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """Share of the weights that is loaded, 0 to 1."""

    share: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """All windows are loaded; n_vocab is the last one's."""

    n_vocab: int
    can_shift: bool


class Joined(msgspec.Struct, frozen=True, tag="joined"):
    """The Routes of this epoch are in force and the memory is empty."""

    epoch: int


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """A sign of life, every BEAT_SECONDS, also while the engine computes."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine can't go on; it leaves after this line."""

    message: str


FromEngine = Listening | Loading | Ready | Joined | Beat | Failed
BEAT_SECONDS = 2.0
