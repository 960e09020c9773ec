"""`homeinfer bench`: what is measured, and how it is counted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from homeinfer.cli import cluster_bench
from homeinfer.cli.cluster_bench import BenchResult, Compared, compared_line, measure, plan_steps, show
from homeinfer.cluster.client_bench import Timed, shares, together_per_s
from homeinfer.cluster.wire.client import AnswerDone, AskAnswer, DeviceStatus, FromClient, Tokens
from homeinfer.engine.request import Finish
from homeinfer.errors import HomeinferError
from tests.support.commands import HANG_SECONDS
from tests.support.scripted_coordinator import ScriptedCoordinator, ready_status


def device(name: str, compute: float, disk: float = 0.0, holding: float = 0.0) -> DeviceStatus:
    return DeviceStatus(name, "ready", layers=((0, 4),), compute_share=compute, disk_share=disk, holding_share=holding)


def test_what_the_context_and_the_cluster_do_not_allow_is_left_out_with_the_reason() -> None:
    status = msgspec.structs.replace(ready_status(Path("m.gguf")), n_ctx=600, sequences=3)
    steps = plan_steps(status, None, 32)
    assert steps.prompts == (16, 512)
    assert steps.at_once == (1, 2)
    assert [line for line in steps.left_out if "4,096" in line]
    assert len([line for line in steps.left_out if "--sequences" in line]) == 2


def test_the_shares_of_a_device_add_up_to_one() -> None:
    looks = [(device("desk", 0.5, 0.2, 0.55), device("laptop", 0.3, 0.0, 0.35))] * 3
    desk, laptop = shares(looks)
    assert (desk.compute, desk.disk, desk.network, desk.waiting) == pytest.approx((0.3, 0.2, 0.1, 0.4))
    assert (laptop.compute, laptop.disk, laptop.network, laptop.waiting) == pytest.approx((0.3, 0.0, 0.1, 0.6))


def test_devices_without_layers_have_no_shares() -> None:
    idle = DeviceStatus("attic", "ready")
    assert [share.name for share in shares([(device("desk", 0.9), idle)])] == ["desk"]
    assert shares([]) == ()


def test_times_are_counted_from_asking_and_between_tokens() -> None:
    timed = Timed(10.0, (10.5, 10.6, 10.8))
    assert timed.ttft_ms == pytest.approx(500)
    assert timed.tpot_ms == pytest.approx(150)
    assert together_per_s([timed, Timed(10.0, (10.5, 11.0))]) == pytest.approx(4 / 0.5)


def test_prediction_and_measurement_stand_in_one_line() -> None:
    line = compared_line(Compared(512, 2, 80.0, 81.2, 1300.0, 1400.0))
    assert "81.2 ms per token (80.0 ms predicted), first token after 1.40 s (1.30 s predicted)" in line
    assert "a prompt of 512 tokens, 2 answers at once" in line


@pytest.fixture
def coordinator(
    temp_folder: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ScriptedCoordinator]:
    """A cluster that answers at once, whatever it is asked."""
    monkeypatch.setenv("HOMEINFER_STATE", str(temp_folder))
    monkeypatch.setattr(cluster_bench, "FORGET_SECONDS", 0.0)
    monkeypatch.setattr(cluster_bench, "LOOK_SECONDS", 0.01)

    def answer(message: FromClient) -> Sequence[msgspec.Struct]:
        if not isinstance(message, AskAnswer):
            return []
        n = message.request.limit
        told = [Tokens(message.id, number, (1,)) for number in range(n)]
        return [*told, AnswerDone(message.id, n, Finish("length", 0, 0))]

    made = ScriptedCoordinator(temp_folder, ready_status(smollm2_path), answer)
    made.start()
    yield made
    made.close()


def asked(coordinator: ScriptedCoordinator) -> list[AskAnswer]:
    return [message for message in coordinator.heard if isinstance(message, AskAnswer)]


def test_answers_that_are_timed_share_no_memory_and_no_prompt(coordinator: ScriptedCoordinator) -> None:
    coordinator.status = msgspec.structs.replace(coordinator.status, n_ctx=1024, sequences=4)
    result = measure(5)
    assert [each.prompt_tokens for each in result.first_tokens] == [16, 512]
    assert [each.sequences for each in result.each_token] == [1, 2, 4]
    asks = asked(coordinator)
    assert all(ask.request.fresh and ask.request.ends == () for ask in asks)
    assert {len(ask.prompt) for ask in asks} == {16, 512}
    assert len({ask.prompt for ask in asks}) == len(asks) == len({ask.session for ask in asks})


@pytest.mark.usefixtures("coordinator")
def test_the_result_is_one_object_that_people_can_read_too(capsys: pytest.CaptureFixture[str]) -> None:
    result = measure(5)
    assert msgspec.json.decode(msgspec.json.encode(result), type=BenchResult) == result
    show(result)
    text = capsys.readouterr().out
    assert "time to the first token" in text
    assert "not measured: a prompt of 4,096 tokens: the context holds 256" in text


def test_a_cluster_that_is_busy_or_not_ready_is_not_measured(coordinator: ScriptedCoordinator) -> None:
    coordinator.status = msgspec.structs.replace(coordinator.status, answers=2)
    with pytest.raises(HomeinferError, match="is writing answers"):
        measure(5)
    coordinator.status = msgspec.structs.replace(coordinator.status, answers=0, state="loading")
    with pytest.raises(HomeinferError, match="not ready yet"):
        measure(5)
    assert asked(coordinator) == []


def test_without_a_cluster_it_is_one_line(temp_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOMEINFER_STATE", str(temp_folder))
    done = subprocess.run(
        [sys.executable, "-m", "homeinfer", "bench"], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("homeinfer: no cluster is running on this machine")
    assert done.stderr.count("\n") == 1
