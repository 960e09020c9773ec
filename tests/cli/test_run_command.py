"""`homeinfer run` as its users meet it: one answer, or one line and nothing left behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TypeVar

import gguf
import msgspec
import numpy as np
import pytest

from homeinfer.cli.run import RunResult
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.model.architectures_refused import REFUSED
from homeinfer.model.header import read_header
from tests.cli.conftest import Homeinfer
from tests.support.commands import HANG_SECONDS
from tests.support.processes import ENDLESS, engines, have_ended, wait_until

RUN = [sys.executable, "-m", "homeinfer", "run"]
SMALL = ("--threads", "1", "--ctx", "256")
KEYS = {"prompt_tokens", "tokens", "text", "finish_reason", "ttft_ms", "tpot_ms", "devices"}
T = TypeVar("T")
TALK = "Once upon a time there was a little robot who"


@pytest.fixture(autouse=True)
def nothing_is_left(temp_folder: Path) -> Iterator[None]:
    """No test of this module may leave anything in the temporary folder."""
    yield
    assert list(temp_folder.iterdir()) == []


def run(*arguments: str | Path, said: str = "", largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        assert largest_file is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    # nothing of Python runs between fork and exec where other threads may be at work
    before = None if largest_file is None else limit
    return subprocess.run(
        [*RUN, *arguments], input=said, capture_output=True, text=True, timeout=HANG_SECONDS, preexec_fn=before
    )


def result(*arguments: str | Path, said: str = "") -> RunResult:
    done = run(*arguments, *SMALL, "--json", said=said)
    assert done.stderr == ""
    assert done.returncode == 0
    return msgspec.json.decode(done.stdout, type=RunResult)


def at_once(*commands: Callable[[], T]) -> list[T]:
    """Two at a time: each uses one core."""
    with ThreadPoolExecutor(2) as pool:
        return [made.result() for made in [pool.submit(command) for command in commands]]


def refusal(*arguments: str | Path, said: str = "", largest_file: int | None = None) -> str:
    """The one line that it ends with."""
    return refused(run(*arguments, said=said, largest_file=largest_file))


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a command ended with."""
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("homeinfer: ")
    assert done.stderr.endswith("\n")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr[len("homeinfer: ") : -1]


def file_of(architecture: str, path: Path, vocabulary: Path | None = None) -> Path:
    """A GGUF of this architecture with little in it but another model's vocabulary."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    for key, value in read_header(vocabulary).metadata.items() if vocabulary is not None else ():
        if key.startswith("tokenizer."):
            item = None if value.item is None else gguf.GGUFValueType(int(value.item))
            writer.add_key_value(key, value.value, gguf.GGUFValueType(int(value.type)), sub_type=item)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text_file(path: Path, _model: Path) -> Path:
    path.write_text("Dear model,\nplease answer.\n")
    return path


def empty_file(path: Path, _model: Path) -> Path:
    path.touch()
    return path


def missing_file(path: Path, _model: Path) -> Path:
    return path


def directory(path: Path, _model: Path) -> Path:
    path.mkdir()
    return path


def truncated(path: Path, model: Path) -> Path:
    path.write_bytes(model.read_bytes()[:50_000_000])
    return path


def truncated_in_header(path: Path, model: Path) -> Path:
    path.write_bytes(model.read_bytes()[:100_000])
    return path


def projector(path: Path, _model: Path) -> Path:
    return file_of("clip", path)


def embedding_model(path: Path, _model: Path) -> Path:
    return file_of("bert", path)


def unknown(path: Path, _model: Path) -> Path:
    return file_of("zebra", path)


@pytest.mark.parametrize("devices", ["1", "2"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (missing_file, "there is no such file"),
        (text_file, "this is a text file, not a GGUF model"),
        (empty_file, "the file is empty"),
        (directory, "this is a directory"),
        (truncated, ""),
        (truncated_in_header, ""),
        (projector, "(clip): it can't write text"),
        (embedding_model, "(bert): it can't write text"),
        (unknown, "zebra"),
    ],
)
def test_what_is_no_model_is_one_line(
    make: Callable[[Path, Path], Path],
    reason: str,
    devices: str,
    smollm2_path: Path,
    tmp_path: Path,
    homeinfer: Homeinfer,
) -> None:
    path = make(tmp_path / "model.gguf", smollm2_path)
    line = refused(homeinfer("run", path, "-p", "Hello", "--local-ring", devices))
    assert str(path) in line
    assert reason in line


def test_an_architecture_that_is_not_cut_is_refused_by_name(smollm2_path: Path, tmp_path: Path) -> None:
    name = "rwkv6"
    path = file_of(name, tmp_path / "model.gguf", smollm2_path)
    assert f"{name} models can't be cut into windows: {REFUSED[name]}" in refusal(path, "-p", "Hi", "--local-ring", "2")


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [("", "the prompt is empty"), (" \n\t", "the prompt is empty"), ("word " * 100, "the prompt has 1")],
    ids=["empty", "blank", "long"],
)
@pytest.mark.parametrize("from_stdin", [False, True])
def test_a_prompt_that_cannot_be_answered_is_one_line(prompt: str, reason: str, from_stdin: bool) -> None:
    line = refusal("-p", "-" if from_stdin else prompt, "--ctx", "64", said=prompt if from_stdin else "")
    assert line.startswith(reason)


def test_more_devices_than_layers_is_one_line(homeinfer: Homeinfer) -> None:
    line = refused(homeinfer("run", "-p", "Hello", "--local-ring", "31"))
    assert line == "this model of 30 layers can be cut into at most 30 windows, not 31: use fewer devices"


def test_a_grammar_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.gbnf").write_text('root ::= "open')
    for line in at_once(
        lambda: refusal("-p", "Hello", "--grammar", tmp_path / "bad.gbnf"),
        lambda: refusal("-p", "Hello", "--grammar", tmp_path / "missing.gbnf"),
    ):
        assert "grammar" in line


def test_a_disk_that_fills_while_cutting_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOMEINFER_WINDOWS", str(tmp_path / "windows"))
    line = refusal("-p", "Hello", "--local-ring", "2", largest_file=20_000_000)
    assert line.endswith("can't be written: File too large")
    assert list((tmp_path / "windows").iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--no-such-flag"],
        ["--local-ring", "0"],
        ["--local-ring", "two"],
        ["--temp", "-1"],
        ["--top-p", "0"],
        ["--seed", "-1"],
        ["-n", "-2"],
        ["--ctx", "x"],
        ["a.gguf", "b.gguf"],
    ],
    ids=" ".join,
)
def test_wrong_flags_are_wrong_usage(flags: list[str], homeinfer: Homeinfer) -> None:
    done = homeinfer("run", "-p", "Hello", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr


def test_json_has_what_was_promised(smollm2_path: Path) -> None:
    done = run(smollm2_path, "-p", TALK, "--raw", "-n", "8", "--temp", "0", *SMALL, "--local-ring", "3", "--json")
    assert done.stderr == ""
    said = msgspec.json.decode(done.stdout)
    assert set(said) >= KEYS
    got = msgspec.convert(said, RunResult)
    with closing(Tokenizer(str(smollm2_path))) as tokenizer:
        assert got.prompt_tokens == len(tokenizer.encode(TALK))
        assert got.text == b"".join(map(tokenizer.piece, got.tokens)).decode()
    assert len(got.tokens) == 8
    assert got.finish_reason == "length"
    assert got.ttft_ms > 0
    assert got.tpot_ms > 0
    assert [device.name for device in got.devices] == ["device-1", "device-2", "device-3"]
    edges = [edge for device in got.devices for window in device.windows for edge in window]
    assert (edges[0], edges[-1]) == (0, 30)
    assert edges[1:-1:2] == edges[2:-1:2]


def test_the_ring_and_the_way_of_the_prompt_change_nothing(smollm2_path: Path) -> None:
    options = ("--raw", "-n", "12", "--temp", "0.8", "--seed", "5")
    one, two = at_once(
        lambda: result(smollm2_path, "-p", TALK, *options),
        lambda: result("-p", "-", *options, "--local-ring", "2", said=TALK),
    )
    assert (one.tokens, one.text, one.seed) == (two.tokens, two.text, two.seed)


def test_the_chat_template_is_applied_unless_raw() -> None:
    chat, raw, system = at_once(
        lambda: result("-p", "hi", "--temp", "0"),
        lambda: result("-p", "hi", "--temp", "0", "-n", "1", "--raw"),
        lambda: result("-p", "hi", "--temp", "0", "-n", "1", "-s", "Be brief and kind to everyone."),
    )
    assert (chat.text, chat.finish_reason) == ("Hello! How can I assist you today?", "stop")
    assert raw.prompt_tokens == 1
    assert raw.prompt_tokens < system.prompt_tokens != chat.prompt_tokens


def test_n_is_the_most_tokens() -> None:
    limits = (0, 1, 5)
    answers = at_once(*(partial(result, "-p", TALK, "--raw", "--temp", "0", "-n", str(n)) for n in limits))
    assert [len(got.tokens) for got in answers] == list(limits)
    assert {got.finish_reason for got in answers} == {"length"}


def test_text_is_the_answer_alone() -> None:
    asked = ("-p", TALK, "--raw", "--temp", "0", "-n", "8")
    done = run(*asked, *SMALL, "--local-ring", "2")
    assert done.returncode == 0
    assert done.stdout == result(*asked).text + "\n"
    assert "device-2" in done.stderr
    assert "tokens/s" in done.stderr


def start_endless(*options: str) -> subprocess.Popen[str]:
    """An answer that does not end soon, of which some has been said."""
    process = subprocess.Popen(
        [*RUN, *ENDLESS, *SMALL, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.read(10)
    return process


@pytest.mark.parametrize("devices", ["1", "3"])
def test_ctrl_c_ends_it_and_its_engines(devices: str) -> None:
    process = start_endless("--local-ring", devices)
    started = engines(process.pid)
    assert len(started) == int(devices)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130
    assert "Traceback" not in said
    wait_until(lambda: have_ended(started))


@pytest.mark.parametrize("devices", ["1", "3"])
def test_an_engine_killed_in_mid_answer_is_one_line(devices: str) -> None:
    process = start_endless("--local-ring", devices)
    started = engines(process.pid)
    started[-1].kill()
    _, said = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 1
    lines = [line for line in said.splitlines() if line.startswith("homeinfer: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"homeinfer: the engine of device-{devices} (layers ")
    assert lines[0] == said.splitlines()[-1]
    assert "Traceback" not in said
    wait_until(lambda: have_ended(started))


def test_a_reader_who_leaves_ends_it_quietly() -> None:
    process = start_endless()
    started = engines(process.pid)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=HANG_SECONDS) == 1
    assert process.stderr.read() == ""
    process.stderr.close()
    wait_until(lambda: have_ended(started))
