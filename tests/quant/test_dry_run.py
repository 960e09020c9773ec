from __future__ import annotations

import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest

from homeinfer.errors import HomeinferError
from homeinfer.model.header import MetaValue, ValueType, read_header, read_header_bytes
from homeinfer.quant.dry_run import DryRun, dry_run
from homeinfer.quant.importance import Importance
from homeinfer.quant.quantize import quantize
from homeinfer.quant.tensor_rules import parse_tensor_rule
from tests.model.deepseek import deepseek_header
from tests.model.gguf_bytes import head
from tests.quant.f16_model import write_f16_model

GIB = 2**30
DRY_RUN_WITH_LITTLE_MEMORY = """
import pathlib, resource, sys
import msgspec
from homeinfer.quant.dry_run import dry_run
sys.stdout.buffer.write(msgspec.json.encode(dry_run(sys.argv[1], sys.argv[2])))
status = pathlib.Path("/proc/self/status").read_text()
assert int(status.partition("VmHWM:")[2].split()[0]) < 500_000
assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 500_000
"""
"""Its own ru_maxrss would count the process that started it, pytest with all it holds."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16_model(tmp_path_factory.mktemp("source") / "model-f16.gguf")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The header alone, with all keys that llama.cpp wants to see."""
    found = read_header_bytes(deepseek_header(), allow_truncated=True)
    counts = {
        "embedding_length": 7168, "feed_forward_length": 18432, "attention.head_count": 128,
        "attention.head_count_kv": 128, "attention.q_lora_rank": 1536, "attention.kv_lora_rank": 512,
        "attention.key_length": 192, "attention.value_length": 128, "expert_feed_forward_length": 2048,
        "expert_shared_count": 1, "expert_gating_func": 2, "rope.dimension_count": 64,
    }  # fmt: skip
    keys = {f"deepseek2.{key}": MetaValue(ValueType.UINT32, count) for key, count in counts.items()}
    keys["deepseek2.attention.layer_norm_rms_epsilon"] = MetaValue(ValueType.FLOAT32, 1e-6)
    keys["deepseek2.expert_weights_scale"] = MetaValue(ValueType.FLOAT32, 2.5)
    path = tmp_path_factory.mktemp("deepseek") / "deepseek-r1.gguf"
    tensors = [(tensor.name, tensor.shape, tensor.type) for tensor in found.tensors]
    path.write_bytes(head(found.metadata | keys, tensors)[0])
    return path


def down_types(found: DryRun) -> dict[str, int]:
    return dict(Counter(tensor.type for tensor in found.tensors if "ffn_down_exps" in tensor.name))


@pytest.mark.parametrize(
    ("recipe", "least", "most", "bpw", "down"),
    [
        ("DQ3_K_M", 280, 281.5, 3.59, {"Q6_K": 2, "Q4_K": 12, "Q3_K": 44}),
        ("Q4_K_M", 377 * 0.99, 377 * 1.01, 4.82, {"Q6_K": 27, "Q4_K": 31}),
        ("Q3_K_M", 298 * 0.99, 298 * 1.01, 3.81, {"Q4_K": 58}),
    ],
)
def test_deepseek_r1_has_the_published_sizes_from_its_header_alone(
    deepseek: Path, recipe: str, least: float, most: float, bpw: float, down: dict[str, int]
) -> None:
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", DRY_RUN_WITH_LITTLE_MEMORY, str(deepseek), recipe]
    ran = subprocess.run(command, capture_output=True, check=True)
    found = msgspec.json.decode(ran.stdout, type=DryRun)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 10
    assert least <= found.size_bytes / GIB <= most
    assert found.bpw == pytest.approx(bpw, abs=0.01)
    assert down_types(found) == down
    assert len(found.tensors) == 1025
    assert [path.name for path in deepseek.parent.iterdir()] == ["deepseek-r1.gguf"]


@pytest.mark.parametrize("recipe", ["Q4_K_M", "IQ4_XS", "DQ3_K_M", "F32", "COPY", "my.toml"])
@pytest.mark.parametrize("rules", [(), ("ffn_down=Q6_K", "norm=Q8_0")])
def test_size_and_types_are_what_a_run_then_writes(
    source: Path, tmp_path: Path, recipe: str, rules: tuple[str, ...]
) -> None:
    if recipe == "my.toml":
        recipe = str(tmp_path / recipe)
        Path(recipe).write_text('name = "my mix"\nbase = "Q3_K_M"\n[[rule]]\ndepth = [0.5, 1]\ntype = "Q5_1"')
    made = [parse_tensor_rule(rule) for rule in rules]
    found = dry_run(source, recipe, tensor_rules=made)
    result = quantize(source, tmp_path / "small.gguf", recipe, tensor_rules=made)
    assert found.size_bytes == result.size_bytes == (tmp_path / "small.gguf").stat().st_size
    assert (found.bpw, found.notes) == (result.bpw, result.notes)
    written = read_header(tmp_path / "small.gguf").by_name
    assert {(tensor.name, tensor.type, tensor.bytes) for tensor in found.tensors} == {
        (tensor.name, tensor.type, tensor.nbytes) for tensor in written.values()
    }


def test_size_is_exact_with_an_imatrix_and_from_a_real_models_vocabulary(smollm2_path: Path, tmp_path: Path) -> None:
    header = read_header(smollm2_path)
    name = "blk.0.ffn_up.weight"
    values = {name: np.ones(header.by_name[name].shape[0], np.float32)}
    importance = Importance(values, "é" * 100, ("wiki.txt",), 7)
    rules = [parse_tensor_rule(r"blk\.0\.ffn_up=IQ4_NL")]
    found = dry_run(smollm2_path, "COPY", tensor_rules=rules, importance=importance)
    result = quantize(
        smollm2_path, tmp_path / "x.gguf", "COPY", tensor_rules=rules, importance=importance, requantize=True
    )
    assert found.size_bytes == result.size_bytes == (tmp_path / "x.gguf").stat().st_size
    written = read_header(tmp_path / "x.gguf")
    assert written.get("quantize.imatrix.file") == "é" * 63
    assert written.get("quantize.imatrix.dataset") == "wiki.txt"
    assert (written.get("quantize.imatrix.entries_count"), written.get("quantize.imatrix.chunks_count")) == (1, 7)


@pytest.mark.parametrize("recipe", ["Q4_K_M", "DQ3_K_M", "COPY"])
def test_split_source_may_end_after_its_headers(source: Path, tmp_path: Path, recipe: str) -> None:
    write_f16_model(tmp_path / "split.gguf", split_tensors=10)
    for file in read_header(tmp_path / "split-00001-of-00004.gguf").files:
        with Path(file.path).open("rb+") as part:
            part.truncate(file.data_offset + 7)
    found = dry_run(tmp_path / "split-00002-of-00004.gguf", recipe)
    assert found.size_bytes == dry_run(source, recipe).size_bytes


def test_alignment_of_the_source_is_not_the_results(tmp_path: Path) -> None:
    write_f16_model(tmp_path / "aligned.gguf", layers=1, alignment=4096)
    found = dry_run(tmp_path / "aligned.gguf", "Q4_K_M")
    assert found.size_bytes == quantize(tmp_path / "aligned.gguf", tmp_path / "small.gguf", "Q4_K_M").size_bytes


@pytest.mark.parametrize("recipe", ["IQ2_XS", "Q2_K_S"])
def test_missing_imatrix_is_said_and_the_plan_is_the_one_with_it(source: Path, recipe: str) -> None:
    found = dry_run(source, recipe)
    assert found.notes[-1].startswith(f"recipe {recipe} needs an importance matrix (imatrix): make one with ")
    stand_in = Importance({"-": np.ones(1, np.float32)}, stand_in=True)
    assert dry_run(source, recipe, importance=stand_in).tensors == found.tensors


def test_folder_that_cannot_hold_the_hole_is_one_line(deepseek: Path) -> None:
    """As on a file system that has no files of such a length."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))

    code = "import sys; from homeinfer.quant.dry_run import dry_run; dry_run(sys.argv[1], 'Q4_K_M')"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(deepseek)], capture_output=True, text=True, check=False, preexec_fn=limit
    )
    assert (
        "a hole of 1,250.1 GiB, for llama.cpp to plan on, can't be made there: File too large; set TMPDIR"
        in (ran.stderr.splitlines()[-1])
    )


def test_header_that_is_cut_short_itself_is_refused(deepseek: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(deepseek.read_bytes()[:30_000])
    with pytest.raises(HomeinferError, match="cut"):
        dry_run(tmp_path / "cut.gguf", "DQ3_K_M")
