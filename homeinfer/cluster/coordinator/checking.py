"""When the ring falls silent though all its devices are heard of: which of its links carries nothing? Pure.

Agents can all reach the head while two of them can't reach each other: a firewall, or Wi-Fi that keeps guests apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from homeinfer.cluster.coordinator.measuring import without_link
from homeinfer.cluster.coordinator.placing import recover
from homeinfer.cluster.coordinator.state import (
    Cluster,
    Command,
    Halt,
    Note,
    Outcome,
    Probing,
    Recovery,
    RingPlan,
    Tell,
)
from homeinfer.cluster.coordinator.trust import recent_losses
from homeinfer.cluster.planning.remarks import listed
from homeinfer.cluster.wire.control import Echo

_CHECK_SECONDS = 8.0
CHECK_SIZES = (256, 1024)
"""Bytes of what is sent to see whether anything arrives."""
_PAUSE = 120.0
_MEMORY = 1800.0
"""For so long it counts what a device said of a link."""


def check_links(cluster: Cluster, what: str, now: float) -> Outcome:
    """Send something over each of the ring's links; what is done then is `look`'s to say."""
    plan = cluster.plan
    pairs = _links(plan) if plan is not None else []
    if not pairs or cluster.phase != "ready":
        return recover(cluster, what, now, replan=False)
    recovery = Recovery(what, now)
    checking = cluster.having(
        phase="checking",
        since=now,
        recovery=recovery,
        recoveries=cluster.recoveries + 1,
        probes=(),
        suspects=(),
    )
    commands: list[Command] = [Halt(), Note(f"{what}: looking for the cause", is_notice=True)]
    for here, there in pairs:
        number = checking.probed + 1
        probe = Probing(number, here, there, now, is_check=True)
        checking = checking.having(probed=number, probes=(*checking.probes, probe))
        commands.append(Tell(there, Echo(number, checking.device(here).key, CHECK_SIZES)))
    return Outcome(checking, tuple(commands))


def _links(plan: RingPlan) -> list[tuple[str, str]]:
    """The pairs of devices between which messages go, each once."""
    owners = [owner for owner, _ in plan.hops]
    around = zip(owners, [*owners[1:], owners[0]], strict=True)
    return list(dict.fromkeys((here, there) for here, there in around if here != there))


def look(cluster: Cluster, now: float) -> Outcome:
    """Whether it is known by now."""
    for probe in cluster.probes:
        if now - probe.since > _CHECK_SECONDS:
            cluster = without_link(cluster, probe.id)
    if cluster.probes:
        return Outcome(cluster)
    silent = cluster.suspects
    lately = tuple(probe for probe in cluster.disputes if now - probe.since < _MEMORY)
    disputes = (*lately, *(probe for probe in silent if probe.is_open))
    blamed = at_fault(silent, disputes, cluster.head)
    what = cluster.recovery.what if cluster.recovery is not None else "the ring was silent"
    for name in blamed:
        cluster = left_out(cluster, name, now)
        what = f"{_fault(name, silent, disputes)} (is there a firewall?)"
    placing = cluster.having(phase="placing", suspects=(), disputes=disputes)
    return recover(placing, what, now, replan=bool(blamed))


def at_fault(silent: Sequence[Probing], disputes: Sequence[Probing], head: str) -> tuple[str, ...]:
    """Whom of the devices at links that are silent now to leave out: the fewest that explain these and the disputes of
    late. So a device of which it is true, or which just says so, that it reaches none of the others costs one of them
    its place and then its own."""
    ends = {name for probe in silent for name in (probe.here, probe.there)}
    links = {(probe.here, probe.there) for probe in (*silent, *disputes)}
    return tuple(name for name in culprits(links, head) if name in ends)


def _fault(name: str, silent: Sequence[Probing], disputes: Sequence[Probing]) -> str:
    if any(probe.there == name for probe in silent):
        return f"{name} can't be reached by the others"
    others = sorted({probe.there for probe in (*silent, *disputes) if probe.here == name})
    return f"{name} can't reach {listed(others)}"


def left_out(cluster: Cluster, name: str, now: float) -> Cluster:
    """Without a device that is there and does harm, for longer each time."""
    losses = recent_losses(cluster.device(name).losses, now)
    pause = _PAUSE * 2.0 ** len(losses)
    return cluster.with_device(name, losses=(*losses, now), shunned_until=now + pause)


def culprits(links: Iterable[tuple[str, str]], head: str) -> tuple[str, ...]:
    """The fewest devices, never the head, without which none of these links is used; of two that could be meant the
    one that does not get what is sent to it."""
    left, found = set(links), []
    while left:
        blame: Counter[str] = Counter()
        for here, there in left:
            blame.update({here: 2, there: 3})
        worst = max(sorted(set(blame) - {head}), key=lambda name: blame[name])
        found.append(worst)
        left = {pair for pair in left if worst not in pair}
    return tuple(found)
