"""From timed windows to the times of layers: pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from homeinfer.cluster.planning.kinds import layer_kinds, output_kind
from homeinfer.cluster.planning.profile import KindTimes, Place
from homeinfer.model.header import Header
from homeinfer.model.layers import is_routed_expert, layer_of
from homeinfer.profiling.shadow import Experts, Shadow, solve_kinds
from homeinfer.profiling.timing_messages import Timed

_PREFILL = 512
_LEAST_MS = 1e-4
_STEADY = 0.2
"""Of many short runs the one is taken that a fifth of them do not exceed: others' work can only add to a time."""


class Steps(msgspec.Struct, frozen=True):
    """Milliseconds of a window, or of a part of it, for 1, 8 and 512 tokens."""

    decode_1: float
    decode_8: float
    prefill: float

    def less(self, other: Steps) -> Steps:
        """What is left without `other`, half at least: more is never lost to it but by a disturbance."""
        return Steps(
            max(self.decode_1 - other.decode_1, self.decode_1 / 2),
            max(self.decode_8 - other.decode_8, self.decode_8 / 2),
            max(self.prefill - other.prefill, self.prefill / 2),
        )


def steps_of(timed: Timed) -> Steps:
    """One number of each of many runs; a shorter prompt counts as a part of one of 512 tokens."""
    return Steps(
        steady(timed.decode_1),
        steady(timed.decode_8),
        min(timed.prefill, default=0.0) * _PREFILL / timed.prefill_tokens,
    )


def steady(values: Sequence[float]) -> float:
    """The value that a fifth of them do not exceed."""
    ordered = sorted(values)
    return ordered[int(_STEADY * (len(ordered) - 1))]


def spread(values: Sequence[float]) -> float:
    """By which share the middle of repeated timings lies above what is taken of them."""
    return statistics.median(values) / max(steady(values), 1e-9) - 1


def window_cost(one: Steps, many: Steps, layers: int) -> float:
    """Milliseconds that a window costs a token besides its layers, from thin windows of 1 and `layers` layers."""
    layer = (many.decode_1 - one.decode_1) / (layers - 1)
    return min(max(one.decode_1 - layer, 0.0), one.decode_1)


def layer_times(
    header: Header,
    shadows: Sequence[Shadow],
    steps: Sequence[Steps],
    window: Steps,
    experts: Experts | None,
    place: Place,
    gpu: int = 0,
) -> tuple[KindTimes, ...]:
    """The time of one layer of each kind."""
    reads = token_bytes(header, experts)
    windows = [shadow.kinds for shadow in shadows]
    solved = [
        solve_kinds(windows, [getattr(step.less(window), name) for step in steps], reads)
        for name in ("decode_1", "decode_8", "prefill")
    ]
    found = []
    for kind in dict.fromkeys(kind for kinds in windows for kind in kinds):
        decode_1, decode_8, prefill = (times[kind] for times in solved)
        expert = decode_1 * expert_bytes(header, kind, experts) / max(reads[kind], 1)
        found.append(
            KindTimes(
                kind=kind,
                place=place,
                decode_1_ms=decode_1,
                decode_8_ms=max(decode_8, decode_1) + expert * left_out(experts, 8),
                prefill_512_ms=prefill + expert * left_out(experts, _PREFILL),
                gpu=gpu,
            )
        )
    return tuple(found)


def output_times(header: Header, thin: Steps, output: Steps, rows: float, place: Place, gpu: int = 0) -> KindTimes:
    """The time of final norm and output matrix, of which the shadow has so large a part of the rows; a prefill wants
    the logits of one token."""
    only = output.less(thin)
    one = max(only.decode_1 / rows, _LEAST_MS)
    return KindTimes(output_kind(header), place, one, max(only.decode_8 / rows, one), one, gpu)


def token_bytes(header: Header, experts: Experts | None) -> dict[str, float]:
    """Bytes of a layer of each kind that one token reads."""
    kinds = layer_kinds(header)
    share = 1.0 if experts is None else experts.used / experts.count
    nbytes = [0.0] * len(kinds)
    for tensor in header.tensors:
        index = layer_of(tensor.name)
        if index is not None and index < len(kinds):
            nbytes[index] += tensor.nbytes * (share if is_routed_expert(tensor.name) else 1.0)
    return dict(zip(kinds, nbytes, strict=True))


def expert_bytes(header: Header, kind: str, experts: Experts | None) -> float:
    """Bytes of one routed expert in a layer of this kind."""
    if experts is None:
        return 0.0
    index = layer_kinds(header).index(kind)
    routed = (t.nbytes for t in header.tensors if layer_of(t.name) == index and is_routed_expert(t.name))
    return sum(routed) / experts.count


def left_out(experts: Experts | None, tokens: int) -> float:
    """How many more experts so many tokens are sent to in the model than in its shadow, which has fewer, if each
    token chooses evenly."""
    if experts is None:
        return 0.0
    return _chosen(experts.count, experts.used, tokens) - _chosen(experts.kept, experts.used, tokens)


def _chosen(count: int, used: int, tokens: int) -> float:
    return count * (1 - (1 - used / count) ** tokens)
