"""A plan: who holds which layers where, and what it is predicted to do. Pure data."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

Objective = Literal["latency", "throughput", "ttft"]
Wire = Literal["f32", "f16", "bf16", "q8"]
LayerPlace = Literal["r", "s", "g"]
"""resident in memory, streamed from disk (mapped, prefetched, released), on a GPU."""

_RUN = re.compile(r"(.)\1*")


class Workload(msgspec.Struct, frozen=True):
    """What the ring is for.

    n_ctx: positions of each sequence, for which memory is kept. sequences: answers at the same time.
    prompt_tokens: what TTFT is predicted for; TPOT is predicted behind such a prompt. headroom: the share of each
    device's memory that stays free for the user's other programs. kv_type: ggml's name of the KV cache's type.
    """

    n_ctx: Annotated[int, msgspec.Meta(ge=1)] = 4096
    sequences: Annotated[int, msgspec.Meta(ge=1)] = 1
    prompt_tokens: Annotated[int, msgspec.Meta(ge=1)] = 512
    n_batch: Annotated[int, msgspec.Meta(ge=1)] = 512
    kv_type: str = "f16"
    wire: Wire = "f32"
    headroom: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.1
    objective: Objective = "latency"


class Constraints(msgspec.Struct, frozen=True):
    """What a user demands. head: the device where the user is, "" for the first profile. private_first and
    private_last: so many layers at either end stay on the head, so that no other device sees text (at least 1).
    rounds: how often a token goes around: each device has so many windows, the head one more, the last; 0: as it is
    best. The head alone has one window, whatever is asked for."""

    head: str = ""
    required: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    private_first: Annotated[int, msgspec.Meta(ge=1)] = 1
    private_last: Annotated[int, msgspec.Meta(ge=1)] = 1
    rounds: Annotated[int, msgspec.Meta(ge=0)] = 0


class Window(msgspec.Struct, frozen=True):
    """Layers [first, last) on a device, in ring order; `places` has one letter for each (LayerPlace).

    Neighbouring layers in the same place are loaded as one llama.cpp model (`runs`); two windows of one device
    next to each other are one. gpu: which GPU the g layers are on.
    """

    device: str
    first: int
    last: int
    places: str
    gpu: int = 0

    def runs(self) -> tuple[tuple[int, int, str], ...]:
        """(first, last, place) of neighbouring layers in the same place."""
        first = self.first
        return tuple((first + run.start(), first + run.end(), run[1]) for run in _RUN.finditer(self.places))


class Ring(msgspec.Struct, frozen=True):
    """Windows that hold every layer once, in order; the first and the last are the head's."""

    windows: tuple[Window, ...]


class Cause(msgspec.Struct, frozen=True):
    """Milliseconds of one token by cause, which add up to the TPOT. disk: waiting for it; overhead: preparing steps,
    receiving, sending and waking up."""

    compute_ms: float = 0.0
    disk_ms: float = 0.0
    network_ms: float = 0.0
    overhead_ms: float = 0.0


class DeviceLoad(msgspec.Struct, frozen=True):
    """A device's part of a token. memory_bytes: what homeinfer takes at its peak, memory_free_bytes: what is left of
    the profile's memory then. stream_buffer_bytes: room for streamed layers (part of memory_bytes).
    read_bytes: from disk per token. gpu_bytes: on each GPU."""

    name: str
    cause: Cause
    memory_bytes: int
    memory_free_bytes: int
    stream_buffer_bytes: int = 0
    read_bytes: int = 0
    gpu_bytes: tuple[int, ...] = ()


class Span(msgspec.Struct, frozen=True):
    """Something that happens while one token goes around: for the timeline. Milliseconds from the token's start;
    what was prefetched for it may begin before 0."""

    device: str
    what: Literal["compute", "read", "send", "wait"]
    begin_ms: float
    end_ms: float
    label: str


class Prediction(msgspec.Struct, frozen=True):
    """What the simulator says. tokens_per_s: of all sequences together; tpot_ms: of each of them."""

    tpot_ms: float
    ttft_ms: float
    tokens_per_s: float
    cause: Cause
    loads: tuple[DeviceLoad, ...]
    timeline: tuple[Span, ...] = ()
