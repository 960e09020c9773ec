from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import numpy.typing as npt
import psutil
import pytest

from homeinfer.engine import runtime
from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from homeinfer.quant.evaluate import evaluate, keep_logits, read_text
from homeinfer.quant.logits_file import LogitsFile, is_logits_file
from tests.quant.f16_model import write_f16_model
from tests.support.processes import running
from tests.support.tiny_models import make_tiny_model

TEXT = "the hare and the tortoise ran a race, and the tortoise won it in the end; " * 20
SQUARES = "\n".join(
    f"{n} times {n} is {n * n}, and the square of {n + 1} is {(n + 1) ** 2}, which is {2 * n + 1} more."
    for n in range(1, 41)
)
LLAMA_PERPLEXITY = {
    "ppl": 1.774872,
    "ppl_reference": 1.253104,
    "mean_kld": 0.320558,
    "mean_kld_stderr": 0.069641,
    "kld_median": 0.058275,
    "kld_p99": 4.230668,
    "same_top": 0.86508,
}
"""What `llama-perplexity -c 128 -b 128 --chunks 2 --kl-divergence` of this llama.cpp printed for bend(SmolLM2)
against SmolLM2 on SQUARES."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    make_tiny_model("llama", folder / "reference.gguf")
    return folder / "reference.gguf"


@pytest.fixture(scope="module")
def model(folder: Path, reference: Path) -> Path:
    """The reference with some of its norms changed."""
    return bend(reference, folder / "model.gguf", layers=(0, 1))


@pytest.fixture
def kept(tmp_path: Path, reference: Path) -> Path:
    keep_logits(reference, TEXT, tmp_path / "kept.logits", n_ctx=32, chunks=4, threads=1)
    return tmp_path / "kept.logits"


def bend(source: Path, copy: Path, layers: tuple[int, ...], factor: float = 1.5) -> Path:
    """A copy whose ffn_norm of some layers is multiplied by the factor."""
    shutil.copyfile(source, copy)
    header = read_header(copy)
    for layer in layers:
        tensor = header.by_name[f"blk.{layer}.ffn_norm.weight"]
        assert tensor.type == "F32"
        weights = np.memmap(copy, np.float32, "r+", tensor.offset, (tensor.n_weights,))
        weights *= np.float32(factor)
        weights.flush()
    return copy


def write_headers_only(path: Path, architecture: str) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rewrite(source: Path, name: Path, split_tensors: int = 0, **changed: Any) -> list[Path]:
    """The model as one file, or as files of so many tensors each, with some metadata changed (dots as __)."""
    header, reader = read_header(source), gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(name, header.architecture, split_max_tensors=split_tensors)
    for key, found in header.metadata.items():
        if key != "general.architecture":
            item = None if found.item is None else gguf.GGUFValueType(found.item)
            value = changed.get(key.replace(".", "__"), found.value)
            writer.add_key_value(key, value, gguf.GGUFValueType(found.type), sub_type=item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(name.parent.glob(f"{name.stem}-*-of-*.gguf")) if split_tensors else [name]


def refusal(*arguments: Any, **options: Any) -> str:
    """The one line that evaluate refuses with; no process may be left."""
    with pytest.raises(HomeinferError) as refused:
        evaluate(*arguments, **{"n_ctx": 32, "threads": 1, **options})
    assert evaluators() == []
    line = str(refused.value)
    assert "\n" not in line
    return line


def evaluators() -> list[psutil.Process]:
    return running("homeinfer.quant.evaluator_process")


def log_p_alone(path: Path, n_ctx: int, chunks: int) -> tuple[npt.NDArray[np.float64], list[int]]:
    """Log-probabilities at the scored positions, float64 [n, n_vocab], and the tokens that follow them."""
    llama = runtime.llama()
    opened = llama.llama_model_load_from_file(os.fsencode(path), llama.llama_model_default_params())
    vocab = llama.llama_model_get_vocab(opened)
    data, room = TEXT.encode(), len(TEXT) + 8
    tokens = (llama.llama_token * room)()
    assert llama.llama_tokenize(vocab, data, len(data), tokens, room, True, False) >= n_ctx * chunks
    params = llama.llama_context_default_params()
    params.n_threads = params.n_threads_batch = 1
    rows, following, n_vocab = [], [], llama.llama_vocab_n_tokens(vocab)
    for chunk in range(chunks):
        context = llama.llama_init_from_model(opened, params)
        ids = list(tokens[chunk * n_ctx : (chunk + 1) * n_ctx])
        following += ids[n_ctx // 2 + 1 :]
        if llama.llama_vocab_get_add_bos(vocab):
            ids[0] = llama.llama_vocab_bos(vocab)
        for position, token in enumerate(ids[:-1]):
            one = (llama.llama_token * 1)(token)
            assert llama.llama_decode(context, llama.llama_batch_get_one(one, 1)) == 0
            if position >= n_ctx // 2:
                rows.append(np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (n_vocab,)).astype(float))
        llama.llama_free(context)
    llama.llama_model_free(opened)
    logits = np.array(rows)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), following


def test_numbers_are_those_of_llama_perplexity(smollm2_path: Path, tmp_path: Path) -> None:
    bent = bend(smollm2_path, tmp_path / "bent.gguf", layers=(3, 12, 20))
    found = evaluate(bent, smollm2_path, SQUARES, n_ctx=128, chunks=2, threads=1)
    for key, value in LLAMA_PERPLEXITY.items():
        assert getattr(found, key) == pytest.approx(value, rel=0.02), key
    assert (found.chunks, found.n_ctx, found.tokens) == (2, 128, 2 * 63)
    assert found.size_bytes == bent.stat().st_size
    header = read_header(bent)
    assert found.bpw == pytest.approx(8 * header.nbytes / header.n_weights)


def test_numbers_are_those_of_exact_arithmetic_on_llama_cpps_logits(model: Path, reference: Path) -> None:
    found = evaluate(model, reference, TEXT, n_ctx=32, chunks=6, threads=1)
    (p, following), (q, _) = log_p_alone(reference, 32, 6), log_p_alone(model, 32, 6)
    kld = (np.exp(p) * (p - q)).sum(axis=1)
    rows = np.arange(len(kld))
    assert len(kld) == found.tokens == 6 * 15
    assert found.mean_kld == pytest.approx(kld.mean(), rel=0.01)
    assert found.mean_kld_stderr == pytest.approx(kld.std(ddof=1) / math.sqrt(len(kld)), rel=0.01)
    assert found.kld_median == pytest.approx(np.median(kld), rel=0.01)
    assert found.kld_p99 == pytest.approx(np.percentile(kld, 99), rel=0.01)
    assert found.ppl == pytest.approx(math.exp(-q[rows, following].mean()), rel=1e-3)
    assert found.ppl_reference == pytest.approx(math.exp(-p[rows, following].mean()), rel=1e-3)
    assert found.same_top == pytest.approx((p.argmax(axis=1) == q.argmax(axis=1)).mean(), abs=0.02)


def test_chunk_longer_than_a_batch_is_scored_whole(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path / "long.gguf")
    copy = tmp_path / "longer.gguf"
    shutil.copyfile(tmp_path / "long.gguf", copy)
    text = TEXT * 4
    n_ctx = read_header(copy).arch_get("context_length")
    kept = keep_logits(copy, text, tmp_path / "long.logits", n_ctx=n_ctx, chunks=1, threads=1)
    assert kept.size_bytes == (tmp_path / "long.logits").stat().st_size
    found = evaluate(copy, tmp_path / "long.logits", text, n_ctx=n_ctx, threads=1)
    assert found.tokens == n_ctx - 1 - n_ctx // 2
    assert found.mean_kld == pytest.approx(0, abs=1e-5)
    assert found.same_top == 1


def test_kept_logits_give_the_same_numbers_as_the_reference_itself(model: Path, reference: Path, kept: Path) -> None:
    assert is_logits_file(kept)
    alive = evaluate(model, reference, TEXT, n_ctx=32, chunks=4, threads=1)
    assert evaluate(model, kept, TEXT, n_ctx=32, threads=1) == alive
    assert evaluate(model, kept, TEXT, n_ctx=32, chunks=4, threads=2) == alive
    fewer = evaluate(model, kept, TEXT, n_ctx=32, chunks=2, threads=1)
    assert fewer == evaluate(model, reference, TEXT, n_ctx=32, chunks=2, threads=1)


def test_model_does_not_diverge_from_itself(reference: Path) -> None:
    found = evaluate(reference, reference, TEXT, n_ctx=32, chunks=3, threads=1)
    assert found.mean_kld == pytest.approx(0, abs=1e-5)
    assert found.ppl == pytest.approx(found.ppl_reference, rel=1e-6)
    assert found.same_top == 1


def test_progress_grows_to_the_end(model: Path, reference: Path) -> None:
    shares: list[float] = []
    evaluate(model, reference, TEXT, n_ctx=32, chunks=4, threads=1, on_progress=shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_all_chunks_of_the_text_are_scored_unless_fewer_are_wanted(model: Path, reference: Path) -> None:
    text = TEXT[:400]
    found = evaluate(model, reference, text, n_ctx=16, threads=1)
    assert found.chunks > 5
    assert f"the text has {found.chunks} chunks" in refusal(model, reference, text, n_ctx=16, chunks=found.chunks + 1)


def test_text_that_can_not_be_scored_is_refused(model: Path, reference: Path) -> None:
    assert "too short: it has" in refusal(model, reference, "the hare")
    assert "too short" in refusal(model, reference, "")
    assert "no UTF-8 form" in refusal(model, reference, "the \ud800 hare")
    assert "give --ctx 8 or more" in refusal(model, reference, TEXT, n_ctx=4)
    assert "longer than the" in refusal(model, reference, TEXT, n_ctx=1 << 20)
    assert "--chunks 1 or more" in refusal(model, reference, TEXT, chunks=0)


def test_models_that_can_not_be_compared_are_refused(
    model: Path, reference: Path, kept: Path, smollm2_path: Path, tmp_path: Path
) -> None:
    assert "another vocabulary" in refusal(smollm2_path, kept, TEXT)
    tokens = list(read_header(reference).get("tokenizer.ggml.tokens"))
    tokens[10], tokens[64:66] = tokens[64], [tokens[65], tokens[10]]
    other = rewrite(reference, tmp_path / "other.gguf", tokenizer__ggml__tokens=tokens)[0]
    assert "different vocabularies" in refusal(other, reference, TEXT)
    assert "kept for another text" in refusal(other, kept, TEXT)
    embedding = tmp_path / "bert.gguf"
    write_headers_only(embedding, "bert")
    assert "is an embedding model" in refusal(embedding, reference, TEXT)
    assert "is an embedding model" in refusal(model, embedding, TEXT)
    mute = write_f16_model(tmp_path / "mute.gguf")
    assert "has no vocabulary" in refusal(mute, reference, TEXT)


def test_damaged_models_are_refused(model: Path, reference: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(reference.read_bytes()[:-100])
    assert f"{cut}: tensor " in refusal(cut, reference, TEXT)
    assert "cut short" in refusal(model, cut, TEXT)
    assert "no such file" in refusal(tmp_path / "missing.gguf", reference, TEXT)
    assert "no such file" in refusal(model, tmp_path / "missing.logits", TEXT)
    broken = bend(reference, tmp_path / "broken.gguf", layers=(1,), factor=math.nan)
    assert f"{broken}: its logits in chunk 1 are not finite" in refusal(broken, reference, TEXT)
    assert f"{broken}: its logits in chunk 1 are not finite" in refusal(model, broken, TEXT)


def test_logits_of_something_else_are_refused(model: Path, kept: Path) -> None:
    assert "kept for another text" in refusal(model, kept, TEXT[4:])
    assert "kept for another text" in refusal(model, kept, TEXT[:150])
    assert "give --ctx 32" in refusal(model, kept, TEXT, n_ctx=64)
    assert "holds 4 chunks, 5 are wanted" in refusal(model, kept, TEXT, chunks=5)


def test_damaged_logits_are_refused(model: Path, kept: Path) -> None:
    kept.write_bytes(kept.read_bytes()[:-1])
    assert f"{kept}: the file is cut short" in refusal(model, kept, TEXT)


def test_logits_are_not_written_over_anything(reference: Path, kept: Path, tmp_path: Path) -> None:
    before = kept.read_bytes()
    for destination, words in (
        (kept, "exists already"),
        (reference, "no file for logits"),
        (tmp_path, "no file for logits"),
        (tmp_path / "missing" / "kept.logits", "does not exist"),
    ):
        with pytest.raises(HomeinferError, match=words):
            keep_logits(reference, TEXT, destination, n_ctx=32, chunks=1, threads=1)
    assert kept.read_bytes() == before
    keep_logits(reference, TEXT, kept, n_ctx=32, chunks=1, threads=1, force=True)
    assert LogitsFile(kept).header.n_chunks == 1
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_killed_evaluation_is_one_line_and_leaves_nothing(reference: Path, tmp_path: Path) -> None:
    def kill(_: float) -> None:
        for process in evaluators():
            process.kill()

    with pytest.raises(HomeinferError, match=r"reference\.gguf: the evaluation was killed"):
        keep_logits(reference, TEXT * 200, tmp_path / "kept.logits", n_ctx=32, threads=1, on_progress=kill)
    assert list(tmp_path.iterdir()) == []


def test_failure_of_the_caller_ends_the_evaluation(model: Path, reference: Path, tmp_path: Path) -> None:
    def give_up(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, reference, TEXT, n_ctx=32, threads=1, on_progress=give_up)
    with pytest.raises(KeyboardInterrupt):
        keep_logits(reference, TEXT, tmp_path / "kept.logits", n_ctx=32, threads=1, on_progress=give_up)
    assert evaluators() == []
    assert list(tmp_path.iterdir()) == []


def test_split_model_counts_with_all_its_files(model: Path, reference: Path, tmp_path: Path) -> None:
    parts = rewrite(model, tmp_path / "model.gguf", split_tensors=6)
    other_parts = rewrite(reference, tmp_path / "reference.gguf", split_tensors=6)
    assert len(parts) > 2
    found = evaluate(parts[1], other_parts[0], TEXT, n_ctx=32, chunks=2, threads=1)
    whole = evaluate(model, reference, TEXT, n_ctx=32, chunks=2, threads=1)
    assert found.size_bytes == sum(part.stat().st_size for part in parts)
    assert msgspec.structs.replace(found, size_bytes=0) == msgspec.structs.replace(whole, size_bytes=0)


def test_text_file_is_read_whole_or_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes("naïve\r\n\n".encode())
    assert read_text(text) == "naïve\r\n"
    text.write_bytes(b"abc\xff")
    with pytest.raises(HomeinferError, match="byte 3 is no UTF-8"):
        read_text(text)
    for missing in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(HomeinferError, match="can't be read"):
            read_text(missing)
