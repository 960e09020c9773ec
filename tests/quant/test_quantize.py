from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from homeinfer.engine import runtime
from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from homeinfer.quant.quantize import Progress, quantize
from homeinfer.quant.recipes import dq3_k_m
from tests.quant.f16_model import VOCAB, write_f16_model
from tests.support.processes import running

LLAMA_CPP_ALONE = """
import ctypes, sys
import llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16_model(tmp_path_factory.mktemp("source") / "model-f16.gguf")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(source: Path, destination: Path, recipe: str = "Q4_K_M", force: bool = False) -> str:
    """The one line that quantize refuses with; nothing may appear beside the destination."""
    before = names(destination.parent) if destination.parent.is_dir() else []
    with pytest.raises(HomeinferError) as refused:
        quantize(source, destination, recipe, force=force)
    assert (names(destination.parent) if destination.parent.is_dir() else []) == before
    line = str(refused.value)
    assert "\n" not in line
    return line


def first_logits(path: Path) -> npt.NDArray[np.float32]:
    """What the model says after tokens 1, 2, 3."""
    llama = runtime.llama()
    model_params = llama.llama_model_default_params()
    model = llama.llama_model_load_from_file(os.fsencode(path), model_params)
    assert model
    context = llama.llama_init_from_model(model, llama.llama_context_default_params())
    tokens = (llama.llama_token * 3)(1, 2, 3)
    assert llama.llama_decode(context, llama.llama_batch_get_one(tokens, 3)) == 0
    logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (VOCAB,)).copy()
    llama.llama_free(context)
    llama.llama_model_free(model)
    return logits


def cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_preset_is_what_llama_cpp_alone_writes(source: Path, tmp_path: Path) -> None:
    result = quantize(source, tmp_path / "ours.gguf", "q4_k_m")
    alone = [sys.executable, "-c", LLAMA_CPP_ALONE, str(source), str(tmp_path / "alone.gguf"), "15"]
    subprocess.run(alone, check=True, capture_output=True)
    assert digest(tmp_path / "ours.gguf") == digest(tmp_path / "alone.gguf")
    header = read_header(tmp_path / "ours.gguf")
    assert result.recipe == "Q4_K_M"
    assert result.size_bytes == (tmp_path / "ours.gguf").stat().st_size
    assert result.bpw == pytest.approx(8 * header.nbytes / header.n_weights, abs=1e-4)
    assert result.seconds > 0
    assert result.notes == ()
    assert names(tmp_path) == ["alone.gguf", "ours.gguf"]


def test_dq3_k_m_has_the_types_of_the_recipe_and_its_name(source: Path, tmp_path: Path) -> None:
    result = quantize(source, tmp_path / "small.gguf", "DQ3_K_M")
    header = read_header(tmp_path / "small.gguf")
    recipe = dq3_k_m(read_header(source))
    assert {name: header.by_name[name].type for name, _ in recipe.overrides} == dict(recipe.overrides)
    assert {tensor.type for tensor in header.tensors if "norm" in tensor.name} == {"F32"}
    assert header.get("homeinfer.recipe") == "DQ3_K_M"
    assert header.get("general.file_type") == gguf.LlamaFileType.MOSTLY_Q3_K_M
    assert result.notes == recipe.notes


@pytest.mark.parametrize(("recipe", "least"), [("Q8_0", 0.995), ("Q4_K_M", 0.93), ("DQ3_K_M", 0.9)])
def test_quantized_model_answers_like_its_source(source: Path, tmp_path: Path, recipe: str, least: float) -> None:
    quantize(source, tmp_path / "small.gguf", recipe)
    assert cosine(first_logits(source), first_logits(tmp_path / "small.gguf")) > least


def test_metadata_of_the_source_is_kept(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "small.gguf", "Q8_0")
    was, now = read_header(source).metadata, read_header(tmp_path / "small.gguf").metadata
    changed = {"general.file_type", "general.quantization_version"}
    assert {key: value for key, value in now.items() if key not in changed} == {
        key: value for key, value in was.items() if key not in changed
    }


def test_progress_names_every_tensor_and_grows(source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    quantize(source, tmp_path / "small.gguf", "Q8_0", on_progress=seen.append)
    header = read_header(source)
    assert {progress.tensor for progress in seen} == {tensor.name for tensor in header.tensors}
    assert [progress.index for progress in seen] == list(range(1, len(header.tensors) + 1))
    assert {progress.count for progress in seen} == {len(header.tensors)}
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert 0.9 < fractions[-1] < 1


@pytest.mark.parametrize("recipe", ["DQ3_K_M", "COPY"])
def test_split_source_gives_one_file_from_any_of_its_parts(source: Path, tmp_path: Path, recipe: str) -> None:
    write_f16_model(tmp_path / "split.gguf", split_tensors=10)
    quantize(tmp_path / "split-00003-of-00004.gguf", tmp_path / "small.gguf", recipe)
    quantize(source, tmp_path / "whole.gguf", recipe)
    assert digest(tmp_path / "small.gguf") == digest(tmp_path / "whole.gguf")


def test_source_with_another_alignment_gives_a_file_that_loads(source: Path, tmp_path: Path) -> None:
    write_f16_model(tmp_path / "aligned.gguf", alignment=4096)
    quantize(tmp_path / "aligned.gguf", tmp_path / "small.gguf", "Q8_0")
    assert cosine(first_logits(source), first_logits(tmp_path / "small.gguf")) > 0.995


@pytest.mark.parametrize(
    ("recipe", "note"),
    [
        ("DQ3_K_M", "6 IQ4_NL for Q3_K, 10 IQ4_NL for Q4_K, 4 Q8_0 for Q6_K"),
        ("Q3_K_M", "13 Q4_0 for Q3_K, 4 Q5_0 for Q4_K, 2 Q5_1 for Q5_K"),
    ],
)
def test_rows_that_no_k_quant_fits_are_said(tmp_path: Path, recipe: str, note: str) -> None:
    source = write_f16_model(tmp_path / "narrow.gguf", layers=3, embd=320)
    result = quantize(source, tmp_path / "small.gguf", recipe)
    assert note in result.notes[-1]
    assert first_logits(tmp_path / "small.gguf").shape == (VOCAB,)


def test_quantized_source_is_refused_unless_asked_for(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "once.gguf", "Q4_K_M")
    line = refusal(tmp_path / "once.gguf", tmp_path / "twice.gguf", "Q3_K_M")
    assert "quantized already (Q4_K" in line
    assert "--requantize" in line
    assert "gives it already" in refusal(tmp_path / "once.gguf", tmp_path / "twice.gguf", "Q4_K_M")
    result = quantize(tmp_path / "once.gguf", tmp_path / "twice.gguf", "Q3_K_M", requantize=True)
    assert "quantized twice" in result.notes[0]


def test_destination_is_overwritten_only_with_force(source: Path, tmp_path: Path) -> None:
    destination = tmp_path / "small.gguf"
    destination.write_text("precious")
    assert "exists already; --force" in refusal(source, destination)
    assert destination.read_text() == "precious"
    quantize(source, destination, "Q8_0", force=True)
    assert read_header(destination).tensors


def test_link_is_followed_to_the_file_to_write(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.gguf").symlink_to(tmp_path / "disk" / "small.gguf")
    quantize(source, tmp_path / "link.gguf", "Q8_0")
    assert (tmp_path / "link.gguf").is_symlink()
    assert names(tmp_path / "disk") == ["small.gguf"]


@pytest.mark.parametrize("how", ["same", "symlink", "hardlink", "dots", "part"])
def test_source_is_never_its_own_destination(tmp_path: Path, how: str) -> None:
    source = write_f16_model(tmp_path / "model.gguf", layers=1, split_tensors=4 if how == "part" else 0)
    before = digest(source)
    other = tmp_path / "other.gguf"
    if how == "symlink":
        other.symlink_to(source)
    elif how == "hardlink":
        os.link(source, other)
    elif how == "dots":
        (tmp_path / "x").mkdir()
        other = tmp_path / "x" / ".." / "model.gguf"
    elif how == "part":
        other = tmp_path / source.name.replace("00001-of", "00002-of")
    else:
        other = source
    assert "the source itself" in refusal(source, other, force=True)
    assert digest(source) == before


def test_sources_that_are_no_model_are_refused(source: Path, tmp_path: Path) -> None:
    text, cut = tmp_path / "notes.txt", tmp_path / "cut.gguf"
    text.write_text("not a model at all, just a text\n" * 10)
    cut.write_bytes(source.read_bytes()[:-100_000])
    small = tmp_path / "small.gguf"
    assert "no such file" in refusal(tmp_path / "missing.gguf", small)
    assert "text file" in refusal(text, small)
    assert "cut short" in refusal(cut, small)
    assert "directory" in refusal(tmp_path, small)


def test_destinations_that_cannot_be_are_refused(source: Path, tmp_path: Path) -> None:
    assert "directory" in refusal(source, tmp_path)
    assert "does not exist" in refusal(source, tmp_path / "nowhere" / "small.gguf")
    assert "does not exist" in refusal(source, source / "small.gguf")
    assert "too long" in refusal(source, tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(source, tmp_path / "pipe", force=True)


def test_recipes_that_cannot_be_are_refused(source: Path, tmp_path: Path) -> None:
    assert "did you mean Q4_K_M" in refusal(source, tmp_path / "small.gguf", "Q4KM")
    assert "needs an importance matrix" in refusal(source, tmp_path / "small.gguf", "iq2_xs")


def test_tensor_with_nan_is_named(tmp_path: Path) -> None:
    write_f16_model(tmp_path / "nan.gguf", nan_in="blk.1.ffn_up.weight")
    assert "'blk.1.ffn_up.weight' has NaN or infinite values" in refusal(tmp_path / "nan.gguf", tmp_path / "small.gguf")


def test_model_that_llama_cpp_aborts_on_is_one_line(tmp_path: Path) -> None:
    write_f16_model(tmp_path / "deep.gguf", layers=1)
    data = (tmp_path / "deep.gguf").read_bytes()
    key = b"llama.block_count\x04\x00\x00\x00"
    assert data.count(key + b"\x01\x00") == 1
    (tmp_path / "deep.gguf").write_bytes(data.replace(key + b"\x01\x00", key + b"\xff\xff"))
    line = refusal(tmp_path / "deep.gguf", tmp_path / "small.gguf")
    assert "SIGABRT: GGML_ASSERT(hparams.n_layer" in line


def test_disk_without_room_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    huge = tmp_path / "huge.gguf"
    writer = gguf.GGUFWriter(huge, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(2**20)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor_info("output.weight", (2**21, 2**20), np.dtype(np.float16), 2**42)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with huge.open("rb+") as file:
        file.truncate(2**42 + 2**20)
    line = refusal(huge, tmp_path / "huger.gguf", "F32")
    assert "disk is too full: 8,192.0 GiB are needed" in line


def test_killed_quantizer_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    before = digest(source)

    def kill(_: Progress) -> None:
        assert len(names(tmp_path)) == 1
        for worker in running("homeinfer.quant.worker"):
            worker.kill()

    with pytest.raises(HomeinferError, match="the quantizer was killed"):
        # slow, so that it is not done before it is found
        quantize(source, tmp_path / "small.gguf", "IQ3_S", threads=1, on_progress=kill)
    assert names(tmp_path) == []
    assert digest(source) == before


def test_failure_of_the_caller_ends_the_quantizer(source: Path, tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_text("older")

    def give_up(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "small.gguf", "Q4_K_M", force=True, on_progress=give_up)
    assert (tmp_path / "small.gguf").read_text() == "older"
    assert names(tmp_path) == ["small.gguf"]
    assert not running("homeinfer.quant.worker")
