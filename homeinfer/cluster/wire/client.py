"""What `homeinfer chat`, `run`, `bench` and `cluster status` say to the coordinator: DEALER to ROUTER through a socket
that is a file which only this user can open. msgpack."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from homeinfer.cluster.planning.report import PlanReport
from homeinfer.cluster.wire.control import DeviceStats, Name, Text, decoded
from homeinfer.cluster.wire.control import encode as encode
from homeinfer.engine.request import Finish, Request

AnswerId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
DeviceState = Literal["new", "measuring", "measured", "fetching", "loading", "ready", "lost", "left", "refused"]
ClusterState = Literal["waiting", "measuring", "planning", "confirming", "loading", "ready", "recovering", "stopping"]


class DeviceStatus(msgspec.Struct, frozen=True):
    """One device of a cluster. layers: [first, last) of its windows. share: how far its present task is, None for none.
    rates: per second over the last few seconds.

    compute_share: of the last few seconds, in which its engine was inside llama_decode (messages.Spent.computing);
    disk_share: in which it waited there for its disk (part of compute_share); holding_share: in which it had a step in
    hand at all (Spent.holding). With one answer at a time the ring's holding_shares and its network add up to 1.

    slowdown: how many times as long as the plan predicts it computes for a token, the median of the last tokens of
    answers that were alone; None where that can't be said."""

    name: Name
    state: DeviceState
    is_head: bool = False
    host: str = ""
    detail: Text = ""
    share: float | None = None
    layers: tuple[tuple[int, int], ...] = ()
    streamed_layers: int = 0
    planned_memory_bytes: int = 0
    stats: DeviceStats = DeviceStats()
    read_bytes_per_s: float = 0.0
    sent_bytes_per_s: float = 0.0
    compute_share: float = 0.0
    disk_share: float = 0.0
    holding_share: float = 0.0
    slowdown: float | None = None


class ClusterStatus(msgspec.Struct, frozen=True):
    """What `homeinfer cluster status --json` prints. code: the pairing code, while one is valid. events: the last
    lines that a user should know, newest last. answers: how many are being written now.
    waits_for: what a cluster that waits for devices waits for."""

    state: ClusterState
    model: str
    model_path: str
    epoch: int
    n_ctx: int
    sequences: int
    devices: tuple[DeviceStatus, ...]
    code: str | None = None
    predicted_tpot_ms: float | None = None
    tokens_per_s: float = 0.0
    answers: int = 0
    answered: int = 0
    recoveries: int = 0
    events: tuple[str, ...] = ()
    waits_for: str = ""
    pid: int = 0


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Is the cluster there? Answered by Status."""


class Watch(msgspec.Struct, frozen=True, tag="watch"):
    """Answered by Status now; `plan` asks for the plan too."""

    plan: bool = False


class AskAnswer(msgspec.Struct, frozen=True, tag="ask"):
    """Write an answer. id: the client's choice, new for each answer. session: answers of one conversation share it, so
    that the memory of the last one can serve. prompt: tokens."""

    id: AnswerId
    session: AnswerId
    prompt: tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)], ...]
    request: Request


class Resume(msgspec.Struct, frozen=True, tag="resume"):
    """After the connection was lost: tell the answer's tokens from number `have` on. Answered by Unknown when the
    coordinator doesn't know it."""

    id: AnswerId
    have: int


class CancelAnswer(msgspec.Struct, frozen=True, tag="cancel"):
    id: AnswerId


class Order(msgspec.Struct, frozen=True, tag="order"):
    """down: end the cluster. forget: a device by name. code: make a new pairing code. replan: plan anew. yes, no: the
    answer to the plan. Answered by Done."""

    what: Literal["down", "forget", "code", "replan", "yes", "no"]
    device: str = ""


class Status(msgspec.Struct, frozen=True, tag="status"):
    status: ClusterStatus
    plan: PlanReport | None = None


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """Tokens of an answer, the first of them its number `start`."""

    id: AnswerId
    start: int
    tokens: tuple[int, ...]


class Notice(msgspec.Struct, frozen=True, tag="notice"):
    """A line for the user in the middle of an answer: "desk left, re-planned on 3 devices, 4.2 s"."""

    text: Text


class AnswerDone(msgspec.Struct, frozen=True, tag="done"):
    id: AnswerId
    n_tokens: int
    finish: Finish


class AnswerFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The answer can't be written, nor can it be tried again."""

    id: AnswerId
    reason: Text


class Unknown(msgspec.Struct, frozen=True, tag="unknown"):
    id: AnswerId


class Done(msgspec.Struct, frozen=True, tag="order_done"):
    """problem: why an Order could not be followed, None when it was."""

    problem: str | None = None


FromClient = Open | Watch | AskAnswer | Resume | CancelAnswer | Order
ToClient = Status | Tokens | Notice | AnswerDone | AnswerFailed | Unknown | Done

_from_client: msgspec.msgpack.Decoder[FromClient] = msgspec.msgpack.Decoder(FromClient)
_to_client: msgspec.msgpack.Decoder[ToClient] = msgspec.msgpack.Decoder(ToClient)


def from_client(frame: Any) -> FromClient:
    """Raises HomeinferError for what is no message of a client."""
    return decoded(_from_client, frame, "a client's message")


def to_client(frame: Any) -> ToClient:
    """Raises HomeinferError for what is no message of a coordinator."""
    return decoded(_to_client, frame, "a message of the cluster")
