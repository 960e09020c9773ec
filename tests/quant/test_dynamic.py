"""A file of a given size, from the model to the finished file: real models, real processes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import psutil
import pytest

from homeinfer.errors import HomeinferError
from homeinfer.model.header import TYPE_SIZES, read_header
from homeinfer.quant import dynamic
from homeinfer.quant.budget import budget_of_bpw
from homeinfer.quant.calibrate import calibrate, study_chunks
from homeinfer.quant.dynamic import DynamicResult, quantize_to_budget
from homeinfer.quant.evaluate import evaluate
from homeinfer.quant.imatrix import write_imatrix
from homeinfer.quant.importance import gather_importance
from homeinfer.quant.kept import kept_folder, model_digest
from homeinfer.quant.quantize import quantize
from homeinfer.quant.study import OnStage
from homeinfer.quant.tensor_rules import parse_tensor_rule
from homeinfer.quant.texts import held_out_text
from tests.quant.talking_model import write_talking_model, write_text
from tests.support.tiny_models import make_tiny_model


@pytest.fixture(scope="module", autouse=True)
def few_tokens() -> Iterator[None]:
    """The same work on fewer tokens of the model's own; tests/cli/test_quantize_budget_command.py does all of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "study_chunks", functools.partial(study_chunks, n_sequences=8, length=64))
        patch.setattr(dynamic, "EVALUATION_CHUNKS", 2)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talking_model(tmp_path_factory.mktemp("model") / "f16.gguf")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def limit_of(model: Path, bpw: float) -> int:
    return budget_of_bpw(read_header(model), bpw).limit_bytes


def make(
    model: Path,
    target: Path,
    limit: int,
    text: Path | None,
    *rules: str,
    imatrix: Path | None = None,
    requantize: bool = False,
    report: Path | None = None,
    on_progress: OnStage = lambda _stage, _at: None,
) -> DynamicResult:
    return quantize_to_budget(
        read_header(model), target, limit, imatrix=imatrix, text=(text,) if text else (), requantize=requantize,
        tensor_overrides=[parse_tensor_rule(rule) for rule in rules], threads=1, report=report, asked="--bpw",
        on_progress=on_progress,
    )  # fmt: skip


def refusal(model: Path, folder: Path, limit: int, text: Path | None, *rules: str, **more: Path | OnStage) -> str:
    """The one line that it refuses with; nothing may appear beside the destination."""
    before = sorted(folder.iterdir())
    with pytest.raises(HomeinferError) as refused:
        make(model, folder / "small.gguf", limit, text, *rules, **more)  # type: ignore[arg-type]
    assert sorted(folder.iterdir()) == before
    assert "\n" not in str(refused.value)
    return str(refused.value)


def answer(path: Path) -> str:
    """What plain llama-cpp-python gets from the model."""
    llama = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, verbose=False)
    try:
        said = llama("the cat", max_tokens=4, temperature=0)
        assert isinstance(said, dict)
        assert said["usage"]["completion_tokens"] > 0
        return said["choices"][0]["text"]
    finally:
        llama.close()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.type for tensor in read_header(path).tensors}


def test_file_within_the_limit_says_what_was_chosen_and_answers(model: Path, text: Path, tmp_path: Path) -> None:
    before, limit, seen = digest(model), limit_of(model, 4.5), list[tuple[str, float]]()
    result = make(
        model, tmp_path / "small.gguf", limit, text, report=tmp_path / "report.html",
        on_progress=lambda stage, at: seen.append((stage, at)),
    )  # fmt: skip
    assert result.size_bytes == (tmp_path / "small.gguf").stat().st_size <= result.limit_bytes == limit
    header = read_header(tmp_path / "small.gguf")
    assert result.bpw == pytest.approx(8 * header.nbytes / header.n_weights, abs=1e-4)
    assert 4.3 < result.bpw <= 4.5
    assert result.mean_kld is not None
    assert 0 < result.mean_kld < 0.1
    assert (header.get("homeinfer.recipe"), header.get("homeinfer.limit_bytes")) == ("dynamic", limit)
    assert header.get("homeinfer.predicted_kld") == pytest.approx(result.predicted_kld, abs=1e-6)
    shares = header.get("homeinfer.tensor_kld")
    assert sum(shares) == pytest.approx(result.predicted_kld, abs=1e-6)
    changed = [tensor.type != kind for tensor, kind in zip(header.tensors, types_of(model).values(), strict=True)]
    assert [share > 0 for share in shares] == changed
    assert header.get("tokenizer.ggml.tokens") == read_header(model).get("tokenizer.ggml.tokens")
    answer(tmp_path / "small.gguf")
    assert "talking llama" in (tmp_path / "report.html").read_text()
    assert {path.suffix for path in tmp_path.iterdir()} == {".html", ".svg", ".gguf"}
    assert all(0 <= at <= 1 for _, at in seen)
    stages = list(dict.fromkeys(stage for stage, _ in seen))
    assert [stage for stage in stages if stage in ("reading the model", "errors of each type", "rounding")] == [
        "reading the model",
        "errors of each type",
        "rounding",
    ]
    assert digest(model) == before


def test_another_size_takes_only_what_was_kept(model: Path, text: Path, tmp_path: Path) -> None:
    make(model, tmp_path / "first.gguf", limit_of(model, 4.5), text)
    folder = kept_folder() / model_digest(read_header(model))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert {"errors.jsonl", "sensitivity.json", "index.json"} <= {path.name for path in before}
    klds = []
    for number, bpw in enumerate((3.3, 4.0, 6.5)):
        result = make(model, tmp_path / f"{number}.gguf", limit_of(model, bpw), text)
        assert result.size_bytes <= result.limit_bytes
        klds.append(result.predicted_kld)
    assert klds == sorted(klds, reverse=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    make(model, tmp_path / "again.gguf", limit_of(model, 4.5), text)
    assert digest(tmp_path / "again.gguf") == digest(tmp_path / "first.gguf")


def test_kld_is_below_that_of_llama_cpps_preset_of_the_same_size(model: Path, text: Path, tmp_path: Path) -> None:
    importance = gather_importance(read_header(model), [text], threads=1)
    preset = quantize(model, tmp_path / "preset.gguf", "IQ4_XS", importance=importance, threads=1)
    words, _ = held_out_text()
    theirs = evaluate(tmp_path / "preset.gguf", model, words, chunks=8, threads=1)
    ours = make(model, tmp_path / "small.gguf", preset.size_bytes, text)
    assert ours.size_bytes <= preset.size_bytes
    assert ours.mean_kld is not None
    assert ours.mean_kld < 0.8 * theirs.mean_kld


def test_rules_decide_before_the_allocation(model: Path, text: Path, tmp_path: Path) -> None:
    rules = ("blk.1.ffn_up=IQ2_XXS", r"attn_v=Q8_0", "ffn_gate=F16", "_norm=Q8_0")
    result = make(model, tmp_path / "small.gguf", limit_of(model, 6.5), text, *rules)
    found = types_of(tmp_path / "small.gguf")
    assert found["blk.1.ffn_up.weight"] == "IQ2_XXS"
    assert [found[f"blk.{layer}.attn_v.weight"] for layer in (0, 1)] == ["Q8_0", "Q8_0"]
    assert found["blk.0.ffn_gate.weight"] == "F16"
    assert found["blk.0.attn_norm.weight"] == "F32"
    assert any("never quantizes norms" in note for note in result.notes)
    assert read_header(tmp_path / "small.gguf").get("homeinfer.tensor_rules") == " ".join(rules)
    assert result.size_bytes <= result.limit_bytes


def test_rules_for_every_tensor_leave_nothing_to_choose(tmp_path: Path, text: Path) -> None:
    model = write_talking_model(tmp_path / "f16.gguf", layers=1, ffn=256)
    result = make(model, tmp_path / "small.gguf", limit_of(model, 9), text, ".*=Q8_0")
    assert set(types_of(tmp_path / "small.gguf").values()) == {"F32", "Q8_0"}
    assert result.predicted_kld == 0
    assert result.mean_kld is not None


def test_mixture_is_rounded_with_all_its_experts(tmp_path: Path, text: Path) -> None:
    make_tiny_model("llama", tmp_path / "moe.gguf", variant="mixtral")
    result = make(tmp_path / "moe.gguf", tmp_path / "small.gguf", limit_of(tmp_path / "moe.gguf", 7), text)
    was, now = read_header(tmp_path / "moe.gguf"), read_header(tmp_path / "small.gguf")
    assert result.size_bytes <= result.limit_bytes
    assert {tensor.name: tensor.shape for tensor in now.tensors} == {
        tensor.name: tensor.shape for tensor in was.tensors
    }
    experts = [tensor for tensor in now.tensors if "_exps" in tensor.name]
    assert {tensor.shape[2] for tensor in experts} == {4}
    assert any(tensor.type != "F32" for tensor in experts)
    assert result.mean_kld is not None
    assert result.mean_kld < 0.05
    answer(tmp_path / "small.gguf")


def test_rows_get_types_that_fit_them_from_a_split_untied_source(tmp_path: Path, text: Path) -> None:
    model = write_talking_model(tmp_path / "f16.gguf", layers=1, embd=288, ffn=272, tied=False, split_tensors=5)
    assert len(list(tmp_path.iterdir())) > 1
    result = make(model, tmp_path / "small.gguf", limit_of(model, 7.5), text)
    now = read_header(tmp_path / "small.gguf")
    assert len(now.files) == 1
    assert all(tensor.shape[0] % TYPE_SIZES[tensor.type][0] == 0 for tensor in now.tensors)
    assert now.by_name["blk.0.ffn_down.weight"].type == "F16"
    narrow = {now.by_name[f"{name}.weight"].type for name in ("blk.0.ffn_up", "blk.0.attn_q", "token_embd", "output")}
    assert narrow <= {"IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    assert result.size_bytes <= result.limit_bytes
    assert result.mean_kld is not None


def test_imatrix_takes_the_texts_place(model: Path, text: Path, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "imatrix.gguf", calibrate(read_header(model), [text], threads=1).imatrix)
    result = make(model, tmp_path / "small.gguf", limit_of(model, 4), None, imatrix=tmp_path / "imatrix.gguf")
    assert result.size_bytes <= result.limit_bytes
    assert any("assumed, not measured: there is no text" in note for note in result.notes)
    assert result.mean_kld is not None
    (tmp_path / "small.gguf").unlink()
    broken = write_talking_model(tmp_path / "nan.gguf", changed={"blk.0.ffn_norm.weight": np.nan})
    line = refusal(broken, tmp_path, limit_of(broken, 4), None, imatrix=tmp_path / "imatrix.gguf")
    assert "tensor 'blk.0.ffn_norm.weight' has NaN or infinite values" in line


def test_budgets_out_of_reach_are_refused_before_anything_is_measured(model: Path, text: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def refused(limit: int, *rules: str) -> str:
        return refusal(model, tmp_path, limit, text, *rules, on_progress=lambda stage, _: seen.append(stage))

    assert "out of reach" in refused(limit_of(model, 1.0))
    assert "whose type is fixed, and the others need at least" in refused(limit_of(model, 5), "ffn_=F16")
    assert "no tensor of this model matches" in refused(limit_of(model, 5), "nothing=Q8_0")
    assert "the disk is too full" in refused(2**60)
    assert seen == []


def test_report_never_replaces_a_model_and_is_refused_early(model: Path, text: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    before = digest(model)
    for report, words in (
        (model, "this is the source itself"),
        (tmp_path / "small.gguf", "the report and the model can't be one file"),
        (tmp_path / "none" / "report.html", "does not exist"),
    ):
        line = refusal(
            model, tmp_path, limit_of(model, 5), text, report=report, on_progress=lambda stage, _: seen.append(stage)
        )
        assert words in line
    assert (digest(model), seen) == (before, [])


@pytest.mark.parametrize("tensor", ["blk.0.ffn_up.weight", "token_embd.weight", "blk.0.attn_norm.weight"])
def test_tensor_with_nan_is_named(tmp_path: Path, text: Path, tensor: str) -> None:
    model = write_talking_model(tmp_path / "nan.gguf", layers=1, ffn=256, changed={tensor: np.nan})
    assert f"tensor '{tensor}' has NaN or infinite values" in refusal(model, tmp_path, limit_of(model, 5), text)


def test_tensor_of_zeros_and_those_it_silences_are_written(tmp_path: Path, text: Path) -> None:
    model = write_talking_model(tmp_path / "zeros.gguf", layers=1, ffn=256, zeros=("blk.0.ffn_up.weight",))
    result = make(model, tmp_path / "small.gguf", limit_of(model, 4), text)
    assert result.size_bytes <= result.limit_bytes
    assert result.mean_kld is not None


def test_quantized_source_is_taken_only_when_asked_and_warned_of(model: Path, text: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "once.gguf", "Q8_0", threads=1)
    limit = limit_of(tmp_path / "once.gguf", 6)
    assert "quantized already (Q8_0)" in refusal(tmp_path / "once.gguf", tmp_path, limit, text)
    result = make(tmp_path / "once.gguf", tmp_path / "twice.gguf", limit, text, requantize=True)
    assert "warning: quantized twice" in result.notes[-1]
    assert result.size_bytes <= limit


def test_interrupted_in_any_stage_nothing_is_left_and_what_was_measured_stays(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOMEINFER_KEPT", str(tmp_path / "kept"))
    (tmp_path / "out").mkdir()
    model = write_talking_model(tmp_path / "f16.gguf", layers=1, ffn=256)
    children = set(psutil.Process().children())
    stages = ("reading the model", "errors of each type", "what matters", "choosing types", "rounding")
    for stage in (*stages, "measuring the result"):
        seen: list[str] = []

        def interrupt(now: str, _at: float, stage: str = stage, seen: list[str] = seen) -> None:
            seen.append(now)
            if now == stage:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make(model, tmp_path / "out" / "small.gguf", limit_of(model, 5), text, on_progress=interrupt)
        assert seen[-1] == stage
        assert list((tmp_path / "out").iterdir()) == []
        assert set(psutil.Process().children()) <= children
        if stage == "errors of each type":
            assert len(list((tmp_path / "kept").rglob("errors.jsonl"))) == 1
    assert not list((tmp_path / "kept").rglob("*.partial"))
    make(model, tmp_path / "out" / "small.gguf", limit_of(model, 5), text)
