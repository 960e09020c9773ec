"""How fast tokens came, and what each window computed for them. No clock of its own."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

import msgspec

from homeinfer.cluster.wire.control import DeviceStats
from homeinfer.cluster.wire.messages import Spent

_WINDOW = 5.0
ENOUGH, _ALONE = 16, 64
"""So many tokens of answers that were alone in the ring say how long a token takes to compute; so many are kept."""


class Speed:
    """Of all answers together."""

    def __init__(self) -> None:
        self._tokens: deque[tuple[float, tuple[Spent, ...]]] = deque(maxlen=4096)
        self._alone: deque[tuple[Spent, ...]] = deque(maxlen=_ALONE)

    def token(self, now: float, spent: tuple[Spent, ...], *, is_alone: bool = False) -> None:
        """is_alone: one step was made for this token and nothing else."""
        self._tokens.append((now, spent))
        if is_alone:
            self._alone.append(spent)

    def other_ring(self) -> None:
        """Windows are others from now on, or elsewhere."""
        self._alone.clear()

    def computing_ms(self, hops: Sequence[int]) -> float | None:
        """Milliseconds that these windows compute for one token: the median of the last that were alone. None before
        there were ENOUGH."""
        found = [
            sum(spent[hop].computing for hop in hops) / 1e3 for spent in self._alone if hops and max(hops) < len(spent)
        ]
        median = statistics.median(found) if len(found) >= ENOUGH else math.nan
        return median if math.isfinite(median) else None

    def tokens_per_s(self, now: float) -> float:
        recent = self._recent(now)
        return (len(recent) - 1) / max(now - recent[0][0], 1e-3) if len(recent) > 1 else 0.0

    def shares(self, now: float, hops: Sequence[int]) -> tuple[float, float]:
        """The shares of the last seconds in which these windows computed, and had a step in hand at all."""
        recent = self._recent(now)
        if len(recent) < 2:
            return 0.0, 0.0
        mine = [spent[hop] for _, spent in recent for hop in hops if hop < len(spent)]
        microseconds = max(now - recent[0][0], 1e-3) * 1e6
        return (
            min(1.0, sum(each.computing for each in mine) / microseconds),
            min(1.0, sum(each.holding for each in mine) / microseconds),
        )

    def _recent(self, now: float) -> list[tuple[float, tuple[Spent, ...]]]:
        while self._tokens and now - self._tokens[0][0] > _WINDOW:
            self._tokens.popleft()
        return list(self._tokens)


class Rate:
    """A growing sum of bytes as bytes per second, over a few seconds; starts again when the sum does."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=16)

    def see(self, now: float, total: int) -> None:
        if self._seen and total < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, total))
        while now - self._seen[0][0] > _WINDOW:
            self._seen.popleft()

    @property
    def per_s(self) -> float:
        (first, before), (last, after) = (self._seen[0], self._seen[-1]) if self._seen else ((0.0, 0), (0.0, 0))
        return (after - before) / (last - first) if last > first else 0.0


class Rates(msgspec.Struct, frozen=True):
    """A device's last few seconds. computing_ms: Speed.computing_ms."""

    read_bytes_per_s: float = 0.0
    sent_bytes_per_s: float = 0.0
    compute_share: float = 0.0
    holding_share: float = 0.0
    tokens_per_s: float = 0.0
    computing_ms: float | None = None


class Meters:
    """The rates of all devices, from what they say of themselves and what tokens say of them."""

    def __init__(self) -> None:
        self._rates: dict[str, tuple[Rate, Rate]] = {}

    def see(self, device: str, stats: DeviceStats, now: float) -> None:
        read, sent = self._rates.setdefault(device, (Rate(), Rate()))
        read.see(now, stats.read_bytes)
        sent.see(now, stats.sent_bytes)

    def of(self, device: str, hops: Sequence[int], speed: Speed, now: float) -> Rates:
        """hops: the device's windows in the ring."""
        read, sent = self._rates.get(device, (Rate(), Rate()))
        shares, tokens_per_s = speed.shares(now, hops), speed.tokens_per_s(now)
        return Rates(read.per_s, sent.per_s, *shares, tokens_per_s, speed.computing_ms(hops))
