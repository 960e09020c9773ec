"""Every architecture that homeinfer cuts, compared with the whole model at every allowed cut; all others refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import msgspec
import pytest

from homeinfer.errors import HomeinferError
from homeinfer.model.architectures import ALLOWED, rule_for
from homeinfer.model.architectures_refused import NOT_GENERATING, REFUSED
from homeinfer.model.header import read_header
from homeinfer.model.window_plan import n_layers, plan_window, split_layers, why_not
from tests.support.headers import header_of
from tests.support.tiny_models import ARCHITECTURES, MODELS, file_name, make_tiny_models
from tests.support.windows import Comparison, compare

REQUIRED = frozenset(
    (
        *("llama", "qwen2", "qwen3", "qwen3moe", "qwen3next", "gemma", "gemma2", "gemma3", "phi3", "deepseek2"),
        *("gpt-oss", "llama4", "mistral3", "glm4moe", "granite", "olmo2", "lfm2", "minicpm"),
    )
)

WHOLE_ONLY = {
    "gemma4:shared": "takes in embeddings of the token",
    "glm4": "M-RoPE only",
    "nanbeige:loops": "more than once",
    "smallthinker": "4 layers of smallthinker for a model with RoPE in every layer",
}
"""Models of architectures that are cut, but not these, and why."""

CUT = tuple(name for name in MODELS if name.partition(":")[0] in ALLOWED and name not in WHOLE_ONLY)
REFUSED_MODELS = tuple(name for name in MODELS if name.partition(":")[0] in REFUSED)

ROUNDING = 5e-3
"""Where hidden states are the whole model's to one unit in the last place, keys and values rounded to F16 differ
here and there: logits then differ by this many of their standard deviations at most (a factor that is off by a
two-hundredth makes it 1.8e-2)."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    assert make_tiny_models(folder) == {}
    return folder


@pytest.fixture(scope="session")
def comparisons(request: pytest.FixtureRequest, tiny: Path) -> dict[str, Comparison]:
    """The comparisons that the selected tests ask for, all by one process (and one more for each crash)."""
    asked = [getattr(item, "callspec", None) for item in request.session.items]
    names = {str(call.params["cut_model"]) for call in asked if call is not None and "cut_model" in call.params}
    return compare([tiny / file_name(name) for name in sorted(names)])


@pytest.mark.parametrize("cut_model", CUT)
def test_windows_give_the_whole_models_logits(cut_model: str, comparisons: dict[str, Comparison]) -> None:
    comparison = comparisons[file_name(cut_model)]
    assert comparison.problem is None
    assert comparison.differences, "no cut is allowed"
    wrong = [d for d in comparison.differences if not (d.largest == 0 if d.exact else d.largest < ROUNDING)]
    assert wrong == []


@pytest.mark.parametrize("name", WHOLE_ONLY)
def test_a_model_that_cannot_be_cut_says_why(name: str, tiny: Path) -> None:
    header = read_header(tiny / file_name(name))
    n = n_layers(header)
    assert why_not(header, 0, n) is None
    assert not any(why_not(header, 0, c) is None and why_not(header, c, n) is None for c in range(1, n))
    with pytest.raises(HomeinferError, match=WHOLE_ONLY[name]):
        split_layers(header, 2)


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_a_refused_architecture_is_refused_by_name(name: str, tiny: Path) -> None:
    header = read_header(tiny / file_name(name))
    with pytest.raises(HomeinferError) as refusal:
        plan_window(header, 0, 1)
    who = header.architecture
    assert str(refusal.value) == f"{who} models can't be cut into windows: {REFUSED[who]}"
    with pytest.raises(HomeinferError, match=f"^{who} models can't be cut"):
        split_layers(header, 2)


@pytest.mark.parametrize("name", REFUSED)
def test_every_refusal_has_a_reason(name: str) -> None:
    with pytest.raises(HomeinferError, match=f"^{name} models can't be cut into windows: .{{20,}}"):
        rule_for(header_of(name, layers=4))


def test_an_architecture_that_nobody_knows_is_refused() -> None:
    with pytest.raises(HomeinferError, match=r"^zebra models can't be cut into windows: no test has compared"):
        rule_for(header_of("zebra", layers=4))


def test_every_architecture_is_in_one_table() -> None:
    known = set(gguf.MODEL_ARCH_NAMES.values()) | set(ARCHITECTURES)
    tables = (ALLOWED, REFUSED, NOT_GENERATING)
    assert {name: sum(name in table for table in tables) for name in known} == dict.fromkeys(known, 1)


def test_every_allowed_architecture_is_compared() -> None:
    assert {name.partition(":")[0] for name in CUT} == set(ALLOWED)
    assert set(ALLOWED) >= REQUIRED
    assert len(ALLOWED) >= 40


def test_llama_cpp_knows_every_name_in_the_tables(tmp_path: Path) -> None:
    names = [*sorted({*ALLOWED, *REFUSED, *NOT_GENERATING} - {"gptj"}), "zebra"]
    command = [sys.executable, "-c", _KNOWS, str(tmp_path), *names]
    run = subprocess.run(command, capture_output=True, check=True, text=True)
    assert msgspec.json.decode(run.stdout) == ["zebra"]


# a file that says nothing but its architecture: llama.cpp misses other keys, or knows no such architecture
_KNOWS = """
import json, os, sys, gguf
from homeinfer.engine import runtime
lib = runtime.llama()
unknown, folder = [], sys.argv[1]
for name in sys.argv[2:]:
    path = os.path.join(folder, "m.gguf")
    writer = gguf.GGUFWriter(path, name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    runtime.forget_log()
    assert not lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    if "unknown model architecture" in runtime.reason(""):
        unknown.append(name)
print(json.dumps(unknown))
"""
