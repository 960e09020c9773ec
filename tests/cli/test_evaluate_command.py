from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import msgspec
import psutil
import pytest

from homeinfer.quant.evaluate import Evaluation
from homeinfer.quant.logits_file import is_logits_file
from tests.cli.conftest import Homeinfer
from tests.support.commands import ENVIRONMENT, HANG_SECONDS, HOMEINFER, ran
from tests.support.processes import have_ended, wait_until
from tests.support.tiny_models import make_tiny_model

SHORT = ("--ctx", "32", "--chunks", "2", "--threads", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_model("llama", folder / "reference.gguf")
    make_tiny_model("llama", folder / "model.gguf", seed=1)
    line = "the hare and the tortoise ran a race, and the tortoise won it in the end\n"
    (folder / "text.txt").write_text(line * 10)
    (folder / "long.txt").write_text(line * 10_000)
    return folder


def evaluate(*arguments: str | Path, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    return ran("evaluate", *arguments, largest_file=largest_file)


def start_and_wait_for_logits(folder: Path, output: Path) -> subprocess.Popen[str]:
    """An evaluation that is keeping logits, in a session of its own as a terminal would have it."""
    process = subprocess.Popen(
        [*HOMEINFER, "evaluate", str(folder / "model.gguf"), "--reference", str(folder / "reference.gguf"),
         "--ctx", "64", "--text", str(folder / "long.txt"), "--keep-logits", str(output / "kept.logits"),
         "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )  # fmt: skip
    wait_until(lambda: any(path.stat().st_size > 0 for path in output.iterdir()) or process.poll() is not None)
    assert process.poll() is None
    assert [path.suffix for path in output.iterdir()] == [".partial"]
    return process


def test_report_and_json_say_the_same(folder: Path) -> None:
    arguments = (folder / "model.gguf", "--reference", folder / "reference.gguf", "--text", folder / "text.txt")
    ran = evaluate(*arguments, *SHORT, "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    found = msgspec.json.decode(ran.stdout, type=Evaluation)
    assert (found.chunks, found.n_ctx, found.tokens) == (2, 32, 30)
    shown = evaluate(*arguments, *SHORT)
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert lines[1] == f"perplexity      {found.ppl:.4f}, reference {found.ppl_reference:.4f}"
    assert lines[2] == f"mean KLD        {found.mean_kld:.6f} ± {found.mean_kld_stderr:.6f}"
    assert lines[-1] == "measured on     30 tokens in 2 chunks of 32"


def test_logits_are_kept_and_used_again(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.logits"
    arguments = (folder / "model.gguf", "--text", folder / "text.txt", *SHORT, "--json")
    first = evaluate(*arguments, "--reference", folder / "reference.gguf", "--keep-logits", kept)
    assert (first.returncode, first.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.logits"]
    assert is_logits_file(kept)
    again = evaluate(*arguments, "--reference", kept)
    assert again.stdout == first.stdout


@pytest.mark.parametrize(
    "wrong",
    [
        ("a.gguf",),
        ("a.gguf", "--reference", "b.gguf"),
        ("a.gguf", "--reference", "b.gguf", "--text", "c", "--ctx", "4"),
        ("a.gguf", "--reference", "b.gguf", "--text", "c", "--chunks", "0"),
    ],
)
def test_wrong_usage_exits_with_2(wrong: tuple[str, ...], homeinfer: Homeinfer) -> None:
    assert homeinfer("evaluate", *wrong).returncode == 2


def test_refusal_is_one_line_and_exit_code_1(folder: Path, tmp_path: Path) -> None:
    model, reference, text = folder / "model.gguf", folder / "reference.gguf", folder / "text.txt"
    for arguments, words in (
        ((model, "--reference", reference, "--text", tmp_path / "missing.txt"), "the text can't be read"),
        ((model, "--reference", text, "--text", text), "this is a text file, not a GGUF model"),
        ((model, "--reference", reference, "--text", text, "--ctx", "128", "--chunks", "99"), "99 are wanted"),
    ):
        ran = evaluate(*arguments, "--keep-logits", tmp_path / "kept.logits")
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr.startswith("homeinfer: ")
        assert ran.stderr.count("\n") == 1
        assert words in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_logits_that_can_not_be_written_to_their_end_are_removed(folder: Path, tmp_path: Path) -> None:
    ran = evaluate(
        folder / "model.gguf", "--reference", folder / "reference.gguf", "--text", folder / "text.txt", *SHORT,
        "--keep-logits", tmp_path / "kept.logits", largest_file=5000,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "the logits can't be written" in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    process = start_and_wait_for_logits(folder, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, out) == (130, "")
    assert err == "homeinfer: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_evaluation_ends_and_cleans_up_when_its_parent_is_killed(folder: Path, tmp_path: Path) -> None:
    process = start_and_wait_for_logits(folder, tmp_path)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 1
    process.kill()
    process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == -signal.SIGKILL
    wait_until(lambda: list(tmp_path.iterdir()) == [])
    psutil.wait_procs(workers, timeout=HANG_SECONDS)
    assert have_ended(workers)
