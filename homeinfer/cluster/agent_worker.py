"""A process that does one job for its agent: `python -m homeinfer.cluster.agent_worker`, a Job line on stdin.

It ends when that closes, however the agent ended, and removes what it was writing first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec

from homeinfer.cluster.agent_jobs import (
    Cut,
    FindHead,
    Found,
    FromJob,
    Job,
    MeasureDevice,
    ModelHere,
    OpenEnd,
    Profiled,
    Result,
    Share,
    TimeLink,
    Unable,
    Windows,
)
from homeinfer.cluster.agent_windows import remove_unused
from homeinfer.cluster.wire.control import EngineOptions, WindowRun
from homeinfer.errors import HomeinferError
from homeinfer.folders import free_bytes

if TYPE_CHECKING:
    from homeinfer.engine.window_spec import WindowSpec
    from homeinfer.model.header import Header

Say = Callable[[FromJob], None]
_SAY_SECONDS = 0.2


def do(job: Job, say: Say) -> Result:
    """Raises HomeinferError."""
    match job:
        case Cut():
            return cut(job, say)
        case MeasureDevice():
            return measure(job, say)
        case TimeLink() | OpenEnd():
            from homeinfer.cluster import agent_links

            return agent_links.time_link(job) if isinstance(job, TimeLink) else agent_links.open_end(job, say)
        case FindHead(key):
            return find(key)


def cut(job: Cut, say: Say) -> Windows:
    """The part's windows, whose files are cut where they are missing. Raises HomeinferError."""
    from homeinfer.model.header import read_header
    from homeinfer.model.window_file import cut_windows, missing_bytes

    header = read_header(job.model.path, vocabulary=False)
    edges = check_runs(job.runs, header)
    check_held(job.model, header, edges)
    model, folder = Path(header.files[0].path), Path(job.folder)
    paths = [model]
    if not is_whole(edges, header):
        missing, done = missing_bytes(header, edges, folder), 0
        make_room(job, header, edges, missing)

        def progress(n: int) -> None:
            nonlocal done
            done += n
            say(Share(done / max(missing, 1)))

        paths = cut_windows(header, edges, folder, progress)
    specs = window_specs(header, job.runs, paths, job.options, job.n_threads)
    return Windows(msgspec.Raw(msgspec.json.encode(specs)), tuple(str(path) for path in paths), str(model))


def make_room(job: Cut, header: Header, edges: tuple[tuple[int, int], ...], missing: int) -> None:
    """For so many bytes: where the disk has not enough, windows of other plans go, then other models. Raises
    HomeinferError when that does not help."""
    from homeinfer.cluster.weights import room
    from homeinfer.model.window_file import window_path

    folder = Path(job.folder)
    if missing and free_bytes(folder) < missing + room.RESERVE_BYTES:
        needed = [str(window_path(header, first, last, folder)) for first, last in edges]
        remove_unused(folder, needed, kept=1)
        room.make_room(Path(job.model.weights) / "models", missing)


def check_held(model: ModelHere, header: Header, edges: tuple[tuple[int, int], ...]) -> None:
    """Raises HomeinferError when a window needs what is not on this disk: it would be cut from holes."""
    from homeinfer.cluster.weights.manifest import needed_tensors

    needed = {number for first, last in edges for number in needed_tensors(header, model.manifest, first, last)}
    missing = needed - set(model.held)
    if missing:
        raise HomeinferError(f"{len(missing)} of the {len(needed)} tensors of its layers are not on this device yet")


def check_runs(runs: tuple[WindowRun, ...], header: Header) -> tuple[tuple[int, int], ...]:
    """The runs' edges. Raises HomeinferError for layers that the model does not have."""
    from homeinfer.model.window_plan import n_layers

    if not runs or not all(0 <= run.first < run.last <= n_layers(header) for run in runs):
        raise HomeinferError(
            f"the plan names layers that {model_name(header)} does not have: it has {n_layers(header)}"
        )
    return tuple((run.first, run.last) for run in runs)


def model_name(header: Header) -> str:
    return Path(header.files[0].path).name


def is_whole(edges: tuple[tuple[int, int], ...], header: Header) -> bool:
    """Whether one window is all of the model: then it is loaded from the model's file."""
    from homeinfer.model.window_plan import n_layers

    return edges == ((0, n_layers(header)),)


def window_specs(
    header: Header, runs: tuple[WindowRun, ...], paths: list[Path], options: EngineOptions, n_threads: int
) -> tuple[WindowSpec, ...]:
    """How to load each run's window."""
    from homeinfer.cluster.local import RingOptions, placed, threads, window_spec
    from homeinfer.profiling.machine import this_machine

    common = RingOptions(
        n_ctx=options.n_ctx,
        n_batch=options.n_batch,
        n_seq=options.n_seq,
        n_threads=n_threads or min(threads(0), this_machine().cores),
        flash_attention=options.flash_attention,
    )

    return tuple(
        window_spec(header, path, run.first, run.last, placed(common, run.place, run.gpu))
        for run, path in zip(runs, paths, strict=True)
    )


def measure(job: MeasureDevice, say: Say) -> Profiled:
    """This device's profile with the model. Raises HomeinferError."""
    from homeinfer.model.header import read_header
    from homeinfer.profiling.measure import ProfileOptions, measure_profile

    header = read_header(job.model.path, vocabulary=False)
    options = ProfileOptions(name=job.name, n_threads=job.n_threads, fresh=job.fresh)
    return Profiled(measure_profile(without_holes(header), options, lambda what, share, _: say(Share(share, what))))


def without_holes(header: Header) -> Header:
    """The header as of a file without data where the file is mostly holes: the disk would be found to read them at the
    speed of memory."""
    sizes = [Path(file.path).stat() for file in header.files]
    blocks = sum(getattr(size, "st_blocks", 1 << 60) * 512 for size in sizes)
    if blocks > 0.9 * sum(size.st_size for size in sizes):
        return header
    files = tuple(msgspec.structs.replace(file, size=file.data_offset) for file in header.files)
    return msgspec.structs.replace(header, files=files)


def find(key: str) -> Found:
    """Where the head is, as far as the network says."""
    from homeinfer.cluster import discovery

    found = asyncio.run(discovery.find(key))
    return Found(found.hosts, found.port) if found is not None else Found((), 0)


class _Agent:
    """The lines to the agent, and the end that comes from it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said = 0.0

    def say(self, message: FromJob) -> None:
        """Tell the agent; how far it is, only some times a second."""
        now = time.monotonic()
        if isinstance(message, Share) and now - self._said < _SAY_SECONDS:
            return
        self._said = now
        with self._lock, contextlib.suppress(BrokenPipeError):
            sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
            sys.stdout.buffer.flush()

    def leave_with_it(self) -> None:
        """Interrupt the job when stdin ends."""
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGINT)


def main() -> NoReturn:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    agent = _Agent()
    try:
        job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
        threading.Thread(target=agent.leave_with_it, daemon=True).start()
        agent.say(do(job, agent.say))
    except HomeinferError as problem:
        agent.say(Unable(str(problem)))
    except MemoryError:
        agent.say(Unable("this device has no memory left for it"))
    except (msgspec.MsgspecError, OSError) as problem:
        agent.say(Unable(f"the process that works for this device failed: {problem}"))
    except KeyboardInterrupt:
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
