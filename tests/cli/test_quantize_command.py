from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import msgspec
import psutil
import pytest

from homeinfer.cli.quantize_options import default_destination
from homeinfer.model.header import read_header
from homeinfer.quant.quantize import QuantizeResult
from homeinfer.quant.recipes import RECIPES
from tests.cli.conftest import Homeinfer
from tests.quant.f16_model import write_f16_model
from tests.support.commands import ENVIRONMENT, HANG_SECONDS, HOMEINFER, ran
from tests.support.processes import have_ended, have_stopped, held_back, killed_at_the_end, running, wait_until
from tests.support.tiny_models import make_tiny_model

SLOW = ("--recipe", "IQ3_S", "--threads", "1")
"""Some seconds for slow_source: long enough to be interrupted."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16_model(tmp_path_factory.mktemp("source") / "model-f16.gguf")


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16_model(tmp_path_factory.mktemp("source") / "model-f16.gguf", layers=32)


def quantize(*arguments: str | Path, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    return ran("quantize", *arguments, largest_file=largest_file)


def start_and_wait_for_output(source: Path, folder: Path) -> subprocess.Popen[str]:
    """A quantization that is writing, in a session of its own as a terminal would have it."""
    process = subprocess.Popen(
        [*HOMEINFER, "quantize", str(source), str(folder / "small.gguf"), *SLOW],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    wait_until(lambda: any(path.stat().st_size > 0 for path in folder.iterdir()) or process.poll() is not None)
    assert process.poll() is None
    assert [path.suffix for path in folder.iterdir()] == [".partial"]
    return process


def test_last_line_says_size_bits_and_seconds(source: Path, tmp_path: Path) -> None:
    ran = quantize(source, tmp_path / "small.gguf", "--recipe", "q4_k_m")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith(f"{tmp_path / 'small.gguf'}: Q4_K_M, 1.60 MB, 4.88 bpw, ")
    assert ran.stdout.endswith(" s\n")
    assert read_header(tmp_path / "small.gguf").tensors


def test_json_is_one_object_and_notes_go_to_stderr(source: Path, tmp_path: Path) -> None:
    ran = quantize(source, tmp_path / "small.gguf", "--recipe", "DQ3_K_M", "--json")
    assert ran.returncode == 0
    result = msgspec.json.decode(ran.stdout, type=QuantizeResult)
    assert result.size_bytes == (tmp_path / "small.gguf").stat().st_size
    assert ran.stderr == "".join(f"{note}\n" for note in result.notes)


def test_help_lists_every_recipe_and_examples(homeinfer: Homeinfer) -> None:
    shown = " ".join(homeinfer("quantize", "--help").stdout.replace("│", " ").split())
    assert ", ".join(RECIPES) in shown
    for example in ("--recipe DQ3_K_M", "small.gguf --bpw 3.5 (or --size 40GB)", "small.gguf --fit desk.json"):
        assert f"homeinfer quantize model-F16.gguf {example}" in shown


def test_list_of_recipes_needs_no_model(homeinfer: Homeinfer) -> None:
    shown = homeinfer("quantize", "--list-recipes")
    assert shown.returncode == 0
    listed = [line.split()[:2] for line in shown.stdout.splitlines() if "." in line]
    assert [[info.name, f"{info.bpw:.2f}"] for info in RECIPES.values()] == listed


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ((), "say how small: --recipe NAME, --bpw X, --size 40GB or --fit PROFILE.json"),
        (("--recipe", "Q4_K_M", "--bpw", "3.5"), "--recipe and --bpw both say how small; give one of them"),
        (("--size", "1GB", "--fit", "a.json"), "--size and --fit both say how small; give one of them"),
        (("--size", "40XB"), "--size: '40XB' is no size; write bytes, or a number such as 40GB"),
        (("--bpw", "-1"), "--bpw: -1.0 bits per weight are none"),
        (("--bpw", "nan"), "--bpw: nan bits per weight are none"),
        (("--recipe", "Q4_K_M", "--report", "a.html"), "--report shows what was measured"),
        (("--recipe", "Q4_K_M", "--imatrix", "a", "--text", "b"), "--imatrix and --text both say what counts"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(wrong: tuple[str, ...], words: str, homeinfer: Homeinfer) -> None:
    ran = homeinfer("quantize", "a.gguf", "b.gguf", *wrong)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"homeinfer: {words}")
    assert ran.stderr.count("\n") == 1


def test_numbers_out_of_range_exit_with_2(homeinfer: Homeinfer) -> None:
    assert homeinfer("quantize", "a.gguf", "b.gguf", "--recipe", "Q4_K_M", "--threads", "0").returncode == 2


@pytest.mark.parametrize(
    ("source", "label", "name"),
    [
        ("model-F16.gguf", "q4_k_m", "model-Q4_K_M.gguf"),
        ("big.bf16-00001-of-00004.gguf", "3.5bpw", "big-3.5bpw.gguf"),
        ("model.gguf", "my mix", "model-my mix.gguf"),
    ],
)
def test_destination_is_named_after_the_source_unless_given(source: str, label: str, name: str) -> None:
    assert default_destination(Path("folder", source), label) == Path("folder", name)


def test_destination_may_be_left_out(source: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny-F16.gguf").symlink_to(source)
    ran = quantize(tmp_path / "tiny-F16.gguf", "--recipe", "q8_0")
    assert ran.stdout.startswith(f"{tmp_path / 'tiny-Q8_0.gguf'}: Q8_0, 2.80 MB, ")


def test_dry_run_shows_types_by_role_and_the_whole(source: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(source.read_bytes()[: read_header(source).files[0].data_offset])
    ran = quantize(cut, "--recipe", "q4_k_m", "--dry-run", "--tensor", "attn_v=Q8_0", "--tensor", "blk.0=Q6_K")
    assert ran.returncode == 0
    rows = [line.split() for line in ran.stdout.splitlines()]
    assert ["attn_v", "Q8_0", "4", "139.26", "kB"] in rows
    assert ["ffn_up", "Q6_K", "1", "107.52", "kB"] in rows
    assert ["ffn_up", "Q4_K", "3", "221.18", "kB"] in rows
    assert rows[-1][:3] == ["Q4_K_M:", "1.76", "MB"]
    assert rows[-1][-1] == "bpw"
    assert "2 tensors stay F32" in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


def test_dry_run_as_json_lists_every_tensor(source: Path) -> None:
    ran = quantize(source, "--recipe", "Q4_K_M", "--dry-run", "--json")
    found = msgspec.json.decode(ran.stdout)
    assert set(found) == {"recipe", "size_bytes", "bpw", "tensors", "notes"}
    assert [tensor["name"] for tensor in found["tensors"]] == [tensor.name for tensor in read_header(source).tensors]
    assert set(found["tensors"][0]) == {"name", "type", "bytes"}


def test_budget_out_of_reach_is_one_line(source: Path, tmp_path: Path, homeinfer: Homeinfer) -> None:
    profile = tmp_path / "desk.json"
    profile.write_text('{"devices": [{"name": "desk", "memory_bytes": 16000000000}]}')
    for arguments, words in (
        (("--size", "1kB"), "the smallest that the types can give is"),
        (("--bpw", "16.5"), "the source itself has only 5,254,944"),
        (("--fit", profile), "the memory of desk: 16,000,000,000 bytes, of which"),
        (("--fit", tmp_path / "none.json"), "the profile can't be read"),
    ):
        ran = homeinfer("quantize", source, tmp_path / "small.gguf", *arguments)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert words in ran.stderr
        assert ran.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [profile]


def test_dry_run_of_a_budget_needs_the_header_alone(source: Path, tmp_path: Path) -> None:
    header = tmp_path / "header.gguf"
    header.write_bytes(source.read_bytes()[: read_header(source).files[0].data_offset])
    ran = quantize(header, "--bpw", "4.3", "--dry-run", "--json")
    found = msgspec.json.decode(ran.stdout)
    assert 4 < found["bpw"] <= 4.3
    assert "an estimate with typical errors" in ran.stderr
    assert len({tensor["type"] for tensor in found["tensors"]}) > 2


def test_imatrix_is_read_or_gathered(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path / "model.gguf")
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 40)
    ran = quantize(tmp_path / "model.gguf", tmp_path / "a.gguf", "--recipe", "q4_0", "--text", text)
    assert (ran.returncode, ran.stderr.count("\n")) == (0, 1)
    assert "1 tensor has rows that do not divide into the recipe's blocks: 1 Q8_0 for Q6_K" in ran.stderr
    assert read_header(tmp_path / "a.gguf").get("quantize.imatrix.dataset") == "text.txt"
    refused = quantize(tmp_path / "model.gguf", tmp_path / "a.gguf", "--recipe", "q4_0", "--text", text)
    assert "--force overwrites it" in refused.stderr
    refused = quantize(tmp_path / "model.gguf", tmp_path / "b.gguf", "--recipe", "q4_0", "--imatrix", text)
    assert "this is no imatrix in GGUF format" in refused.stderr
    planned = quantize(tmp_path / "model.gguf", "--recipe", "q4_0", "--text", text, "--dry-run", "--json")
    assert msgspec.json.decode(planned.stdout)["size_bytes"] == (tmp_path / "a.gguf").stat().st_size


def test_refusal_is_one_line_and_exit_code_1(source: Path, tmp_path: Path, homeinfer: Homeinfer) -> None:
    for arguments, words in (
        ((tmp_path / "missing.gguf", tmp_path / "small.gguf", "--recipe", "Q4_K_M"), "no such file"),
        ((source, source, "--recipe", "Q4_K_M"), "the source itself"),
        ((source, tmp_path / "small.gguf", "--recipe", "Q4KM"), "did you mean Q4_K_M"),
    ):
        ran = homeinfer("quantize", *arguments)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr.startswith("homeinfer: ")
        assert ran.stderr.count("\n") == 1
        assert words in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_file_that_cannot_be_written_to_its_end_is_removed(source: Path, tmp_path: Path) -> None:
    for limit in (1_000, 500_000, 1_604_000):
        ran = quantize(source, tmp_path / "small.gguf", "--recipe", "Q4_K_M", largest_file=limit)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert "writing failed half-way" in ran.stderr
        assert ran.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("child", "arguments"),
    [
        ("homeinfer.quant.worker", ("--recipe", "Q4_K_M", "--dry-run")),
        ("homeinfer.quant.observer_process", ("small.gguf", "--recipe", "Q2_K", "--requantize", "--text", "text.txt")),
    ],
)
def test_ctrl_c_before_anything_is_written_leaves_nothing_behind(
    smollm2_path: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    child: str,
    arguments: tuple[str, ...],
) -> None:
    (tmp_path / "text.txt").write_text("Each of these words is read by the model, again and again. " * 5000)
    (tmp_path / "temp").mkdir()
    process = subprocess.Popen(
        [*HOMEINFER, "quantize", smollm2_path, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**ENVIRONMENT, "TMPDIR": str(tmp_path / "temp"), **held_back(tmp_path_factory.mktemp("held"), child)},
        start_new_session=True,
    )
    started: list[psutil.Process] = []

    def has_started() -> bool:
        started[:] = running(child, process.pid)
        return have_stopped(started)

    with killed_at_the_end(process):
        wait_until(has_started)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, out) == (130, "")
    assert err == "homeinfer: interrupted: nothing was written\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["temp", "text.txt"]
    assert list((tmp_path / "temp").iterdir()) == []
    assert not psutil.wait_procs(started, timeout=HANG_SECONDS)[1]


def test_ctrl_c_leaves_nothing_behind(slow_source: Path, tmp_path: Path) -> None:
    before = slow_source.stat()
    process = start_and_wait_for_output(slow_source, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, out) == (130, "")
    assert err == "homeinfer: interrupted: nothing was written\n"
    assert list(tmp_path.iterdir()) == []
    assert slow_source.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("deadly", [signal.SIGTERM, signal.SIGKILL])
def test_quantizer_ends_and_cleans_up_when_its_parent_dies(
    slow_source: Path, tmp_path: Path, deadly: signal.Signals
) -> None:
    process = start_and_wait_for_output(slow_source, tmp_path)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 1
    process.send_signal(deadly)
    process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == -deadly
    wait_until(lambda: list(tmp_path.iterdir()) == [])
    psutil.wait_procs(workers, timeout=HANG_SECONDS)
    assert have_ended(workers)
