"""What agents and the coordinator say to each other: DEALER to ROUTER, msgpack, every one inside CURVE.

The first two messages, Hello and Refuse, never change, so that homeinfers of different versions can tell each other so.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from homeinfer.cluster.planning.plan import LayerPlace, Wire
from homeinfer.cluster.planning.profile import DeviceProfile, Link
from homeinfer.errors import HomeinferError

PROTOCOL = 1
BEAT_SECONDS = 1.0
LOST_SECONDS = 6.0
"""A device or head that said nothing for so long is taken for gone."""
MOST_BYTES = 16 << 20
"""No control message is larger."""
MOST_FROM_AGENT = 2 << 20
"""Nor one of an agent than this: the longest says which tensors it holds, some bytes for each."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Text = Annotated[str, msgspec.Meta(max_length=2000)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Key = Annotated[str, msgspec.Meta(min_length=40, max_length=40)]
"""A CURVE public key, Z85."""
Address = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
"""A host's name or IP address, without port."""
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Epoch = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Task = Literal["measure", "fetch", "check", "cut", "load"]


class ModelFile(msgspec.Struct, frozen=True):
    """One part of a model. header_bytes: everything before the tensors' data; digest: SHA-256 of those bytes."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=r"^[^/\\\0]+$")]
    nbytes: Bytes
    header_bytes: Bytes
    digest: Digest


class ModelTensor(msgspec.Struct, frozen=True, array_like=True):
    """Where a tensor's data are in the model's files, and their SHA-256."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    file: Count
    offset: Bytes
    nbytes: Bytes
    digest: Digest


class Manifest(msgspec.Struct, frozen=True):
    """A model as devices exchange it. digest: report.PlannedModel's, of all headers one after the other."""

    digest: Digest
    files: tuple[ModelFile, ...]
    tensors: tuple[ModelTensor, ...]


class EngineOptions(msgspec.Struct, frozen=True):
    """What all windows of a ring have in common (engine.window.WindowSpec)."""

    n_ctx: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    n_batch: Annotated[int, msgspec.Meta(ge=1, le=1 << 14)]
    n_seq: Annotated[int, msgspec.Meta(ge=1, le=256)]
    wire: Wire = "f32"
    flash_attention: bool = False


class WindowRun(msgspec.Struct, frozen=True):
    """Layers [first, last) in one place on a device: what becomes one window of its engine."""

    first: Count
    last: Count
    place: LayerPlace
    gpu: Count = 0


class Part(msgspec.Struct, frozen=True):
    """A device's part of a ring: what its engine is started with. Two equal parts need no second loading."""

    digest: Digest
    runs: tuple[WindowRun, ...]
    options: EngineOptions
    stream_bytes: Bytes
    has_last: bool


class Source(msgspec.Struct, frozen=True):
    """A device that serves weights: all tensors named in `tensors` (numbers in Manifest.tensors), headers always."""

    name: Name
    host: Address
    port: Port
    key: Key
    tensors: tuple[Count, ...]


class EngineStatus(msgspec.Struct, frozen=True):
    """The engine that an agent has running: its part, and the port of its data socket."""

    part: Part
    port: Port
    n_vocab: Count
    can_shift: bool


class DeviceStats(msgspec.Struct, frozen=True):
    """What a device is doing, sums since the engine's start where nothing else is said.

    memory_bytes: of agent and engine together, engine_bytes of it the engine's, which is what a plan counts;
    available_bytes: what other programs could still take;
    stalled: share of the last seconds that something on this device waited for memory (0 where the system can't say).
    """

    memory_bytes: Bytes = 0
    engine_bytes: Bytes = 0
    available_bytes: Bytes = 0
    total_bytes: Bytes = 0
    stalled: Share = 0.0
    read_bytes: Bytes = 0
    sent_bytes: Bytes = 0
    received_bytes: Bytes = 0
    cpu_seconds: float = 0.0
    disk_free_bytes: Bytes = 0


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The agent's first message of each connection. host: where others reach this device. engine: what is loaded
    and running from before."""

    protocol: int
    version: str
    name: str = ""
    host: str = ""
    system: str = ""
    weights_port: int = 0
    engine: EngineStatus | None = None


class Refuse(msgspec.Struct, frozen=True, tag="refuse"):
    """The coordinator's answer to a Hello that it can't use, or later: the device was forgotten. The agent shows
    `reason` and ends."""

    protocol: int
    version: str
    reason: str


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The device is a member. name: as which (two of one name get a number)."""

    name: Name


class Know(msgspec.Struct, frozen=True, tag="know"):
    """The cluster's model: look for it on this device's disk, get the headers from `head` otherwise. Answered by
    Holds."""

    manifest: Manifest
    head: Source


class Holds(msgspec.Struct, frozen=True, tag="holds"):
    """What of a model is on this device's disk, checked (numbers in Manifest.tensors), and the room that is left."""

    digest: Digest
    tensors: tuple[Count, ...]
    disk_free_bytes: Bytes


class Measure(msgspec.Struct, frozen=True, tag="measure"):
    """Measure this device with the model that it knows. Answered by Measured."""

    digest: Digest
    fresh: bool = False


class Measured(msgspec.Struct, frozen=True, tag="measured"):
    digest: Digest
    profile: DeviceProfile


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    """Time the link to another device, whose agent gets an Echo with the same id. Answered by Probed."""

    id: Epoch
    to: Name
    host: Address
    port: Port
    key: Key
    sizes: tuple[Count, Count]
    hop_ms: float


class Echo(msgspec.Struct, frozen=True, tag="echo"):
    """Open an end for another device's Probe; answered by Echoing with its port."""

    id: Epoch
    key: Key
    sizes: tuple[Count, Count]


class Echoing(msgspec.Struct, frozen=True, tag="echoing"):
    id: Epoch
    port: Port


class Probed(msgspec.Struct, frozen=True, tag="probed"):
    id: Epoch
    link: Link


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """Get these tensors (numbers in Manifest.tensors), where they are missing, from the sources; answered by Holds.
    most_bytes_per_s: 0 for no limit."""

    digest: Digest
    tensors: tuple[Count, ...]
    sources: tuple[Source, ...]
    most_bytes_per_s: Bytes = 0


class Limit(msgspec.Struct, frozen=True, tag="limit"):
    """How fast weights may be served and fetched from now on, so that answers don't wait; 0 for no limit."""

    most_bytes_per_s: Bytes


class Allow(msgspec.Struct, frozen=True, tag="allow"):
    """Who may fetch weights from this device from now on: the keys of all devices of the cluster. Sent after Welcome,
    and whenever they change. (The head's key is always allowed; the head's own agent allows all registered members.)"""

    keys: tuple[Key, ...]


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Start an engine with this part, unless one with an equal part is running. Answered by Listening when it has an
    address, Loaded when its weights are there."""

    epoch: Epoch
    part: Part


class Listening(msgspec.Struct, frozen=True, tag="listening"):
    epoch: Epoch
    port: Port


class Neighbour(msgspec.Struct, frozen=True):
    """Where messages of a ring go: an engine, or (on the head only) the coordinator."""

    address: Annotated[str, msgspec.Meta(max_length=300)]
    key: Key | None = None


class RouteHop(msgspec.Struct, frozen=True):
    """engine_messages.Hop."""

    hop: Count
    window: Count
    next: Neighbour | None


class Route(msgspec.Struct, frozen=True, tag="route"):
    """Where the engine's messages go in this epoch; older ones are dropped from now on, and its memory of all sequences
    is emptied. allowed: keys of all devices of the ring. chunk, ahead, groups, replay: engine_messages.Pace. Answered
    by Joined."""

    epoch: Epoch
    hops: tuple[RouteHop, ...]
    n_hops: Count
    head: Neighbour
    first: Neighbour | None
    allowed: tuple[Key, ...]
    chunk: Count = 0
    ahead: Count = 0
    groups: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    replay: Count = 0


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    epoch: Epoch
    n_vocab: Count
    can_shift: bool


class Joined(msgspec.Struct, frozen=True, tag="joined"):
    epoch: Epoch


class EngineGone(msgspec.Struct, frozen=True, tag="engine_gone"):
    """The engine ended by itself. is_memory: probably for want of it."""

    epoch: Epoch
    reason: Text
    is_memory: bool = False


class Unload(msgspec.Struct, frozen=True, tag="unload"):
    """End the engine, if there is one."""


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    task: Task
    share: Share
    detail: Text = ""


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """A sign of life of an agent, every BEAT_SECONDS."""

    stats: DeviceStats


class HeadBeat(msgspec.Struct, frozen=True, tag="head_beat"):
    """A sign of life of the coordinator, every BEAT_SECONDS."""


class Sorry(msgspec.Struct, frozen=True, tag="sorry"):
    """What was asked can't be done here; the others go on. about: the tag of the message; id: that of a Probe or Echo
    (earlier homeinfers do not say it)."""

    about: str
    reason: Text
    id: Epoch | None = None


class Bye(msgspec.Struct, frozen=True, tag="bye"):
    """Either side leaves on purpose. gone: the coordinator means that the cluster is down."""

    reason: Text = ""


FromAgent = (
    Hello
    | Holds
    | Measured
    | Echoing
    | Probed
    | Listening
    | Loaded
    | Joined
    | EngineGone
    | Progress
    | Beat
    | Sorry
    | Bye
)
FromHead = (
    Refuse | Welcome | Know | Measure | Probe | Echo | Fetch | Limit | Allow | Load | Route | Unload | HeadBeat | Bye
)

_T = TypeVar("_T")
_encoder = msgspec.msgpack.Encoder()
_from_agent: msgspec.msgpack.Decoder[FromAgent] = msgspec.msgpack.Decoder(FromAgent)
_from_head: msgspec.msgpack.Decoder[FromHead] = msgspec.msgpack.Decoder(FromHead)


def encode(message: msgspec.Struct) -> bytes:
    """One frame."""
    return _encoder.encode(message)


def from_agent(frame: Any) -> FromAgent:
    """Raises HomeinferError for what is no message of an agent."""
    return decoded(_from_agent, frame, "a control message")


def from_head(frame: Any) -> FromHead:
    """Raises HomeinferError for what is no message of a coordinator."""
    return decoded(_from_head, frame, "a control message")


def decoded(decoder: msgspec.msgpack.Decoder[_T], frame: Any, what: str) -> _T:
    """Raises HomeinferError where msgspec would raise one of several others."""
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as problem:
        raise HomeinferError(f"{what} can't be read: {problem}") from None
