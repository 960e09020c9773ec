"""scripts/soak.py counts what it says: wrong answers, and what is left behind."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from home_cluster import HomeOptions, LoopbackHome
from soak import left_behind
from soak_answers import Chat, Reference, judge
from soak_faults import draw

KNOWN = Reference([1, 2], [10, 11, 12], [3.0, 0.01, 3.0])


@pytest.fixture
def made() -> Iterator[LoopbackHome]:
    found = LoopbackHome(HomeOptions(("none",) * 2, name="test"))
    try:
        yield found
    finally:
        found.down()


@pytest.mark.parametrize(
    ("tokens", "is_wrong", "is_tie"),
    [
        ([10, 11, 12], False, False),
        ([10, 99, 98], False, True),
        ([99, 11, 12], True, False),
        ([10, 11, 99], True, False),
        ([10, 11], True, False),
        ([10, 11, 12, 13], True, False),
        ([], True, False),
    ],
)
def test_an_answer_is_judged_by_its_first_difference(tokens: list[int], is_wrong: bool, is_tie: bool) -> None:
    wrong, tie = judge(KNOWN, tokens)
    assert (wrong is not None, tie) == (is_wrong, is_tie)


def test_a_chat_that_fails_in_a_way_that_nobody_foresaw_counts_as_a_wrong_answer() -> None:
    stop = threading.Event()
    chat = Chat(cast(Path, 3), (KNOWN,), 0, stop)
    chat.start()
    while not chat.answers:
        assert chat.is_alive()
    stop.set()
    chat.join()
    assert "TypeError" in str(chat.answers[0].wrong)


def test_a_home_that_was_left_clean_has_nothing_left_behind(made: LoopbackHome) -> None:
    for path in ("0/state/keys.json", "0/state/cluster/epoch.json", "1/windows/cluster/ab-0-4.gguf", "1/log"):
        (made.root / path).parent.mkdir(parents=True, exist_ok=True)
        (made.root / path).touch()
    assert left_behind(made) == []


def test_processes_sockets_and_temporary_files_are_found(made: LoopbackHome) -> None:
    paths = ["0/state/.epoch.json.x1", "1/windows/.w.gguf.part", "1/weights/a.partial", "tmp7", "homeinfer-9/engine"]
    for path in paths:
        (made.root / path).parent.mkdir(parents=True, exist_ok=True)
        (made.root / path).touch()
    sleeper = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "HOMEINFER_STATE": str(made.root)},
    )
    with sleeper, contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(made.root / "0" / "clients.sock"))
        assert sleeper.stdout is not None
        sleeper.stdout.readline()  # one that has just begun has neither command line nor environment yet
        found = left_behind(made)
        assert sleeper.stdin is not None
        sleeper.stdin.close()
    assert set(paths) | {"0/clients.sock"} <= set(found)
    assert any("input()" in each for each in found)


def test_faults_meet_all_kinds_and_all_devices_they_can() -> None:
    source = random.Random(1)
    kinds = ["engine", "agent", "asleep", "head", "cut", "slow", "memory"]
    drawn = [draw(source, 3, kinds) for _ in range(400)]
    assert {fault.kind for fault in drawn} == set(kinds)
    assert {fault.device for fault in drawn if fault.kind == "engine"} == {0, 1, 2}
    assert {fault.device for fault in drawn if fault.kind in ("agent", "cut")} == {1, 2}
    assert {fault.device for fault in drawn if fault.kind == "head"} == {0}
    assert all(1 <= fault.seconds <= 60 for fault in drawn if fault.kind != "engine")
