"""What a running cluster really does: answers that are timed, and what its devices did meanwhile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from homeinfer.cluster.client_connection import Connection
from homeinfer.cluster.client_telling import Telling, new_id
from homeinfer.cluster.wire.client import CancelAnswer, DeviceStatus, Notice, Open, Status
from homeinfer.engine.request import Request, Sampling
from homeinfer.errors import HomeinferError

_LOOK_SECONDS = 0.5
_SILENT_SECONDS, _REST_SECONDS = 120.0, 10.0


class Timed(msgspec.Struct, frozen=True):
    """When an answer was asked for and when its tokens came, seconds of one clock."""

    asked: float
    tokens: tuple[float, ...]

    @property
    def ttft_ms(self) -> float:
        return (self.tokens[0] - self.asked) * 1e3

    @property
    def tpot_ms(self) -> float:
        """Mean of the tokens after the first."""
        return (self.tokens[-1] - self.tokens[0]) * 1e3 / max(len(self.tokens) - 1, 1)


class Shares(msgspec.Struct, frozen=True):
    """What a device did while one answer was written, as shares of the time, which add up to 1. network: steps and
    tokens on their way between devices; waiting: for other devices, and whatever is left."""

    name: str
    compute: float
    disk: float
    network: float
    waiting: float


class Seen(msgspec.Struct, frozen=True):
    """Answers that ran together, and how the devices were meanwhile."""

    answers: tuple[Timed, ...]
    looks: tuple[tuple[DeviceStatus, ...], ...]
    notices: tuple[str, ...]


class Prober:
    """Asks the cluster of a state folder for answers and times them. `close` it in any case."""

    def __init__(self, folder: Path) -> None:
        self._connection = Connection(folder)

    def run(
        self, prompts: Sequence[Sequence[int]], n_tokens: int, on_token: Callable[[], None], most: int | None = None
    ) -> Seen:
        """All prompts at once, from an empty memory, n_tokens each; with `most`, so many from when all answers have
        begun, and at most that many of each in all. Raises HomeinferError when the cluster can't."""
        request = Request(Sampling(temperature=0), limit=most or n_tokens, fresh=True)
        tellings = [Telling(new_id(), prompt, request) for prompt in prompts]
        probe = _Probe(tellings, None if most is None else n_tokens, on_token)
        try:
            self._follow(probe)
        finally:
            for telling in probe.open.values():
                self._connection.send(CancelAnswer(telling.id))
        if probe.open:
            self._rest()
        return probe.seen()

    def _rest(self) -> None:
        """Until what was cancelled is over: the next answer shall not wait for it."""
        end = time.monotonic() + _REST_SECONDS
        while time.monotonic() < end:
            self._connection.send(Open())
            message = self._connection.receive(0.1)
            if isinstance(message, Status) and not message.status.answers:
                return

    def _follow(self, probe: _Probe) -> None:
        for telling in list(probe.open.values()):
            probe.asked[telling.id] = time.perf_counter()
            if not self._connection.send(telling.ask()):
                raise HomeinferError("the cluster on this machine is gone: homeinfer cluster up starts it again")
        looked = heard = time.monotonic()
        while not probe.is_enough:
            now = time.monotonic()
            if now - looked >= _LOOK_SECONDS:
                looked = now
                self._connection.send(Open())
            message = self._connection.receive(0.1)
            if message is None or isinstance(message, Status):
                if now - heard >= _SILENT_SECONDS or not self._connection.is_there():
                    raise HomeinferError("the cluster stopped answering in the middle of a measurement")
                if isinstance(message, Status):
                    probe.looks.append(message.status.devices)
                continue
            heard = now
            if isinstance(message, Notice):
                probe.notices.append(message.text)
            else:
                probe.take(message)

    def close(self) -> None:
        """Safe to call twice."""
        self._connection.close()


class _Probe:
    """Answers under way."""

    def __init__(self, tellings: Sequence[Telling], n_tokens: int | None, on_token: Callable[[], None]) -> None:
        self.open = {telling.id: telling for telling in tellings}
        self.asked: dict[str, float] = {}
        self.looks: list[tuple[DeviceStatus, ...]] = []
        self.notices: list[str] = []
        self._came: dict[str, list[float]] = {telling.id: [] for telling in tellings}
        self._n_tokens, self._on_token = n_tokens, on_token

    @property
    def is_enough(self) -> bool:
        """Whether all answers have ended, or have their tokens."""
        wanted = self._n_tokens
        if not self.open or wanted is None or not all(self._came.values()):
            return not self.open
        counted = dict(zip(self._came, since_all_began(tuple(self._came.values())), strict=True))
        return all(len(counted[id]) > wanted for id in self.open)

    def take(self, message: msgspec.Struct) -> None:
        now = time.perf_counter()
        telling = self.open.get(getattr(message, "id", ""))
        if telling is None:
            return
        taken = telling.take(message)  # type: ignore[arg-type]
        self._came[telling.id] += [now] * len(taken.tokens)
        for _ in taken.tokens:
            self._on_token()
        if taken.send is not None:
            raise HomeinferError("the cluster lost an answer in the middle of a measurement: measure again")
        if taken.finish is not None:
            del self.open[telling.id]
            if not self._came[telling.id]:
                raise HomeinferError("an answer ended before its first token: measure again")

    def seen(self) -> Seen:
        came: tuple[Sequence[float], ...] = tuple(self._came.values())
        counted = came if self._n_tokens is None else since_all_began(came)
        answers = tuple(
            Timed(self.asked[id], tuple(some if len(some) > 1 else every))
            for id, some, every in zip(self._came, counted, came, strict=True)
        )
        return Seen(answers, tuple(self.looks), tuple(self.notices))


def since_all_began(answers: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Of answers with at least one token each, the times of those tokens that came when all had begun: until then they
    wait for the prompts of others, or share with fewer."""
    begun = max(times[0] for times in answers)
    return tuple(tuple(when for when in times if when >= begun) for times in answers)


def together_per_s(answers: Sequence[Timed]) -> float:
    """Tokens per second of answers that ran at once, from the first token that came to the last."""
    first = min(answer.tokens[0] for answer in answers)
    last = max(answer.tokens[-1] for answer in answers)
    count = sum(len(answer.tokens) for answer in answers) - 1
    return count / (last - first) if last > first else 0.0


def shares(looks: Sequence[Sequence[DeviceStatus]]) -> tuple[Shares, ...]:
    """Of each device with layers, from how it was while one answer was written."""
    names = dict.fromkeys(device.name for look in looks for device in look if device.layers)
    means = {name: _mean([d for look in looks for d in look if d.name == name]) for name in names}
    network = max(0.0, 1.0 - sum(held for _, _, held in means.values()))
    return tuple(
        Shares(name, max(compute - disk, 0.0), disk, network, max(0.0, 1.0 - network - compute))
        for name, (compute, disk, _) in means.items()
    )


def _mean(looks: Sequence[DeviceStatus]) -> tuple[float, float, float]:
    """compute, disk and holding share."""
    return (
        statistics.fmean(device.compute_share for device in looks),
        statistics.fmean(device.disk_share for device in looks),
        statistics.fmean(max(device.holding_share, device.compute_share) for device in looks),
    )
