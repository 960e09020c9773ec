"""Devices that compute slower than when they were measured: when that is said, and of whom."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from homeinfer.cli import cluster_bench
from homeinfer.cli.cluster_bench import measure, show
from homeinfer.cli.cluster_view import remarks, slow_line
from homeinfer.cluster.coordinator.answer_rules import is_plain_step
from homeinfer.cluster.coordinator.kept import HeadFiles
from homeinfer.cluster.coordinator.show import slowdown
from homeinfer.cluster.coordinator.speed import ENOUGH, Rates, Speed
from homeinfer.cluster.plan_files import header_digest
from homeinfer.cluster.planning.plan import Cause
from homeinfer.cluster.planning.profile import Link
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.cluster.wire.client import DeviceStatus
from homeinfer.cluster.wire.keys import own_keys
from homeinfer.cluster.wire.messages import Spent
from homeinfer.model.header import read_header
from tests.cluster.coordinator.homes import TestCluster, cluster, of_two, profile
from tests.cluster.coordinator.world import running


def spent(*computing_ms: float) -> tuple[Spent, ...]:
    return tuple(Spent(1e3 * ms, 2e3 * ms) for ms in computing_ms)


def test_a_token_takes_what_its_windows_computed_for_most_of_those_that_were_alone() -> None:
    speed = Speed()
    for number in range(ENOUGH):
        assert speed.computing_ms((0, 2)) is None
        speed.token(0.0, spent(99, 99, 99))
        speed.token(0.0, spent(900 if number < 3 else 4, 7, 2), is_alone=True)
    assert speed.computing_ms((0, 2)) == pytest.approx(6)
    assert speed.computing_ms((1,)) == pytest.approx(7)
    assert speed.computing_ms(()) is None
    assert speed.computing_ms((3,)) is None
    speed.other_ring()
    assert speed.computing_ms((1,)) is None


def test_steps_with_a_prompt_and_those_behind_more_than_was_planned_do_not_count() -> None:
    assert is_plain_step(1, 512, 512)
    assert not is_plain_step(0, 16, 512)
    assert not is_plain_step(1, 513, 512)


def test_what_is_no_time_says_nothing() -> None:
    speed = Speed()
    for _ in range(ENOUGH):
        speed.token(0.0, (Spent(float("inf"), 0.0), Spent(float("nan"), 0.0)), is_alone=True)
    assert speed.computing_ms((0,)) is None
    assert speed.computing_ms((1,)) is None


def changed(report: PlanReport, **changes: object) -> PlanReport:
    """With other figures for all devices."""
    devices = tuple(msgspec.structs.replace(device, **changes) for device in report.devices)
    return msgspec.structs.replace(report, devices=devices)


def test_a_device_is_compared_with_what_the_plan_says_of_its_layers() -> None:
    world = running()
    assert world.cluster.plan is not None
    report = changed(world.cluster.plan.report, cause=Cause(compute_ms=9.6))
    desk, box = world.cluster.device("desk"), world.cluster.device("box")
    ms = Rates(computing_ms=20.0)
    assert slowdown(report, desk, ms) == pytest.approx(2.0)  # two windows, 0.2 ms for each
    assert slowdown(report, box, ms) == pytest.approx(20 / 9.8)
    assert slowdown(report, box, Rates()) is None
    streamed = tuple(msgspec.structs.replace(window, streamed_layers=1) for window in report.windows)
    assert slowdown(msgspec.structs.replace(report, windows=streamed), box, ms) is None
    four = msgspec.structs.replace(report.workload, sequences=4)
    assert slowdown(msgspec.structs.replace(report, workload=four), box, ms) is None
    assert slowdown(report, msgspec.structs.replace(box, is_given=True), ms) is None
    assert slowdown(report, msgspec.structs.replace(box, name="pod"), ms) is None


def test_only_a_device_that_is_much_slower_is_worth_a_line() -> None:
    assert slow_line("box", 2.14).startswith("box computes 2.1 times slower than when it was measured")
    assert slow_line("box", 1.4) == slow_line("box", 0.2) == slow_line("box", None) == ""
    desk, box = (DeviceStatus(name, "ready", layers=((0, 4),)) for name in ("desk", "box"))
    slow = msgspec.structs.replace(box, slowdown=2.14)
    assert remarks((desk, slow)).plain == slow_line("box", 2.14)
    assert not remarks((desk, box))


@pytest.fixture
def remembered(smollm2_path: Path, temp_folder: Path) -> Iterator[TestCluster]:
    """A cluster whose devices were measured before: desk when it was a hundred times slower than any is, box when it
    took no time at all."""
    digest = header_digest(read_header(smollm2_path))
    with cluster(temp_folder, of_two(smollm2_path, n_ctx=128)) as made:
        files, states = HeadFiles(made.head.state), (made.head.state, temp_folder / "box" / "state")
        for state, name, rate, other in zip(states, ("desk", "box"), (1e8, 1e14), ("box", "desk"), strict=True):
            known = profile(smollm2_path, name, rate=rate)
            known = msgspec.structs.replace(known, window_ms=0.0, links=(Link(other, 1e8, 1e-4),))
            files.keep_profile(own_keys(state).public, digest, known)
        made.up()
        made.join("box")
        made.ready(2)
        yield made


def test_bench_and_status_name_the_device_that_is_slower_than_it_was_and_no_other(
    remembered: TestCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOMEINFER_STATE", str(remembered.head.state))
    monkeypatch.setattr(cluster_bench, "FORGET_SECONDS", 0.0)
    monkeypatch.setattr(cluster_bench, "LOOK_SECONDS", 0.01)
    result = measure(2 * ENOUGH)
    times = {each.name: each.times for each in result.slowdowns}
    assert times["box"] > 1.5 > times["desk"]
    show(result)
    said = capsys.readouterr().out
    status = remembered.status()
    assert status is not None
    for text in (said, remarks(status.devices).plain):
        assert "box computes" in text
        assert "desk computes" not in text
