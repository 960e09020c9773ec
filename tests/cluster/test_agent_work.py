"""What an agent lets other processes do for it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec
import psutil
import pytest

from homeinfer.cluster.agent_jobs import FindHead, MeasureDevice, ModelHere, Opened, OpenEnd, Share
from homeinfer.cluster.agent_work import work, working_bytes
from homeinfer.cluster.agent_worker import check_held, check_runs, without_holes
from homeinfer.cluster.planning.kinds import layer_kinds, output_kind
from homeinfer.cluster.planning.profile import Disk, KindTimes
from homeinfer.cluster.weights.manifest import make_manifest, needed_tensors
from homeinfer.cluster.wire import control
from homeinfer.cluster.wire.control import WindowRun
from homeinfer.cluster.wire.keys import DeviceKeys
from homeinfer.cluster.wire.transport import new_keys
from homeinfer.errors import HomeinferError
from homeinfer.folders import free_bytes
from homeinfer.model.header import Header, read_header
from homeinfer.profiling.cache import Cache
from homeinfer.profiling.machine import this_machine
from homeinfer.profiling.measure import BASE, Base
from homeinfer.profiling.model_times import ModelTimes, timing_plan
from tests.support.scripted_head import HERE, a_head, agent_options, an_agent, tiny_model


def measured_before(header: Header, windows: Path, profiles: Path) -> None:
    """As if this device had been measured with the model already, with one thread."""
    cache = Cache(this_machine(), 1, profiles)
    disk = Disk(sequential_bytes_per_s=2e9, layer_bytes_per_s=1.5e9, fault_bytes_per_s=1e8, free_bytes=0)
    kinds = (*dict.fromkeys(layer_kinds(header)), output_kind(header))
    times = tuple(KindTimes(kind, place, 0.1, 0.2, 3.0) for kind in kinds for place in ("resident", "mapped"))
    windows.mkdir(parents=True)
    cache.put(f"disk {windows.stat().st_dev}", disk)
    cache.put(BASE, Base(1e10, 90_000_000, 0.2, 0.1, 1e9, 0.01, is_disturbed=False))
    cache.put(timing_plan(header, (), free_bytes(windows)).name, ModelTimes(times, 0.01, is_disturbed=False))


def test_a_device_is_measured_and_its_links_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path / "model")
    monkeypatch.setenv("HOMEINFER_PROFILES", str(tmp_path / "profiles"))
    measured_before(read_header(model), tmp_path / "desk" / "windows", tmp_path / "profiles")

    async def test() -> None:
        async with a_head(tmp_path / "head") as head, an_agent(agent_options(head, tmp_path / "desk")):
            await head.expect(control.Hello)
            manifest, source = head.serve(model, tmp_path / "head-weights")
            head.say(control.Know(manifest, source))
            head.say(control.Measure(manifest.digest))
            profile = (await head.expect(control.Measured)).profile
            assert (profile.name, profile.threads, profile.disk.sequential_bytes_per_s) == ("desk", 1, 2e9)
            assert profile.disk.free_bytes > 0
            assert {times.place for times in profile.times} == {"resident", "mapped"}

            sizes = (8192, 1 << 20)
            head.say(control.Echo(7, head.device_key, sizes))
            port = (await head.expect(control.Echoing, lambda m: m.id == 7)).port
            head.say(control.Probe(7, "lap", HERE, port, head.device_key, sizes, 0.0))
            link = (await head.expect(control.Probed, lambda m: m.id == 7)).link
            assert link.to == "lap"
            assert link.bytes_per_s > 1e6  # without bound where the shorter messages met other programs' work
            assert 0 <= link.latency_s < 1

    asyncio.run(asyncio.wait_for(test(), 120))


def test_an_end_of_a_link_is_closed_to_others_ends_with_its_agent_and_its_memory_is_lent() -> None:
    async def test() -> None:
        opened: list[Share | Opened] = []
        own, other = (DeviceKeys(*new_keys()) for _ in range(2))
        before = set(psutil.Process().children())
        task = asyncio.create_task(work(OpenEnd(f"tcp://{HERE}:*", own, other.public, (1, 2)), opened.append))
        while not opened:
            await asyncio.sleep(0.02)
        (worker,) = set(psutil.Process().children()) - before
        assert 5e6 < working_bytes() <= worker.memory_info().rss
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert not worker.is_running()
        assert working_bytes() == 0

    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_job_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    manifest = make_manifest(read_header(model), folder=tmp_path / "weights")
    here = ModelHere(manifest, str(tmp_path / "gone.gguf"), (), str(tmp_path))
    with pytest.raises(HomeinferError, match=r"gone\.gguf.*no such file") as raised:
        asyncio.run(work(MeasureDevice(here, "desk", 1, fresh=False)))
    assert "\n" not in str(raised.value)


def test_a_process_that_says_what_nobody_understands_is_ended(tmp_path: Path) -> None:
    """As a library would that prints: here every Python of this environment does."""
    (tmp_path / "sitecustomize.py").write_text("print('welcome to the library', flush=True)\n")
    before = set(psutil.Process().children())
    with pytest.raises(HomeinferError, match="said what can't be read"):
        asyncio.run(work(FindHead("k" * 40), environment={**os.environ, "PYTHONPATH": str(tmp_path)}))
    assert set(psutil.Process().children()) == before


def test_a_process_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nos.write(2, b'out of luck\\n')\nos._exit(3)\n")
    with pytest.raises(HomeinferError, match="ended with status 3: out of luck"):
        asyncio.run(work(FindHead("k" * 40), environment={**os.environ, "PYTHONPATH": str(tmp_path)}))


def test_windows_are_not_cut_from_what_is_not_there(tmp_path: Path) -> None:
    header = read_header(tiny_model(tmp_path / "model"))
    manifest = make_manifest(header, folder=tmp_path / "weights")
    held = needed_tensors(header, manifest, 1, 3)
    check_held(ModelHere(manifest, "", held, ""), header, ((1, 3),))
    with pytest.raises(HomeinferError, match="are not on this device yet"):
        check_held(ModelHere(manifest, "", held, ""), header, ((0, 2),))


@pytest.mark.parametrize("edges", [(), ((0, 1000),), ((2, 2),), ((3, 1),)])
def test_layers_that_the_model_does_not_have_are_refused(tmp_path: Path, edges: tuple[tuple[int, int], ...]) -> None:
    header = read_header(tiny_model(tmp_path / "model"))
    with pytest.raises(HomeinferError, match=r"layers that tiny\.gguf does not have"):
        check_runs(tuple(WindowRun(first, last, "r") for first, last in edges), header)


def test_a_disk_is_not_measured_on_the_holes_of_a_file(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model")
    header = read_header(path)
    assert without_holes(header) is header
    copy = tmp_path / "copy.gguf"
    with copy.open("wb") as file:
        file.write(path.read_bytes()[: header.files[0].data_offset])
        file.truncate(path.stat().st_size * 100)
    assert without_holes(msgspec.structs.replace(header, files=read_header(copy).files)).truncated
