"""What `homeinfer profile` and the process that runs llama.cpp for it say to each other, one JSON object a line."""

from __future__ import annotations

import msgspec

from homeinfer.cluster.planning.profile import Gpu, Place


class Fill(msgspec.Struct, frozen=True, tag="fill"):
    """Fill a shadow's file with weights."""

    path: str


class TimeWindow(msgspec.Struct, frozen=True, tag="time"):
    """Load a shadow's file and time steps of 1, 8 and 512 tokens.

    is_last: logits come out. seconds: what the whole may take, roughly, and patience: how much more where others keep
    the machine busy. flush_bytes: read between steps, so that no weights are left in the processor's cache, as in a
    model that is larger than it. prefill_tokens: of a prompt at most, 0 for no prompt. position: how many tokens there
    are before those that are timed.
    """

    path: str
    layers: int
    n_embd: int
    nbytes: int
    is_last: bool
    place: Place
    n_threads: int
    flush_bytes: int
    seconds: float
    patience: float = 0.0
    gpu: int = 0
    prefill_tokens: int = 512
    position: int = 0


class Echo(msgspec.Struct, frozen=True, tag="echo"):
    """Send `count` messages back that come from `address`, as an engine would, to time what a hop costs."""

    listen: str
    peer: str
    count: int


class TimeStream(msgspec.Struct, frozen=True, tag="stream"):
    """Load a shadow's file with far less memory than its weights need, and say how fast they come while it decodes."""

    path: str
    layers: int
    n_embd: int
    n_threads: int
    seconds: float


class StreamTimed(msgspec.Struct, frozen=True, tag="stream_timed"):
    """Bytes per second; 0 where nothing had to be read."""

    bytes_per_s: float


class Filled(msgspec.Struct, frozen=True, tag="filled"):
    """It was done."""


class Timed(msgspec.Struct, frozen=True, tag="timed"):
    """Milliseconds of each step.

    prefill_tokens: how many tokens a prefill had, fewer than 512 where that takes long. is_disturbed: others were busy
    all the time; extra_seconds: what was taken of the patience. private_bytes: what the process holds now that it
    shares with no other.
    """

    decode_1: tuple[float, ...]
    decode_8: tuple[float, ...]
    prefill: tuple[float, ...]
    prefill_tokens: int
    is_finite: bool
    is_disturbed: bool
    extra_seconds: float
    private_bytes: int


class ListGpus(msgspec.Struct, frozen=True, tag="gpus"):
    """Ask ggml for its devices."""


class GpuList(msgspec.Struct, frozen=True, tag="gpu_list"):
    """ggml's devices that are no CPU."""

    gpus: tuple[Gpu, ...]


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """It can't be done; the process goes on."""

    message: str


ToTimer = Fill | TimeWindow | TimeStream | ListGpus | Echo
FromTimer = Filled | Timed | StreamTimed | GpuList | Refused
