"""What an agent lets a process of its own do (agent_worker.py), and what that answers: one JSON object a line.

Slow work needs libraries and memory that an idle agent should not keep, can be ended at any time, and must not hold
up the agent's signs of life.
"""

from __future__ import annotations

import msgspec

from homeinfer.cluster.planning.profile import DeviceProfile, Link
from homeinfer.cluster.wire.control import EngineOptions, Manifest, WindowRun
from homeinfer.cluster.wire.keys import DeviceKeys


class ModelHere(msgspec.Struct, frozen=True):
    """A model on this device's disk, its first file at `path`, perhaps with holes: `held` are the tensors (numbers in
    manifest.tensors) that are there and checked. weights: the folder of models that came from other devices."""

    manifest: Manifest
    path: str
    held: tuple[int, ...]
    weights: str


class Cut(msgspec.Struct, frozen=True, tag="cut"):
    """Cut a part's windows into `folder`. Answered by Windows."""

    model: ModelHere
    runs: tuple[WindowRun, ...]
    options: EngineOptions
    n_threads: int
    folder: str


class MeasureDevice(msgspec.Struct, frozen=True, tag="measure"):
    """Measure this device with a model. Answered by Profiled."""

    model: ModelHere
    name: str
    n_threads: int
    fresh: bool


class TimeLink(msgspec.Struct, frozen=True, tag="time_link"):
    """Time the link to device `to`, where an OpenEnd runs at `address`. Answered by Timed."""

    to: str
    address: str
    server_key: str
    own: DeviceKeys
    sizes: tuple[int, int]
    hop_ms: float


class OpenEnd(msgspec.Struct, frozen=True, tag="open_end"):
    """Send back what the device with key `allowed` sends. Answered by Opened, then, when all came, by Closed."""

    listen: str
    own: DeviceKeys
    allowed: str
    sizes: tuple[int, int]


class FindHead(msgspec.Struct, frozen=True, tag="find"):
    """Ask the network where the head with this key is. Answered by Found."""

    key: str


Job = Cut | MeasureDevice | TimeLink | OpenEnd | FindHead


class Share(msgspec.Struct, frozen=True, tag="share"):
    """How far it is, 0 to 1."""

    share: float
    detail: str = ""


class Windows(msgspec.Struct, frozen=True, tag="windows"):
    """specs: JSON of engine.window.WindowSpec, one for each run, for whoever loads them; paths: all files that these
    need. vocabulary: a file with the model's tokens."""

    specs: msgspec.Raw
    paths: tuple[str, ...]
    vocabulary: str


class Profiled(msgspec.Struct, frozen=True, tag="profiled"):
    profile: DeviceProfile


class Timed(msgspec.Struct, frozen=True, tag="timed"):
    link: Link


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    port: int


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """All that was expected came and went."""


class Found(msgspec.Struct, frozen=True, tag="found"):
    """Nothing in `hosts`: nobody answered."""

    hosts: tuple[str, ...]
    port: int


class Unable(msgspec.Struct, frozen=True, tag="unable"):
    """It could not be done; the process ends after this line."""

    reason: str


Result = Windows | Profiled | Timed | Closed | Found
FromJob = Share | Opened | Unable | Result
