"""Time every kind of a model's layers, in memory, streamed, and on each GPU."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec

from homeinfer.cluster.planning.kinds import kind_label, layer_kinds, output_kind
from homeinfer.cluster.planning.profile import Gpu, KindTimes, Place
from homeinfer.model.cut_rules import per_layer
from homeinfer.model.header import Header
from homeinfer.profiling.kind_times import Steps, layer_times, output_times, spread, steps_of
from homeinfer.profiling.machine import usable_memory
from homeinfer.profiling.progress import Steps as ProgressSteps
from homeinfer.profiling.shadow import (
    Experts,
    Shadow,
    Sizes,
    embedding_length,
    experts_of,
    output_shadow,
    shadows,
    thin_shadow,
)
from homeinfer.profiling.step_times import PREFILL
from homeinfer.profiling.timing_messages import Timed
from homeinfer.profiling.window_times import Bench

_SECONDS = 40.0
"""For all windows of a model in all places."""
_ENOUGH, _MOST_EXPERTS = 256_000_000, 400_000_000
_LOAD_BYTES_PER_S = 250e6
"""Writing, filling, loading and repacking, guessed low: for the time left only."""
_LEAST_OUTPUT = 16_000_000
_FEW_WINDOWS = 12
"""So many windows, counted in each place, may be of full size."""
_OUTSIDE = 24_000_000
"""What the process takes besides weights and buffers when it runs a window."""


class TimingPlan(msgspec.Struct, frozen=True):
    """What will be timed, for how long each. output_rows: the part of the output matrix that its shadow has.
    prefill_tokens: of a prompt at most, fewer where memory is short. seconds: expected, for all. name: of the result in
    the cache."""

    name: str
    shadows: tuple[Shadow, ...]
    output: Shadow
    output_rows: float
    prefill_tokens: int
    experts: Experts | None
    places: tuple[tuple[Place, int], ...]
    each: float
    seconds: float


class ModelTimes(msgspec.Struct, frozen=True):
    """Times of every kind; noise: the spread of repeated timings; is_disturbed: others were busy all the time.
    stream_bytes_per_s: at which layers came from disk, 0 where too few were streamed to say it."""

    times: tuple[KindTimes, ...]
    noise: float
    is_disturbed: bool
    stream_bytes_per_s: float = 0.0


def timing_plan(header: Header, gpus: tuple[Gpu, ...], room_on_disk: int) -> TimingPlan:
    """What to time so that it stays within a minute. Raises HomeinferError for a model that can't be cut, or whose
    layers are too large for memory or disk."""
    room = max(usable_memory() - _OUTSIDE, 16_000_000)
    places = _places(gpus)
    n_kinds = len(set(layer_kinds(header)))
    n_windows = (n_kinds + 2) * len(places)
    sizes = Sizes(
        enough=min(_ENOUGH, int(_ENOUGH * _FEW_WINDOWS / n_windows), room // 4, room_on_disk // 4),
        experts=min(_MOST_EXPERTS, room // 4, room_on_disk // 4),
        most=min(int(room * 0.7), int(room_on_disk * 0.9)),
    )
    made = shadows(header, sizes)
    output, rows = output_shadow(header, max(sizes.enough, _LEAST_OUTPUT))
    load = sum(shadow.nbytes for shadow in made) * len(places) / _LOAD_BYTES_PER_S
    each = min(max((_SECONDS - load) / n_windows, 0.4), 2.0)
    return TimingPlan(
        name=times_name(header, gpus),
        shadows=made,
        output=output,
        output_rows=rows,
        prefill_tokens=prompt_tokens(header, room - max(shadow.nbytes for shadow in made)),
        experts=experts_of(header, sizes.experts),
        places=tuple(places),
        each=each,
        seconds=n_windows * each + load,
    )


def times_name(header: Header, gpus: tuple[Gpu, ...]) -> str:
    """Under which a model's times are kept: they can be used again where memory is too short to measure them."""
    kinds = "-".join((*sorted(set(layer_kinds(header))), output_kind(header)))
    return f"times {kinds} {_places(gpus)} {gpus and [gpu.name for gpu in gpus]}"


def _places(gpus: tuple[Gpu, ...]) -> list[tuple[Place, int]]:
    return [("resident", 0), ("mapped", 0), *(("gpu", number) for number in range(len(gpus)))]


def prompt_tokens(header: Header, room: int) -> int:
    """Tokens of a prompt whose compute buffers fit: 512, or half, a quarter or an eighth of it."""
    widest = max((max(tensor.shape[:2]) for tensor in header.tensors if tensor.name.startswith("blk.")), default=0)
    heads = max(per_layer(header, "attention.head_count"), default=1)
    tokens = PREFILL
    while tokens > PREFILL // 8 and 4 * tokens * (4 * widest + heads * 2 * tokens) > room // 2:
        tokens //= 2
    return tokens


def time_model(header: Header, plan: TimingPlan, bench: Bench, window_ms: float, progress: ProgressSteps) -> ModelTimes:
    """Write, run and remove one shadow after another. Raises HomeinferError when llama.cpp can't run one."""
    thin, output = thin_shadow(embedding_length(header)), plan.output
    timed: dict[tuple[str, int], list[Timed]] = {place: [] for place in plan.places}
    every = (thin, output, *plan.shadows)
    rate, largest = 0.0, max(plan.shadows, key=lambda shadow: shadow.nbytes)
    for shadow in every:
        what = _label(header, shadow)
        with bench.written(shadow) as path:
            for place, gpu in plan.places:
                progress.begin(f"{what}, {_WHERE[place]}", plan.seconds / len(every) / len(plan.places))
                prefill = 0 if shadow is thin or shadow is output else plan.prefill_tokens
                timed[place, gpu].append(bench.time(shadow, Path(path), place, plan.each, gpu=gpu, prefill=prefill))
            if shadow is largest and plan.experts is None:
                rate = bench.stream_rate(shadow, path, plan.each)
    found: list[KindTimes] = []
    cost = Steps(window_ms, window_ms, window_ms)
    for place, gpu in plan.places:
        steps = [steps_of(one) for one in timed[place, gpu]]
        found += layer_times(header, plan.shadows, steps[2:], cost, plan.experts, place, gpu)
        found.append(output_times(header, steps[0], steps[1], plan.output_rows, place, gpu))
    all_timed = [one for some in timed.values() for one in some[1:]]
    noise = statistics.median(spread(one.decode_1) for one in all_timed)
    return ModelTimes(tuple(found), noise, any(one.is_disturbed for one in all_timed), rate)


_WHERE = {"resident": "in memory", "mapped": "streamed", "gpu": "on the GPU"}


def _label(header: Header, shadow: Shadow) -> str:
    if shadow.is_last:
        return kind_label(header, output_kind(header))
    return " and ".join(kind_label(header, kind) for kind in dict.fromkeys(shadow.kinds)) or "an empty layer"
