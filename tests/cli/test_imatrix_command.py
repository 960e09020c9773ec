from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from homeinfer.cli.imatrix import ImatrixResult
from homeinfer.cli.imatrix import imatrix as command
from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from homeinfer.quant.imatrix import check_matches, read_imatrix
from tests.cli.conftest import Homeinfer
from tests.quant.f16_model import write_f16_model
from tests.support.commands import HANG_SECONDS, HOMEINFER, ran
from tests.support.processes import have_ended, running, wait_until
from tests.support.tiny_models import make_tiny_model


def imatrix(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return ran("imatrix", *arguments)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "mixture.gguf"
    make_tiny_model("qwen3moe", path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the hen and the other hen sing of rain, and the rats run on and on in the rain\n" * 8)
    return path


def test_an_imatrix_of_a_mixture_says_what_it_is_of(mixture: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("the other hen")
    texts = ("--text", text, "--text", tmp_path / "more.txt")
    done = imatrix(mixture, *texts, "-o", tmp_path / "i.gguf", "--ctx", "32", "--chunks", "3", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = msgspec.json.decode(done.stdout, type=ImatrixResult)
    made = read_imatrix(tmp_path / "i.gguf")
    assert (result.path, result.chunks, result.tokens) == (str(tmp_path / "i.gguf"), 3, 96)
    assert result.tensors == len(made.entries)
    assert result.unreached == {}
    assert (made.chunk_size, made.chunk_count, made.datasets) == (32, 3, ("text.txt", "more.txt"))
    assert "output.weight" in made.entries
    assert check_matches(made, read_header(mixture)) == ()


def test_experts_that_the_text_never_reached_are_said(mixture: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a")
    arguments = ("--text", tmp_path / "short.txt", "-o", tmp_path / "i.gguf", "--no-output-tensor", "--json")
    done = imatrix(mixture, *arguments)
    lost = msgspec.json.decode(done.stdout, type=ImatrixResult).unreached
    header = read_header(mixture)
    unused = header.arch_get("expert_count") - header.arch_get("expert_used_count")
    assert lost["blk.0.ffn_up_exps.weight"] == unused
    assert "experts in" in done.stderr
    assert "were never reached by the text" in done.stderr
    assert "output.weight" not in read_imatrix(tmp_path / "i.gguf").entries


def test_without_text_pythons_own_is_read(smollm2_path: Path, tmp_path: Path) -> None:
    done = imatrix(smollm2_path, "-o", tmp_path / "i.gguf", "--chunks", "1", "--ctx", "64")
    assert done.returncode == 0, done.stderr
    assert "64 tokens in 1 chunks" in done.stdout
    assert read_imatrix(tmp_path / "i.gguf").datasets == ("Python's help topics and modules",)


def test_what_is_there_is_kept_unless_forced(mixture: Path, text: Path, tmp_path: Path) -> None:
    target = tmp_path / "i.gguf"
    target.write_text("mine")
    with pytest.raises(HomeinferError, match="exists already; --force overwrites it"):
        command(mixture, target, [text])
    assert target.read_text() == "mine"
    command(mixture, target, [text], ctx=32, force=True)
    assert read_imatrix(target).entries


def test_bad_input_is_one_line_and_nothing_is_left(mixture: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "empty.txt").touch()
    cases = (
        (tmp_path / "missing.gguf", out / "i.gguf", text, "there is no such file"),
        (text, out / "i.gguf", text, "this is a text file"),
        (mixture, out / "i.gguf", tmp_path / "empty.txt", "the text is empty"),
        (mixture, out / "i.gguf", tmp_path / "missing.txt", "can't be read"),
        (mixture, out / "i.gguf", mixture, "is not UTF-8"),
        (mixture, mixture, text, "this is the source itself"),
        (mixture, out / "none" / "i.gguf", text, "does not exist"),
    )
    for model, target, read, said in cases:
        with pytest.raises(HomeinferError, match=said) as caught:
            command(model, target, [read])
        assert "\n" not in str(caught.value)
    assert not list(out.iterdir())


def test_a_model_that_takes_no_text_is_one_line_on_stderr(text: Path, tmp_path: Path) -> None:
    done = imatrix(write_f16_model(tmp_path / "m.gguf", layers=1), "--text", text, "-o", tmp_path / "i.gguf")
    assert done.returncode == 1
    assert done.stderr.startswith("homeinfer: ")
    assert done.stderr.endswith("m.gguf has no vocabulary: it can't be given text\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "i.gguf").exists()


def test_a_missing_output_is_wrong_usage(mixture: Path, homeinfer: Homeinfer) -> None:
    assert homeinfer("imatrix", mixture).returncode == 2


def test_ctrl_c_leaves_nothing_behind(smollm2_path: Path, tmp_path: Path, temp_folder: Path) -> None:
    arguments = [*HOMEINFER, "imatrix", str(smollm2_path), "-o", str(tmp_path / "i.gguf"), "--threads", "1"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        parent = psutil.Process(process.pid)
        wait_until(lambda: bool(running("homeinfer.quant.observer_process", parent.pid)))
        children = parent.children()
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=HANG_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said == "homeinfer: interrupted: nothing was written\n"
    wait_until(lambda: have_ended(children))
    assert not list(tmp_path.iterdir())
    assert not list(temp_folder.iterdir())


def test_the_help_shows_how(homeinfer: Homeinfer) -> None:
    said = homeinfer("imatrix", "--help").stdout
    assert "homeinfer imatrix model-F16.gguf --text wiki.txt" in said
    assert "--no-output-tensor" in said
