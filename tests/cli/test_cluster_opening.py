"""When run and chat let the running cluster answer, and what they say about it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from homeinfer.cli.cluster_opening import is_same_model, opened_cluster, using_line
from homeinfer.cli.opening import opened
from homeinfer.cluster.local import RingOptions
from homeinfer.cluster.wire.client import AnswerDone, AskAnswer, FromClient, Notice, Tokens
from homeinfer.engine.request import Finish, Sampling
from homeinfer.errors import HomeinferError
from tests.support.scripted_coordinator import ScriptedCoordinator, ready_status

PLAIN = RingOptions()


def one_token(message: FromClient) -> Sequence[msgspec.Struct]:
    if not isinstance(message, AskAnswer):
        return []
    done = AnswerDone(message.id, 1, Finish("length", 0, 0))
    return [Notice("laptop left"), Tokens(message.id, 0, (message.prompt[0],)), done]


@pytest.fixture
def coordinator(
    temp_folder: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ScriptedCoordinator]:
    monkeypatch.setenv("HOMEINFER_STATE", str(temp_folder))
    made = ScriptedCoordinator(temp_folder, ready_status(smollm2_path), one_token)
    made.start()
    yield made
    made.close()


@pytest.mark.usefixtures("coordinator")
@pytest.mark.parametrize("is_named", [False, True])
def test_the_cluster_answers_for_its_model_and_when_none_is_named(
    is_named: bool, smollm2_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with opened(smollm2_path if is_named else None, PLAIN) as ready:
        prompt = ready.tokenizer.encode("Hello")
        outcome = ready.generator.answer(prompt, Sampling(), 1)
        assert outcome.tokens == prompt[:1]
        assert ready.name == smollm2_path.stem
        assert [device.name for device in ready.generator.teller.devices] == ["desk", "laptop"]
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "the cluster on this machine answers: desk, laptop (--local goes without it)",
        "",
        "[laptop left]",
    ]


def test_what_is_to_be_read_by_a_program_has_no_remarks(
    coordinator: ScriptedCoordinator, capfd: pytest.CaptureFixture[str]
) -> None:
    with opened(None, PLAIN, quiet=True) as ready:
        ready.generator.answer([1], Sampling(), 1)
    assert capfd.readouterr().err == ""
    assert any(isinstance(message, AskAnswer) for message in coordinator.heard)


@pytest.mark.usefixtures("coordinator")
def test_another_model_is_left_to_this_machine_and_that_is_said(
    smollm2_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copy(smollm2_path, tmp_path / "other.gguf"))
    with opened_cluster(other, PLAIN, quiet=False) as ready:
        assert ready is None
    assert capfd.readouterr().err == (
        f"the cluster on this machine runs {smollm2_path.stem}: other.gguf runs on this machine alone\n"
    )


@pytest.mark.usefixtures("coordinator")
def test_a_file_that_is_no_model_is_one_line_with_a_cluster_too(tmp_path: Path) -> None:
    letter = tmp_path / "letter.txt"
    letter.write_text("Dear model,\nplease answer.\n")
    with pytest.raises(HomeinferError, match="not a GGUF model"), opened(letter, PLAIN):
        pass


@pytest.mark.parametrize("devices", [1, 2])
def test_who_wants_this_machine_alone_gets_it(devices: int, coordinator: ScriptedCoordinator, tmp_path: Path) -> None:
    letter = tmp_path / "letter.txt"
    letter.write_text("Dear model,\nplease answer.\n")
    alone = opened(letter, RingOptions(devices=devices), local=devices == 1)
    with pytest.raises(HomeinferError, match="not a GGUF model"), alone:
        pass
    assert coordinator.heard == []


def test_a_cluster_that_is_loading_is_waited_for(
    coordinator: ScriptedCoordinator, capfd: pytest.CaptureFixture[str]
) -> None:
    ready_now = coordinator.status
    coordinator.status = msgspec.structs.replace(ready_now, state="loading")
    coordinator.after_status = ready_now
    with opened_cluster(None, PLAIN, quiet=False) as ready:
        assert ready is not None
    assert capfd.readouterr().err.splitlines() == [
        "the cluster on this machine is not ready yet, loading; --local goes without it",
        "the cluster on this machine answers: desk, laptop (--local goes without it)",
    ]


@pytest.mark.usefixtures("coordinator")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_terminal_that_is_closed_ends_the_command_in_order(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, opened_cluster(None, PLAIN, quiet=True):
        signal.raise_signal(number)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) == before


@pytest.mark.usefixtures("coordinator")
def test_a_prompt_that_is_too_long_is_told_whose_context_it_is() -> None:
    with opened(None, PLAIN, quiet=True) as ready, pytest.raises(HomeinferError, match="take the cluster down and up"):
        ready.generator.answer([1] * ready.generator.teller.n_ctx, Sampling(), 1)


def test_a_cluster_that_ends_is_not_asked(coordinator: ScriptedCoordinator) -> None:
    coordinator.status = msgspec.structs.replace(coordinator.status, state="stopping")
    with opened_cluster(None, PLAIN, quiet=False) as ready:
        assert ready is None


def test_options_that_only_count_alone_are_named(smollm2_path: Path) -> None:
    status = ready_status(smollm2_path)
    line = using_line(status, RingOptions(n_ctx=512, n_threads=2))
    assert line.endswith("(--local goes without it; --ctx and --threads count only with it)")
    assert using_line(status, RingOptions(n_ctx=status.n_ctx)).endswith("(--local goes without it)")


def test_one_file_by_two_names_is_one_model(smollm2_path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(smollm2_path)
    assert is_same_model(link, smollm2_path)
    assert is_same_model(smollm2_path, link)
