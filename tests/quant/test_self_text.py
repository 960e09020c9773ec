from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from homeinfer.quant.calibrate import study_chunks
from homeinfer.quant.chat_turns import find_turns
from homeinfer.quant.generated_file import read_generated, write_generated
from homeinfer.quant.observer_process import generate_in_process
from homeinfer.quant.self_text import bounded, generate
from tests.quant.f16_model import write_f16_model
from tests.support.tiny_models import make_tiny_model

GIB = 1 << 30


def _text(path: Path, tokens: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> str:
    tokenizer = Tokenizer(str(path))
    pieces = [tokenizer.piece(int(token), special=True) for token in tokens]
    tokenizer.close()
    return b"".join(pieces).decode("utf-8", "replace")


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "llama.gguf"
    make_tiny_model("llama", path)
    return path


def _with_template(source: Path, path: Path, template: str) -> Path:
    """A copy of a tiny model with another chat template."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "tokenizer.chat_template"):
            item = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], item)
    writer.add_chat_template(template)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_half_is_conversations_and_half_is_plain_text(smollm2_path: Path) -> None:
    done: list[float] = []
    texts = generate_in_process(smollm2_path, n_sequences=2, length=48, threads=1, on_progress=done.append)
    again = generate(smollm2_path, n_sequences=2, length=48, threads=1)
    assert [text.tolist() for text in texts] == [text.tolist() for text in again]
    assert all(text.dtype == np.int32 and text.shape == (48,) for text in texts)
    assert min(map(np.min, texts)) >= 0
    assert max(map(np.max, texts)) < 49152
    read = [_text(smollm2_path, text) for text in texts]
    assert read[0].startswith("<|im_start|>system\n")
    assert "<|im_start|>user\n" in read[0]
    assert "<|im_start|>" not in read[1]
    assert done == sorted(done)
    assert done[-1] <= 1


def test_another_seed_writes_another_text(tiny_path: Path) -> None:
    first, second = (generate(tiny_path, n_sequences=2, length=24, seed=seed, threads=1) for seed in (1, 2))
    assert [text.tolist() for text in first] != [text.tolist() for text in second]


def test_a_model_without_a_template_writes_plain_text_from_the_token_that_begins_it(gemma_path: Path) -> None:
    read = [_text(gemma_path, text) for text in generate(gemma_path, n_sequences=2, length=6, threads=1)]
    assert all(text.startswith("<bos>") and "<start_of_turn>" not in text for text in read)
    assert read[0] != read[1]


def test_an_end_of_a_question_brings_the_answer_and_that_of_an_answer_the_next_question(
    tiny_path: Path, tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|end|>{% endfor %}a:"
    path = _with_template(tiny_path, tmp_path / "chat.gguf", template)
    tokenizer = Tokenizer(str(path))
    turns = find_turns(read_header(path), tokenizer)
    assert turns is not None
    assert [tokenizer.piece(i, special=True) for i in (turns.answer[0], turns.again[0])] == [b"<|end|>", b"<|end|>"]
    read = _text(path, generate(path, n_sequences=2, length=500, threads=1)[0])
    assert read.startswith(("u:", "<|begin|>u:"))
    parts = read.split("<|end|>")
    assert len(parts) > 2
    assert all(part.startswith("a:" if i % 2 == 0 else "u:") for i, part in enumerate(parts[1:-1]))


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('no') }}", "{{ messages[0].role }}"])
def test_a_template_that_cannot_be_rendered_leaves_plain_text(template: str, tiny_path: Path, tmp_path: Path) -> None:
    path = _with_template(tiny_path, tmp_path / "broken.gguf", template)
    tokenizer = Tokenizer(str(path))
    assert find_turns(read_header(path), tokenizer) is None
    assert len(generate(path, n_sequences=2, length=16, threads=1)) == 2


@pytest.mark.parametrize("arch", ["mamba", "rwkv6", "lfm2", "qwen3moe"])
def test_other_kinds_of_models_write_as_well(arch: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    make_tiny_model(arch, path)
    texts = generate(path, n_sequences=3, length=12, threads=1)
    assert [text.shape for text in texts] == [(12,)] * 3
    assert len({tuple(text.tolist()) for text in texts}) == 3


def test_weights_that_are_no_numbers_are_one_line(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "nan.gguf"
    path.write_bytes(tiny_path.read_bytes())
    tensor = read_header(path).by_name["output_norm.weight"]
    with path.open("r+b") as file:
        file.seek(read_header(path).files[0].data_offset + tensor.offset)
        file.write(np.full(4, np.nan, np.float32).tobytes())
    with pytest.raises(HomeinferError, match=r"nan\.gguf: the model's logits are no numbers") as caught:
        generate_in_process(path, n_sequences=2, length=8, threads=1)
    assert "\n" not in str(caught.value)


def test_sequences_are_halved_until_memory_suffices(smollm2_path: Path, tiny_path: Path) -> None:
    header = read_header(smollm2_path)
    assert bounded(header, 49152, 48, 320, 64 * GIB) == (48, 320)
    assert bounded(header, 262_144, 96, 320, 64 * GIB) == (48, 320)
    assert bounded(header, 49152, 48, 320, 2 * GIB) == (12, 320)
    assert bounded(header, 49152, 48, 320, 0) == (1, 320)
    assert bounded(read_header(tiny_path), 300, 500, 4096, GIB)[1] == 512


def test_study_chunks_are_texts_and_then_what_the_model_wrote_once(tiny_path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Bread is baked in the morning. " * 100, encoding="utf-8")
    header = read_header(tiny_path)

    def study(done: list[float]) -> list[list[int]]:
        found = study_chunks(
            header, [text], chunks=1, threads=1, folder=tmp_path / "kept", n_sequences=2, length=16,
            on_progress=done.append,
        )  # fmt: skip
        return [chunk.tolist() for chunk in found]

    first = study([])
    assert [len(chunk) for chunk in first] == [512, 16, 16]
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.name == "generated-1-2x16.npy"
    written = kept.stat().st_mtime_ns
    assert study([]) == first
    assert kept.stat().st_mtime_ns == written
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-4])
    assert study([]) == first
    assert kept.read_bytes() == whole


def test_a_kept_file_that_is_damaged_or_of_others_is_none(tmp_path: Path) -> None:
    path = tmp_path / "generated.npy"
    texts = [np.arange(4, dtype=np.int32), np.arange(4, 8, dtype=np.int32)]
    write_generated(path, texts)
    read = read_generated(path, 2, 4, 8)
    assert read is not None
    assert [text.tolist() for text in read] == [text.tolist() for text in texts]
    assert all(text.dtype == np.int32 for text in read)
    assert [entry.name for entry in tmp_path.iterdir()] == ["generated.npy"]
    assert read_generated(path, 1, 4, 8) is None
    assert read_generated(path, 2, 3, 8) is None
    assert read_generated(path, 2, 4, 7) is None
    assert read_generated(tmp_path / "none.npy", 2, 4, 8) is None
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at])
        assert read_generated(path, 2, 4, 8) is None
    for at in range(128):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        read_generated(path, 2, 4, 8)
    for damaged in (whole + b"more", whole[:-1] + b"\xff", whole.replace(b"<i4", b"<f4")):
        path.write_bytes(damaged)
        assert read_generated(path, 2, 4, 8) is None


def test_a_kept_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file")
    with pytest.raises(HomeinferError, match=r"cannot be written: .*HOMEINFER_KEPT") as caught:
        write_generated(tmp_path / "kept" / "generated.npy", [np.zeros(4, np.int32)])
    assert "\n" not in str(caught.value)


def test_a_model_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    path = write_f16_model(tmp_path / "none.gguf", layers=1)
    with pytest.raises(HomeinferError, match="has no vocabulary"):
        study_chunks(read_header(path), chunks=1, threads=1, folder=tmp_path / "kept")
    with pytest.raises(HomeinferError, match="has no vocabulary"):
        generate_in_process(path, threads=1)
