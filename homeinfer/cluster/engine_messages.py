"""What an engine process and its supervisor say to each other, one JSON object a line (stdin, stdout)."""

from __future__ import annotations

import msgspec

from homeinfer.cluster.wire.transport import Keys, Peer
from homeinfer.engine.window import WindowSpec


class Setup(msgspec.Struct, frozen=True, tag="setup"):
    """First line to the engine: who it is, where it listens, what it loads. vocabulary: a file with the model's
    tokens, for grammars, where the last window is. stream_bytes: memory for the weights of windows that are not
    resident; 0 leaves them to the page cache."""

    name: str
    epoch: int
    listen: str
    windows: tuple[WindowSpec, ...]
    keys: Keys | None = None
    vocabulary: str = ""
    stream_bytes: int = 0


class Hop(msgspec.Struct, frozen=True):
    """Messages for window number `hop` of the ring are for window `window` of this engine; what comes
    out goes to `next`, as hop + 1, or stays here for the next window where that is None."""

    hop: int
    window: int
    next: Peer | None


class Routes(msgspec.Struct, frozen=True, tag="routes"):
    """Second line to the engine, when every engine listens.

    n_hops: windows in the ring, of which the engine with the last one writes answers, for the head, and starts
    its steps at `first` (None: here).
    """

    hops: tuple[Hop, ...]
    n_hops: int
    head: Peer
    first: Peer | None


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


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """A sign of life, every BEAT_SECONDS, also while the engine computes."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine can't go on; it leaves after this line."""

    message: str


FromEngine = Listening | Loading | Ready | Beat | Failed
BEAT_SECONDS = 2.0
