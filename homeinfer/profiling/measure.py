"""The profile of this device: what is measured, in which order, and what is taken from before."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil

from homeinfer.cluster.local import threads
from homeinfer.cluster.planning.profile import DeviceProfile, Disk, Gpu
from homeinfer.errors import HomeinferError
from homeinfer.folders import free_bytes, windows_folder
from homeinfer.model.header import Header, printable
from homeinfer.profiling.cache import Cache
from homeinfer.profiling.cache import default_folder as cache_folder
from homeinfer.profiling.disk import measure_disk
from homeinfer.profiling.machine import Machine, this_machine, usable_memory
from homeinfer.profiling.memory_speed import measure_memory
from homeinfer.profiling.model_times import ModelTimes, TimingPlan, time_model, times_name, timing_plan
from homeinfer.profiling.progress import OnProgress, Steps, silent
from homeinfer.profiling.quiet import NOISY
from homeinfer.profiling.timer import Timer, timer
from homeinfer.profiling.window_times import Bench, Patience, window_costs

BASE = "base 2"
"""Under this name what does not depend on disk and model is kept."""
_DISK_SECONDS, _MEMORY_SECONDS, _BASE_SECONDS = 6.0, 1.5, 4.0
_BASE_PATIENCE, _MODEL_SECONDS = 5.0, 32.0
_MOST_NAME = 64
_PREFIX = ".profile-"


class ProfileOptions(msgspec.Struct, frozen=True):
    """name "": the machine's own. n_threads 0: one per core. fresh: nothing is taken from before."""

    name: str = ""
    n_threads: int = 0
    fresh: bool = False


class Base(msgspec.Struct, frozen=True):
    """What does not depend on a model."""

    memory_bytes_per_s: float
    overhead_bytes: int
    window_ms: float
    hop_ms: float
    attention_macs_per_s: float
    noise: float
    is_disturbed: bool


class _Run:
    """One profile under way."""

    def __init__(self, header: Header | None, options: ProfileOptions, folder: Path, steps: Steps) -> None:
        self.machine: Machine = this_machine()
        self.n_threads = options.n_threads or min(threads(0), self.machine.cores)
        self.header, self.folder, self.steps = header, folder, steps
        self.cache = Cache(self.machine, self.n_threads, cache_folder(), fresh=options.fresh)


def measure_profile(header: Header | None, options: ProfileOptions, on_progress: OnProgress = silent) -> DeviceProfile:
    """Measure this device, with a model's header also every kind of its layers. Under 60 seconds, and under 10 where
    it was measured before.

    Raises HomeinferError when there is no room on disk or in memory, when llama.cpp can't run the model's layers, and
    for a model that homeinfer can't cut into windows.
    """
    with work_folder(windows_folder()) as folder:
        run = _Run(header, options, folder, Steps(on_progress))
        disk_name = f"disk {folder.stat().st_dev}"
        disk, base = run.cache.get(disk_name, Disk), run.cache.get(BASE, Base)
        run.steps.expect((disk is None) * _DISK_SECONDS + (base is None) * (_MEMORY_SECONDS + _BASE_SECONDS))
        with timer(_subject(header)) as process:
            gpus = process.gpus()
            before = None if header is None else run.cache.get(times_name(header, gpus), ModelTimes)
            is_known = header is None or before is not None
            plan = None if header is None or is_known else timing_plan(header, gpus, free_bytes(folder))
            run.steps.expect(plan.seconds if plan is not None else 0.0)
            if disk is None:
                run.steps.begin("disk", _DISK_SECONDS)
                disk = measure_disk(folder, _on_disk(header), n_threads=run.n_threads, on_progress=run.steps.part)
                run.cache.put(disk_name, disk)
            if base is None:
                base = _base(run, process)
                run.cache.put(BASE, base)
            if plan is not None:
                before = _times(run, process, plan, base)
        return _profile(run, options, disk, base, gpus, before)


def _subject(header: Header | None) -> str:
    return "homeinfer profile" if header is None else printable(header.files[0].path, 1000)


def _on_disk(header: Header | None) -> Path | None:
    return None if header is None or header.truncated else Path(header.files[0].path)


def _bench(run: _Run, process: Timer, patience: float) -> Bench:
    return Bench(process, run.folder, run.n_threads, run.machine.cache_bytes, Patience(patience))


def _base(run: _Run, process: Timer) -> Base:
    run.steps.begin("memory", _MEMORY_SECONDS)
    speed = measure_memory(run.n_threads, run.machine.cache_bytes, usable_memory())
    run.steps.begin("steps and messages", _BASE_SECONDS)
    costs = window_costs(_bench(run, process, _BASE_PATIENCE), run.steps.part)
    return Base(
        memory_bytes_per_s=speed,
        overhead_bytes=costs.overhead_bytes,
        window_ms=costs.window_ms,
        hop_ms=process.hop_ms(run.folder),
        attention_macs_per_s=costs.attention_macs_per_s,
        noise=costs.noise,
        is_disturbed=costs.is_disturbed,
    )


def _times(run: _Run, process: Timer, plan: TimingPlan, base: Base) -> ModelTimes:
    assert run.header is not None
    bench = _bench(run, process, max(_MODEL_SECONDS - plan.seconds, 0.0))
    found = time_model(run.header, plan, bench, base.window_ms, run.steps)
    run.cache.put(plan.name, found)
    return found


def _profile(
    run: _Run, options: ProfileOptions, disk: Disk, base: Base, gpus: tuple[Gpu, ...], times: ModelTimes | None
) -> DeviceProfile:
    rate = times.stream_bytes_per_s if times is not None and times.stream_bytes_per_s else disk.layer_bytes_per_s
    noise = max(base.noise, times.noise if times is not None else 0.0)
    disturbed = base.is_disturbed or (times is not None and times.is_disturbed)
    return DeviceProfile(
        name=(options.name or printable(socket.gethostname()) or "device")[:_MOST_NAME],
        memory_bytes=usable_memory(),
        cores=run.machine.cores,
        threads=run.n_threads,
        memory_bytes_per_s=base.memory_bytes_per_s,
        disk=msgspec.structs.replace(
            disk,
            free_bytes=free_bytes(run.folder),
            layer_bytes_per_s=rate,
            fault_bytes_per_s=min(disk.fault_bytes_per_s, rate),
        ),
        cpu=run.machine.cpu,
        system=run.machine.system,
        overhead_bytes=base.overhead_bytes,
        window_ms=base.window_ms,
        hop_ms=base.hop_ms,
        gpus=gpus,
        times=() if times is None else times.times,
        attention_macs_per_s=base.attention_macs_per_s,
        is_quiet=noise <= NOISY and not disturbed,
        noise=noise,
    )


@contextlib.contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """A folder for temporary files, which goes in any case; those of profiles that were killed go as well.

    Raises HomeinferError when it can't be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for old in parent.glob(f"{_PREFIX}*"):
            pid = old.name.removeprefix(_PREFIX).split("-")[0]
            if pid.isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(old, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
    except OSError as problem:
        raise HomeinferError(
            f"{parent} can't be written ({problem.strerror}): set HOMEINFER_WINDOWS to another folder"
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
