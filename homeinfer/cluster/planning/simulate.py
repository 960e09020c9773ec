"""The simulator that judges every plan: discrete events of compute, disks and links (design/PLAN.md). Pure."""

from __future__ import annotations

import math

import msgspec

from homeinfer.cluster.planning.costs import DeviceCosts, Hop, hop
from homeinfer.cluster.planning.disks import Disks
from homeinfer.cluster.planning.memory import DeviceMemory, MemoryModel
from homeinfer.cluster.planning.pipeline_events import finish_of, least_period, period_of
from homeinfer.cluster.planning.plan import Cause, DeviceLoad, Prediction, Ring, Window
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.prompt_reads import prompt_stream
from homeinfer.cluster.planning.ring_checks import ring_trouble
from homeinfer.cluster.planning.route import Stage, Stream, Streamed, Sums, route, streamed_of
from homeinfer.cluster.planning.walk import Recorder, added, alone_ms, settled, total_ms, walk
from homeinfer.errors import HomeinferError
from homeinfer.model.records import printable

__all__ = ["Problem", "Simulator"]

CHUNKS = (512, 256, 128, 64)
"""How long the chunks of a prompt may be; the whole prompt in one is tried too."""
_MOST_KEPT = 200_000


class _Loaded:
    """A feasible ring with its memory and what it reads from disks."""

    __slots__ = ("memories", "ring", "streamed", "streams")

    def __init__(self, ring: Ring, memories: dict[str, DeviceMemory], streamed: dict[str, Streamed]) -> None:
        self.ring, self.memories, self.streamed = ring, memories, streamed
        self.streams: dict[str, Stream] = {}
        for name, way in streamed.items():
            if way.stream is not None:
                self.streams[name] = way.stream


class Simulator:
    """What rings of one problem would do. Keeps what it computed; not thread-safe."""

    def __init__(self, problem: Problem) -> None:
        """Raises HomeinferError for a head that has no profile, and for profiles that lack a kind of layer."""
        self.problem = problem
        self.head = problem.head
        self.memory = MemoryModel(problem)
        self.costs = {d.name: DeviceCosts(problem.shape, d, problem.workload) for d in problem.devices}
        self._names = frozenset(self.costs)
        self._groups = {d.name: d.disk.group for d in problem.devices}
        self._hops: dict[tuple[str, str], Hop] = {}
        self._memories: dict[tuple[str, tuple[Window, ...]], DeviceMemory] = {}

    def trouble(self, ring: Ring) -> str | None:
        """Why this ring can't be, or None where it can."""
        found = self._load(ring)
        return found if isinstance(found, str) else None

    def value(self, ring: Ring) -> float:
        """What the workload's objective wants to be small: ms per token of a sequence (latency), ms per token of all
        (throughput), ms to the first token (ttft); math.inf when the ring can't be."""
        loaded = self._load(ring)
        if isinstance(loaded, str):
            return math.inf
        workload = self.problem.workload
        if workload.objective == "ttft":
            return self._ttft(loaded)
        period = self._period(loaded)[0]
        return period / workload.sequences if workload.objective == "throughput" else period

    def predict(self, ring: Ring, *, timeline: bool = False) -> Prediction:
        """Everything about a ring. Raises HomeinferError, with the reason, when it can't be."""
        loaded = self._load(ring)
        if isinstance(loaded, str):
            raise HomeinferError(f"this plan can't be: {loaded}")
        sequences = self.problem.workload.sequences
        period, batches = self._period(loaded)
        recorder = self._recorded(loaded, self._stages(loaded, sequences // batches), timeline=timeline)
        causes = _fitted(recorder.causes, period, ring.windows[-1].device)
        return Prediction(
            tpot_ms=period,
            ttft_ms=self._ttft(loaded),
            tokens_per_s=sequences / period * 1e3,
            cause=added(causes.values()),
            loads=tuple(self._load_of(device.name, loaded, causes) for device in self.problem.devices),
            timeline=tuple(recorder.spans),
        )

    def _load(self, ring: Ring) -> _Loaded | str:
        """The ring with its memory, or why it can't be."""
        trouble = ring_trouble(self.problem, ring, self.head, self._names)
        if trouble is not None:
            return trouble
        mine: dict[str, tuple[Window, ...]] = {}
        streams = False
        for window in ring.windows:
            mine[window.device] = (*mine.get(window.device, ()), window)
            streams = streams or "s" in window.places
        memories = {}
        for name, windows in mine.items():
            memories[name] = self._memory_of(name, windows)
            if memories[name].trouble is not None:
                return memories[name].trouble or ""
        streamed = streamed_of(self.memory, self.problem.shape, ring, memories, self.costs) if streams else {}
        return _Loaded(ring, memories, streamed)

    def _memory_of(self, name: str, windows: tuple[Window, ...]) -> DeviceMemory:
        key = (name, windows)
        found = self._memories.get(key)
        if found is None:
            found = self.memory.of_device(self.costs[name].profile, windows)
            if found.trouble is None:
                found = msgspec.structs.replace(found, trouble=self._untimed(name, windows))
            if len(self._memories) > _MOST_KEPT:
                self._memories.clear()
            self._memories[key] = found
        return found

    def _untimed(self, name: str, windows: tuple[Window, ...]) -> str | None:
        cost, n = self.costs[name], len(self.problem.shape.layers)
        for window in windows:
            for first, last, place in window.runs():
                what = f"its GPU {window.gpu}" if place == "g" else "its processor"
                if not cost.has_times(first, last, place, window.gpu):
                    return (
                        f"the profile of {printable(name, 60)} has no times of layers {first} to {last - 1} on {what}"
                    )
                if last == n and cost.output_ms(place, window.gpu, 1) is None:
                    return f"the profile of {printable(name, 60)} has no time of the output matrix"
        return None

    def _hop(self, sender: str, receiver: str) -> Hop:
        found = self._hops.get((sender, receiver))
        if found is None:
            profiles = self.costs[sender].profile, self.costs[receiver].profile
            found = hop(*profiles, self.problem.shape, self.problem.workload.wire)
            self._hops[sender, receiver] = found
        return found

    def _route(self, loaded: _Loaded, sums_of: Sums, n_tokens: int, n_rows: int) -> list[Stage]:
        shape = self.problem.shape
        return route(shape, loaded.ring, self.costs, self._hop, loaded.streamed, sums_of, n_tokens, n_rows)

    def _stages(self, loaded: _Loaded, n: int) -> list[Stage]:
        """A step of n sequences' next tokens behind the prompt."""
        behind = self.problem.workload.prompt_tokens
        return self._route(loaded, lambda cost, place, gpu: cost.step_sums(place, gpu, n, behind), n, n)

    def _period(self, loaded: _Loaded) -> tuple[float, int]:
        """Milliseconds between two tokens of a sequence, and in how many micro-batches the sequences go around."""
        sequences = self.problem.workload.sequences
        best = (self._alone(loaded, sequences), 1)
        if sequences == 1 or loaded.streams or len(loaded.memories) == 1:
            return best  # each step reads what is streamed: more steps would read it more often
        for batches in range(2, sequences + 1):
            if sequences % batches == 0:
                stages = self._stages(loaded, sequences // batches)
                if least_period(stages, batches) < best[0]:
                    best = min(best, (period_of(stages, batches), batches))
        return best

    def _alone(self, loaded: _Loaded, n: int) -> float:
        """The period of one step of n tokens that goes around alone."""
        stages = self._stages(loaded, n)
        if not loaded.streams:
            return alone_ms(stages)
        return settled(stages, Disks(loaded.streams, self._groups))[0]

    def _recorded(self, loaded: _Loaded, stages: list[Stage], *, timeline: bool) -> Recorder:
        disks = Disks(loaded.streams, self._groups)
        begin = settled(stages, disks)[1] if loaded.streams else 0.0
        recorder = Recorder(begin, timeline)
        end = walk(stages, disks, begin, recorder)
        if timeline:
            recorder.add_reads(disks, loaded.streams, end, len(self.problem.shape.layers))
        return recorder

    def _ttft(self, loaded: _Loaded) -> float:
        workload = self.problem.workload
        prompt = min(workload.prompt_tokens, workload.n_ctx)
        sizes = {min(size, prompt, workload.n_batch) for size in (*CHUNKS, prompt)}
        return min(self._prefill(loaded, prompt, size) for size in sizes)

    def _prefill(self, loaded: _Loaded, prompt: int, size: int) -> float:
        """Milliseconds until a prompt in chunks of this size has its first token; what fits is prefetched before."""
        jobs = []
        for behind in range(0, prompt, size):
            n = min(size, prompt - behind)
            sums = _chunk_sums(n, behind)
            jobs.append(self._route(loaded, sums, n, int(behind + n == prompt)))
        streams = {
            name: prompt_stream(self.problem.shape, stream, len(jobs)) for name, stream in loaded.streams.items()
        }
        return finish_of(jobs, Disks(streams, self._groups))

    def _load_of(self, name: str, loaded: _Loaded, causes: dict[str, Cause]) -> DeviceLoad:
        profile, memory = self.costs[name].profile, loaded.memories.get(name)
        if memory is None:
            return DeviceLoad(name, Cause(), 0, profile.memory_bytes, gpu_bytes=(0,) * len(profile.gpus))
        used, buffer, read = memory.fixed, 0, 0
        way = loaded.streamed.get(name)
        if way is not None:
            used, buffer = memory.fixed + way.used, way.buffer
            read = 0 if way.stream is None else round(sum(way.stream.sizes))
            if way.miss:
                stages = self._stages(loaded, self.problem.workload.sequences)
                faults = sum(piece.fault for stage in stages if stage.device == name for piece in stage.pieces)
                read += round(faults * profile.disk.fault_bytes_per_s / 1e3)
        left = profile.memory_bytes - used
        return DeviceLoad(name, causes.get(name, Cause()), used, left, buffer, read, memory.gpus)


def _chunk_sums(n: int, behind: int) -> Sums:
    return lambda cost, place, gpu: cost.chunk_sums(place, gpu, n, behind)


def _fitted(causes: dict[str, Cause], period: float, head: str) -> dict[str, Cause]:
    """Causes that add up to the period: what one token waited for disks is scaled to what tokens wait on average, and
    waiting for devices that are busy with other sequences counts as the head's overhead."""
    rest = period - total_ms(added(causes.values()))
    disk = sum(cause.disk_ms for cause in causes.values())
    if disk > 0:
        scale = max(disk + rest, 0.0) / disk
        causes = {n: msgspec.structs.replace(c, disk_ms=c.disk_ms * scale) for n, c in causes.items()}
        rest = period - total_ms(added(causes.values()))
    kept = causes[head]
    return causes | {head: msgspec.structs.replace(kept, overhead_ms=kept.overhead_ms + rest)}
