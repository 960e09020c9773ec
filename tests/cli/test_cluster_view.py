"""What a cluster and a device look like, made from what they say of themselves."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from rich.console import Console, RenderableType

from homeinfer.cli.cluster_changes import Pace, changes, new_events, tasks_of
from homeinfer.cli.cluster_device_view import Part, after, is_problem, line_of, part_view
from homeinfer.cli.cluster_view import cluster_view, code_view, duration, registered_table
from homeinfer.cli.cluster_watch import meaning
from homeinfer.cluster.agent_options import (
    AgentEvent,
    Connected,
    Ended,
    EngineNow,
    Seeking,
    StatsNow,
    Trouble,
    Working,
)
from homeinfer.cluster.wire.client import ClusterState, ClusterStatus, DeviceStatus
from homeinfer.cluster.wire.control import DeviceStats

GB = 10**9
DESK = DeviceStatus("desk", "loading", is_head=True, host="10.0.0.1", share=0.42, layers=((0, 20), (60, 80)))
LAPTOP = DeviceStatus("laptop", "fetching", host="10.0.0.2", share=0.1, detail="2.1 of 21 GB", layers=((20, 60),))
PHONE = DeviceStatus("phone", "refused", detail="it runs homeinfer 0.0.9")
STARTING = ClusterStatus("loading", "qwen-72b", "/m/qwen-72b.gguf", 3, 4096, 1, (DESK, LAPTOP, PHONE))
BUSY = DeviceStats(memory_bytes=21 * GB, engine_bytes=20 * GB, available_bytes=3 * GB, total_bytes=32 * GB)
RUNNING = msgspec.structs.replace(
    STARTING,
    state="ready",
    devices=(
        DeviceStatus(
            "desk",
            "ready",
            is_head=True,
            layers=((0, 20), (60, 80)),
            streamed_layers=4,
            planned_memory_bytes=21 * GB,
            stats=BUSY,
            read_bytes_per_s=1.2e9,
            sent_bytes_per_s=2e5,
            compute_share=0.61,
        ),
        DeviceStatus("laptop", "ready", layers=((20, 60),), stats=msgspec.structs.replace(BUSY, stalled=0.25)),
        DeviceStatus("attic", "ready", detail="the others are faster without it"),
        DeviceStatus("cellar", "measured"),
        DeviceStatus("phone", "lost"),
    ),
    tokens_per_s=4.21,
    answers=2,
    answered=17,
    predicted_tpot_ms=231.0,
    recoveries=1,
)


def shown(view: RenderableType, width: int = 100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(view)
    return captured.get()


def line_with(text: str, word: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(word)]
    return line


def test_while_it_starts_each_device_shows_how_far_it_is() -> None:
    text = shown(cluster_view(STARTING, {"desk": 83.0, "laptop": 312.0}))
    assert "qwen-72b · 2 devices · 4,096 tokens of context · loading" in text
    assert "42 %" in line_with(text, "desk head")
    assert "83 s" in line_with(text, "desk head")
    laptop = line_with(text, "laptop")
    assert all(part in laptop for part in ("getting weights", "10 %", "5:12", "2.1 of 21 GB"))
    assert "refused" in line_with(text, "phone")
    assert "it runs homeinfer 0.0.9" in line_with(text, "phone")


def test_without_a_guess_no_time_is_shown() -> None:
    assert "83 s" not in shown(cluster_view(STARTING))


def test_while_it_runs_each_device_shows_layers_memory_disk_and_network() -> None:
    text = shown(cluster_view(RUNNING))
    desk = line_with(text, "desk head")
    assert "0–19, 60–79 (4 from disk)" in desk
    assert all(part in desk for part in ("61 %", "20.0 of 21.0 GB", "3.0 GB", "1.2 GB/s", "200 kB/s"))
    assert "laptop is short of memory, 25 % of the time" in text
    assert "attic takes no part: the others are faster without it" in text
    assert "cellar takes no part\n" in text.replace(" \n", "\n")
    assert "phone is lost" in text
    figures = line_with(text, "4.2 tokens/s")
    assert "2 answers being written · 17 written · 231 ms per token predicted · recovered 1 time" in figures


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    text = shown(cluster_view(RUNNING), 80)
    assert "…" not in text
    assert all(part in line_with(text, "desk head") for part in ("20.0 of 21.0 GB", "1.2 GB/s", "200 kB/s"))


def test_a_cluster_that_waits_says_for_what_on_the_screen_and_in_a_log() -> None:
    waiting = msgspec.structs.replace(STARTING, state="waiting", devices=(), waits_for="1 of 3 are here")
    text = shown(cluster_view(waiting))
    assert "waiting for devices: 1 of 3 are here" in text
    assert "starting" in text
    assert changes(None, waiting) == ("qwen-72b: waiting for devices: 1 of 3 are here",)
    assert changes(waiting, waiting) == ()


def test_layers_are_shown_of_devices_that_have_them_or_get_them() -> None:
    lost = DeviceStatus("phone", "lost", layers=((80, 90),))
    text = shown(cluster_view(msgspec.structs.replace(STARTING, devices=(DESK, lost))))
    assert "0–19, 60–79" in line_with(text, "desk head")
    assert "80–89" not in text


def test_a_cluster_that_writes_nothing_is_idle() -> None:
    assert "idle · 17 written" in shown(cluster_view(msgspec.structs.replace(RUNNING, answers=0)))


@pytest.mark.parametrize("state", get_args(ClusterState))
@pytest.mark.parametrize("width", [20, 80, 200])
def test_every_state_can_be_shown_on_any_width(state: ClusterState, width: int) -> None:
    for status in (STARTING, RUNNING):
        text = shown(cluster_view(msgspec.structs.replace(status, state=state, events=("laptop joined",))), width)
        assert max(map(len, text.splitlines())) <= width


def test_what_devices_and_events_say_is_shown_as_it_is() -> None:
    said = "[bold]not markup[/bold] [/]"
    strange = msgspec.structs.replace(LAPTOP, name="[red]", detail=said)
    text = shown(cluster_view(msgspec.structs.replace(STARTING, devices=(strange,), events=(said,))), 200)
    assert text.count(said) == 2
    assert "[red]" in text
    assert "[red]" in shown(registered_table((strange,)))


def test_the_code_stays_in_one_line_however_narrow_the_screen_is() -> None:
    code = "-".join(["ABCD"] * 30)
    console = Console(width=40, color_system=None)
    with console.capture() as captured:
        console.print(code_view(code), soft_wrap=True)
    assert f"homeinfer cluster join {code}\n" in captured.get()


def test_a_log_says_what_is_new_and_nothing_twice() -> None:
    first = changes(None, STARTING)
    assert first == (
        "qwen-72b: loading",
        "desk is loading",
        "laptop gets its weights: 2.1 of 21 GB",
        "phone was refused: it runs homeinfer 0.0.9",
    )
    assert changes(STARTING, STARTING) == ()
    further = msgspec.structs.replace(STARTING, devices=(DESK, msgspec.structs.replace(LAPTOP, share=0.2), PHONE))
    assert changes(STARTING, further) == ()
    assert changes(STARTING, msgspec.structs.replace(STARTING, events=("laptop left",))) == ("laptop left",)


def test_a_log_says_who_came_before_what_they_do_and_why_who_is_gone_once() -> None:
    alone = msgspec.structs.replace(STARTING, devices=(DESK,))
    came = msgspec.structs.replace(STARTING, devices=(DESK, LAPTOP), events=("laptop is here", "no plan: slow"))
    assert changes(alone, came) == ("laptop is here", "laptop gets its weights: 2.1 of 21 GB", "no plan: slow")
    gone = msgspec.structs.replace(LAPTOP, state="left")
    left = msgspec.structs.replace(came, devices=(DESK, gone), events=(*came.events, "laptop left (stopped)"))
    assert changes(came, left) == ("laptop left (stopped)",)


@pytest.mark.parametrize(
    ("before", "now", "new"),
    [
        ("", "ab", "ab"),
        ("ab", "ab", ""),
        ("ab", "abc", "c"),
        ("abc", "bcd", "d"),
        ("abc", "xyz", "xyz"),
        ("aa", "aaa", "a"),
    ],
)
def test_events_that_were_added_are_found_in_a_list_that_forgets(before: str, now: str, new: str) -> None:
    assert new_events(tuple(before), tuple(now)) == tuple(new)


def test_the_time_left_comes_from_how_fast_it_went() -> None:
    pace = Pace()
    assert pace.left({"desk": ("loading", 0.1)}, 100.0) == {}
    assert pace.left({"desk": ("loading", 0.3)}, 104.0) == {"desk": pytest.approx(14.0)}


def test_another_task_begins_its_time_anew() -> None:
    pace = Pace()
    pace.left({"desk": ("fetching", 0.9)}, 0.0)
    assert pace.left({"desk": ("loading", 0.95)}, 60.0) == {}
    assert pace.left({"desk": ("loading", 0.1)}, 61.0) == {}
    assert pace.left({"desk": ("loading", 0.6)}, 62.0) == {"desk": pytest.approx(0.8)}


def test_devices_that_are_gone_or_idle_have_no_time_left() -> None:
    pace = Pace()
    pace.left(tasks_of(STARTING), 0.0)
    assert pace.left({"desk": ("ready", None)}, 10.0) == {}
    assert pace.left({}, 10.0) == {}


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (8, "8 s"), (99.4, "99 s"), (125, "2:05"), (-3, "0 s")])
def test_times_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("\n", "yes"), ("y\n", "yes"), (" YES \n", "yes"), ("n\n", "no"), ("No\n", "no"), ("hm\n", None)],
)
def test_what_is_typed_at_the_plan_is_understood(typed: str, meant: str | None) -> None:
    assert meaning(typed) == meant


def part_after(*told: AgentEvent) -> Part:
    part = Part("desk")
    for number, event in enumerate(told):
        part = after(part, event, float(number))
    return part


def test_a_device_shows_what_it_is_doing_for_whom() -> None:
    part = part_after(Connected("laptop", "10.0.0.1"), Working("fetch", 0.3, "2.1 of 21 GB"))
    text = shown(part_view(part, {"fetch": 62.0}))
    assert "laptop · cluster of desk · connected" in text
    assert all(word in line_with(text, "getting weights") for word in ("30 %", "62 s left", "2.1 of 21 GB"))
    assert "Ctrl-C leaves" in text


def test_a_task_that_is_done_is_gone() -> None:
    part = part_after(
        Connected("laptop", ""), Working("load", 0.5), Working("load", 1.0), EngineNow("joined", ((2, 5),))
    )
    text = shown(part_view(part))
    assert "loading" not in text
    assert "takes part with layers 2–4" in text


def test_a_device_shows_rates_from_its_last_two_beats() -> None:
    before = DeviceStats(memory_bytes=GB, available_bytes=4 * GB, read_bytes=10**9, cpu_seconds=10.0)
    now = msgspec.structs.replace(before, read_bytes=11 * 10**8, sent_bytes=5 * 10**4, cpu_seconds=10.5, stalled=0.2)
    text = shown(part_view(part_after(StatsNow(before), StatsNow(now))), 160)
    assert "1.0 GB of memory, 4.0 GB free · disk 100 MB/s · sent 50 kB/s · 50 % of a core" in text
    assert "short of memory 20 % of the time" in text


def test_a_device_without_its_head_says_why_and_for_how_long() -> None:
    part = part_after(Connected("laptop", "10.0.0.1"), Seeking("10.0.0.1", "nothing answers there", 12.0))
    assert "looking for it for 12 s: nothing answers there" in shown(part_view(part))
    assert "connected" in shown(part_view(after(part, Connected("laptop", "10.0.0.1"), 20.0)))


def test_an_engine_that_ended_says_why() -> None:
    assert "the engine ended: out of memory" in shown(part_view(part_after(EngineNow("gone", (), "out of memory"))))


def test_a_devices_log_has_a_line_for_what_is_new() -> None:
    told: tuple[AgentEvent, ...] = (
        Seeking("10.0.0.1", ""),
        Seeking("10.0.0.1", "nothing answers"),
        Seeking("fd00::1", "no way there", 2.0),
        Seeking("10.0.0.1", "nothing answers", 3.0),
        Connected("laptop", "10.0.0.1"),
        Working("load", 0.1),
        Working("load", 0.2),
        EngineNow("joined", ((2, 5),)),
        EngineNow("none"),
        EngineNow("loading", ((4, 5),)),
        EngineNow("ready", ((4, 5), (5, 7), (9, 10))),
        StatsNow(DeviceStats()),
        Trouble("a chunk was wrong"),
    )
    part, lines = Part("desk"), []
    for event in told:
        line = line_of(event, part)
        lines += [line] if line is not None else []
        part = after(part, event, 0.0)
    assert lines == [
        "looking for desk: nothing answers",
        "looking for desk: no way there",
        "connected to desk (10.0.0.1) as laptop",
        "loading",
        "takes part with layers 2–4",
        "let go of its layers",
        "loading layer 4",
        "holds layers 4–6, 9",
        "a chunk was wrong",
    ]


def test_only_an_end_that_the_user_must_mend_is_a_problem() -> None:
    assert is_problem(Ended("this device was forgotten", is_problem=True))
    assert not is_problem(Ended("the cluster was taken down"))
    assert not is_problem(Trouble("a chunk was wrong"))
