from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest

from homeinfer.errors import HomeinferError
from homeinfer.model.header import MetaValue, ValueType, read_header, read_header_bytes
from tests.model import gguf_bytes as raw
from tests.model.gguf_bytes import ARCH, ARRAY, BOOL, STRING, U8, U32

HUGE = 0xFFFFFFFFFFFFFFFF


def refusal(data: bytes) -> str:
    with pytest.raises(HomeinferError) as caught:
        read_header_bytes(data)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message


def file_refusal(path: Path) -> str:
    with pytest.raises(HomeinferError) as caught:
        read_header(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert path.name in message
    return message


def with_tensors(*tensors: bytes) -> bytes:
    head = raw.prologue(len(tensors), 1) + ARCH + b"".join(tensors)
    return head + bytes(-len(head) % 32 + 4096)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (0, "version 0"),
        (1, "convert the model again"),
        (4, "version 4"),
        (0x03000000, "big-endian"),
        (0x02000000, "big-endian"),
        (0xFFFFFFFF, "version 4294967295"),
    ],
)
def test_refuses_other_versions(version: int, words: str) -> None:
    assert words in refusal(raw.prologue(0, 1, version) + ARCH)


@pytest.mark.parametrize("count", [3, 1 << 31, 1 << 63, HUGE, 1 << 17])
def test_refuses_counts_that_the_file_cannot_hold(count: int) -> None:
    filler = bytes(33)
    assert "metadata keys announced" in refusal(raw.prologue(0, count) + filler)
    assert "tensors announced" in refusal(raw.prologue(count, 1) + ARCH + filler)
    strings = raw.key("some.key", ARRAY, raw.array(STRING, count, bytes(16)))
    numbers = raw.key("some.key", ARRAY, raw.array(U32, count, bytes(8)))
    for key in (strings, numbers):
        message = refusal(raw.file_of_keys(ARCH, key))
        assert "key 'some.key'" in message
        assert "announced" in message
    assert "only" in refusal(raw.file_of_keys(ARCH, raw.key("some.key", STRING, struct.pack("<Q", count) + b"ab")))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([raw.key("", U8, b"\0")], ["metadata key 2 of 2", "0 bytes"]),
        ([raw.key("k" * 65536, U8, b"\0")], ["metadata key 2 of 2", "65,536 bytes"]),
        ([raw.key("twice", U8, b"\0")] * 2, ["key 'twice'", "twice"]),
        ([raw.key(b"\xff\xfe", U8, b"\0")], ["not UTF-8"]),
        ([raw.key("a\0b", U8, b"\0")], ["zero byte"]),
        ([raw.key("k", 13, b"\0" * 8)], ["key 'k'", "value type 13"]),
        ([raw.key("k", 0xFFFFFFFF, b"\0" * 8)], ["value type 4294967295"]),
        ([raw.key("k", BOOL, b"\2")], ["boolean of 2"]),
        ([raw.key("k", ARRAY, raw.array(BOOL, 3, b"\1\0\3"))], ["boolean of 3"]),
        ([raw.key("k", ARRAY, raw.array(99, 1, b"\0" * 8))], ["array of value type 99"]),
        ([raw.key("k", ARRAY, raw.array(ARRAY, 1, raw.array(U8, 1, b"\0")))], ["array of arrays"]),
        ([raw.key("general.alignment", U32, struct.pack("<I", 0))], ["alignment of 0"]),
        ([raw.key("general.alignment", U32, struct.pack("<I", 48))], ["alignment of 48"]),
        ([raw.key("general.alignment", U32, struct.pack("<I", 1 << 21))], ["alignment of 2097152"]),
        ([raw.key("general.alignment", U8, b"\x20")], ["UINT8 value, UINT32 expected"]),
        ([raw.key("\x1b[31mred\n", BOOL, b"\2")], [r"key '\x1b[31mred\n'"]),
        ([raw.key("long" * 200, BOOL, b"\2")], ["…': a boolean of 2"]),
    ],
)
def test_refuses_broken_metadata(keys: Sequence[bytes], words: Sequence[str]) -> None:
    message = refusal(raw.file_of_keys(ARCH, *keys))
    assert all(word in message for word in words), message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([raw.tensor("", [32], 0, 0)], ["tensor 1 of 1", "name of 0 bytes"]),
        ([raw.tensor("n" * 64, [32], 0, 0)], ["name of 64 bytes"]),
        ([raw.tensor(b"\xff", [32], 0, 0)], ["not UTF-8"]),
        ([raw.tensor("a\0b", [32], 0, 0)], ["zero byte"]),
        ([raw.tensor("a", [8], 0, 0), raw.tensor("a", [8], 0, 32)], ["tensor 'a'", "twice"]),
        ([raw.tensor("a", [], 0, 0)], ["0 dimensions"]),
        ([raw.tensor("a", [1] * 5, 0, 0)], ["5 dimensions"]),
        ([raw.tensor("a", [0], 0, 0)], ["empty or too large"]),
        ([raw.tensor("a", [HUGE], 0, 0)], ["empty or too large"]),
        ([raw.tensor("a", [1 << 32, 1 << 31], 0, 0)], ["empty or too large"]),
        ([raw.tensor("a", [1 << 62], 0, 0)], ["more than any file holds"]),
        ([raw.tensor("a", [48], 2, 0)], ["rows of 48", "Q4_0 has blocks of 32"]),
        ([raw.tensor("a", [32], 4, 0)], ["Q4_2", "quantize the model again"]),
        ([raw.tensor("a", [32], 31, 0)], ["Q4_0_4_4"]),
        ([raw.tensor("a", [32], 43, 0)], ["type number 43", "newer homeinfer"]),
        ([raw.tensor("a", [32], 0xFFFFFFFF, 0)], ["type number 4294967295"]),
        ([raw.tensor("a", [32], 0, 32)], ["tensor 'a'", "does not follow"]),
        ([raw.tensor("a", [8], 0, 0), raw.tensor("b", [8], 0, 40)], ["tensor 'b'", "not aligned to 32"]),
        ([raw.tensor("a", [32], 0, 0), raw.tensor("b", [8], 0, 64)], ["tensor 'b'", "overlaps"]),
        ([raw.tensor("a", [8], 0, 0), raw.tensor("b", [8], 0, HUGE - 31)], ["does not follow"]),
        ([raw.tensor("a", [1024, 8], 0, 0)], ["tensor 'a'", "cut short", "download it again"]),
    ],
)
def test_refuses_broken_tensors(tensors: Sequence[bytes], words: Sequence[str]) -> None:
    message = refusal(with_tensors(*tensors))
    assert all(word in message for word in words), message


def test_tensors_of_more_than_the_largest_file_are_refused_even_when_truncation_is_allowed() -> None:
    half = [1 << 60]
    data = with_tensors(raw.tensor("a", half, 0, 0), raw.tensor("b", half, 0, 1 << 62))
    with pytest.raises(HomeinferError, match="in all"):
        read_header_bytes(data, allow_truncated=True)


def test_refuses_what_is_no_model() -> None:
    name = raw.key("general.name", STRING, raw.string("x"))
    assert "'general.architecture' is missing" in refusal(raw.file_of_keys(name))
    for bad in (raw.string(""), raw.string("a\nb"), raw.string(b"\xff"), raw.string("x" * 65)):
        message = refusal(raw.file_of_keys(raw.key("general.architecture", STRING, bad)))
        assert "short name expected" in message
    assert "short name" in refusal(raw.file_of_keys(raw.key("general.architecture", U32, bytes(4))))


def test_layer_count_that_is_none_is_refused_by_name() -> None:
    counts = [raw.key("llama.block_count", U32, struct.pack("<I", count)) for count in (0, 513, 1 << 31)]
    for keys in ([], *([count] for count in counts)):
        header = read_header_bytes(raw.file_of_keys(ARCH, *keys))
        with pytest.raises(HomeinferError, match=r"llama\.block_count"):
            _ = header.n_layer


def test_says_what_a_file_is_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    kinds = {
        "empty": b"",
        "text file": "Grüße, world.\nNot a model.\n".encode(),
        "web page": b"<!DOCTYPE html><html>Sign in</html>",
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        "safetensors": struct.pack("<Q", 90) + b'{"__metadata__":{"format":"pt"}}',
        "ZIP or PyTorch": b"PK\x03\x04" + bytes(60),
        "it starts with b'\\x89PNG'": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "bytes expected": b"GGUF\3\0\0",
    }
    for words, content in kinds.items():
        path.write_bytes(content)
        assert words in file_refusal(path)


def test_refuses_paths_that_hold_no_readable_file(tmp_path: Path) -> None:
    assert "no such file" in file_refusal(tmp_path / "missing.gguf")
    assert "directory" in file_refusal(tmp_path)
    assert "cannot be read" in file_refusal(tmp_path / ("n" * 300))
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    assert "not a regular file" in file_refusal(pipe)
    loop = tmp_path / "loop.gguf"
    loop.symlink_to(loop)
    assert "cannot be read" in file_refusal(loop)


def test_a_file_cut_anywhere_is_refused_and_its_whole_header_is_enough_on_request() -> None:
    metadata = {**raw.ARCHITECTURE, "k": MetaValue(ValueType.ARRAY, ["a", "bc"], ValueType.STRING)}
    tensors = [("a", (32,), "F32"), ("b", (32,), "Q8_0")]
    data = raw.gguf(metadata, tensors)
    whole = read_header_bytes(data)
    table_end = len(raw.head(metadata, tensors)[0].rstrip(b"\0")) + 8
    for length in range(len(data)):
        refusal(data[:length])
    for length in range(table_end, len(data)):
        cut = read_header_bytes(data[:length], allow_truncated=True)
        assert cut.truncated
        assert (cut.metadata, cut.tensors) == (whole.metadata, whole.tensors)


def test_claims_of_a_small_file_cost_no_memory() -> None:
    lies = [
        raw.file_of_keys(ARCH, raw.key("k", ARRAY, raw.array(kind, (1 << 24) - 1, bytes(2048))))
        for kind in (U8, U32, STRING, BOOL)
    ]
    lies.append(raw.prologue(1 << 20, 1 << 16) + bytes(2048))
    lies.append(raw.file_of_keys(ARCH, raw.key("k", STRING, struct.pack("<Q", 1 << 30) + bytes(2048))))
    tracemalloc.start()
    for data in lies:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        refusal(data)
        assert tracemalloc.get_traced_memory()[1] - before < 64 << 10
    tracemalloc.stop()
