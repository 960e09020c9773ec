"""What is done of what was decided, and how the head's own agent is kept alive."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from homeinfer.cluster.coordinator.commands import Performer
from homeinfer.cluster.coordinator.head import Head
from homeinfer.cluster.coordinator.kept import HeadFiles
from homeinfer.cluster.coordinator.options import ClusterOptions
from homeinfer.cluster.coordinator.own_agent import Lives
from homeinfer.cluster.coordinator.state import Cluster, KeepEpoch, MakePlan, Note, Tell
from homeinfer.cluster.wire.client import Notice, encode, to_client
from homeinfer.cluster.wire.control import FromHead, HeadBeat
from tests.cluster.coordinator.world import World


class Owner:
    """Who has commands performed, on a head of which there are only its files and what it says."""

    def __init__(self, folder: Path) -> None:
        self.cluster: Cluster = World(ClusterOptions("m.gguf"), ("desk",)).cluster
        self.told: list[tuple[str, FromHead]] = []
        self.ends: list[tuple[str, bool]] = []
        self.notes: list[str] = []
        self.notices: list[str] = []
        answers = SimpleNamespace(notice=self.notices.append)
        head = SimpleNamespace(files=HeadFiles(folder), control=self, answers=answers)
        self.performer = Performer(cast(Head, head), self)

    def send(self, device: str, message: FromHead) -> None:
        self.told.append((device, message))

    def make_plan(self, asked: MakePlan) -> None:
        raise AssertionError(asked)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def end(self, reason: str, *, is_problem: bool = False) -> None:
        self.ends.append((reason, is_problem))


def test_nobody_hears_of_an_epoch_that_is_not_on_disk(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    for command in (KeepEpoch(1), Tell("desk", HeadBeat())):
        owner.performer.perform(command)
    assert (owner.told, owner.ends) == ([("desk", HeadBeat())], [])
    (tmp_path / "cluster" / "epoch.json").unlink()
    (tmp_path / "cluster" / "epoch.json" / "in the way").mkdir(parents=True)
    for command in (KeepEpoch(2), Tell("desk", HeadBeat())):
        owner.performer.perform(command)
    assert len(owner.told) == 1
    ((reason, is_problem),) = owner.ends
    assert is_problem
    assert "epoch.json" in reason


def test_whoever_waits_for_an_answer_can_read_every_line_that_is_said(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    owner.performer.perform(
        Note("the engine of box ended: " + "x" * 2000 + ": joining the devices again", is_notice=True)
    )
    owner.performer.perform(Note("box joined"))
    (notice,) = owner.notices
    assert owner.notes == [notice, "box joined"]
    assert notice.startswith("the engine of box ended: x")
    assert to_client(encode(Notice(notice))) == Notice(notice)


def test_an_agent_that_does_not_come_up_five_times_is_given_up() -> None:
    lives = Lives()
    pauses = []
    for _ in range(5):
        assert not lives.is_hopeless
        lives = lives.after(1.0, 1)
        pauses.append(lives.pause)
    assert lives.is_hopeless
    assert pauses == sorted(pauses)
    assert 0 < pauses[0] < 1
    assert lives.after(1000.0, 1) == Lives()


def test_an_agent_that_is_killed_again_and_again_comes_back_each_time() -> None:
    lives = Lives()
    for _ in range(50):
        lives = lives.after(0.5, -signal.SIGKILL)
    assert not lives.is_hopeless
    assert 1 < lives.pause <= 5
    for _ in range(5):
        lives = lives.after(0.5, -signal.SIGSEGV)
    assert lives.is_hopeless
