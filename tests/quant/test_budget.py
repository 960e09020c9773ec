from __future__ import annotations

import functools
import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, MetaValue, ValueType, read_header, read_header_bytes
from homeinfer.quant.budget import (
    Budget,
    Device,
    budget_of_bpw,
    budget_of_devices,
    budget_of_size,
    check_budget,
    compute_bytes,
    kv_cache_bytes,
    parse_size,
    read_profiles,
    smallest_bytes,
    source_bytes,
)
from homeinfer.quant.quantize import quantize
from tests.model.deepseek import deepseek_header
from tests.quant.f16_model import write_f16_model

GB = 10**9


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16_model(tmp_path_factory.mktemp("source") / "model-f16.gguf")


@pytest.fixture(scope="module")
def header(source: Path) -> Header:
    return read_header(source)


@functools.cache
def deepseek() -> Header:
    found = read_header_bytes(deepseek_header(), allow_truncated=True)
    heads = {"head_count": 128, "head_count_kv": 128, "key_length": 192, "value_length": 128}
    keys = {f"deepseek2.attention.{key}": MetaValue(ValueType.UINT32, number) for key, number in heads.items()}
    return msgspec.structs.replace(found, metadata=found.metadata | keys)


@functools.cache
def layer_bytes() -> tuple[int, ...]:
    """Of each of deepseek's layers."""
    tensors = deepseek().tensors
    return tuple(sum(t.nbytes for t in tensors if t.name.startswith(f"blk.{n}.")) for n in range(61))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("98833504", 98833504),
        ("40GB", 40 * GB),
        ("40 GiB", 40 * 2**30),
        ("3.5G", 3_500_000_000),
        ("3.5gi", 3 * 2**30 + 2**29),
        (".5tb", 500 * GB),
        ("1kB", 1000),
        ("1 KiB", 1024),
        ("512b", 512),
        ("106.863712MB", 106_863_712),
    ],
)
def test_size_is_read_as_people_write_it(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "-1", "40XB", "4e9", "1.2.3", "nan", "40 G iB", "9" * 30, "0.2", "٤٠GBx"]
)
def test_what_is_no_size_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(HomeinferError, match="is no size; write bytes, or a number such as 40GB"):
        parse_size(text)


@given(st.integers(1, 2**60))
def test_whole_bytes_are_never_rounded(size: int) -> None:
    assert parse_size(str(size)) == size


def test_bits_per_weight_are_of_the_tensors(source: Path, header: Header, tmp_path: Path) -> None:
    result = quantize(source, tmp_path / "small.gguf", "Q4_0")
    bpw = 8 * read_header(tmp_path / "small.gguf").nbytes / header.n_weights
    assert result.size_bytes <= budget_of_bpw(header, bpw + 1e-6).limit_bytes + 32
    assert result.size_bytes > budget_of_bpw(header, bpw - 0.01).limit_bytes


def test_source_has_the_bytes_that_copying_it_gives(source: Path, header: Header, tmp_path: Path) -> None:
    assert quantize(source, tmp_path / "copy.gguf", "COPY").size_bytes == source_bytes(header)


def test_budgets_out_of_reach_are_refused_with_the_numbers(header: Header) -> None:
    least, most = smallest_bytes(header), source_bytes(header)
    check_budget(header, budget_of_size(least))
    check_budget(header, budget_of_size(most - 1))
    with pytest.raises(HomeinferError, match=f"at most {least - 1:,} bytes, and the smallest .* is {least:,} "):
        check_budget(header, budget_of_size(least - 1))
    with pytest.raises(HomeinferError, match=f"the source itself has only {most:,} .*: use it as it is"):
        check_budget(header, budget_of_size(most))
    with pytest.raises(HomeinferError, match=r"1 bits per weight: .* ask for more"):
        check_budget(header, budget_of_bpw(header, 1))


def test_smallest_file_has_the_smallest_types_that_fit(header: Header) -> None:
    kept = {name: tensor for name, tensor in header.by_name.items() if "norm" in name}
    only = smallest_bytes(header, ("Q8_0", "Q2_K"))
    weights = header.n_weights - sum(tensor.n_weights for tensor in kept.values())
    assert only == source_bytes(header) - 2 * weights + weights // 256 * 84
    assert smallest_bytes(header) < only


def test_kv_cache_is_two_vectors_a_head_and_token(header: Header) -> None:
    assert kv_cache_bytes(header, 4096) == 4 * 4096 * 2 * (2 * (64 + 64))
    assert kv_cache_bytes(deepseek(), 4096) == 61 * 4096 * 2 * 128 * (192 + 128)
    assert compute_bytes(header, 4096) > 4 * 512 * (4 * 4096 + 512)


def test_one_device_gives_its_memory_without_what_it_needs(header: Header) -> None:
    budget = budget_of_devices(header, [Device("desk", GB)])
    assert budget.limit_bytes == 900_000_000 - 120_000_000 - compute_bytes(header, 4096) - kv_cache_bytes(header, 4096)
    assert budget.says.startswith("the memory of desk: 1,000,000,000 bytes, of which ")


def test_devices_add_up_to_less_than_their_sum_since_layers_stay_whole() -> None:
    one = budget_of_devices(deepseek(), [Device("a", 400 * GB)]).limit_bytes
    two = budget_of_devices(deepseek(), [Device("a", 200 * GB), Device("b", 200 * GB)]).limit_bytes
    eight = budget_of_devices(deepseek(), [Device(str(index), 50 * GB) for index in range(8)]).limit_bytes
    assert one > two > eight > 0.8 * one


def test_device_too_small_for_a_layer_does_not_lower_the_limit() -> None:
    big = [Device("a", 200 * GB), Device("b", 200 * GB)]
    assert (
        budget_of_devices(deepseek(), [*big, Device("phone", 2 * GB)]).limit_bytes
        == budget_of_devices(deepseek(), big).limit_bytes
    )


@settings(max_examples=50)
@given(st.lists(st.integers(3, 500), min_size=1, max_size=8))
@example([3, 24])  # little is left for weights: a layer is hardly more than its cache
def test_layers_of_the_size_that_a_limit_allows_can_be_handed_out(memory: list[int]) -> None:
    devices = [Device(str(index), amount * GB) for index, amount in enumerate(memory)]
    try:
        limit = budget_of_devices(deepseek(), devices).limit_bytes
    except HomeinferError:
        return
    share = limit / deepseek().nbytes
    layers = [share * nbytes for nbytes in layer_bytes()]
    ends = limit - sum(layers)
    cache = kv_cache_bytes(deepseek(), 4096) / 61
    overhead = 120_000_000 + compute_bytes(deepseek(), 4096)
    rooms = sorted((device.memory_bytes * 0.9 - overhead + 100 for device in devices), reverse=True)
    rooms[0] -= ends
    for room in rooms:
        while layers and layers[0] + cache <= room:
            room -= layers.pop(0) + cache
    assert not layers


def test_cluster_without_room_is_refused() -> None:
    with pytest.raises(HomeinferError, match="the memory of phone: 1,000,000,000 bytes: nothing is left for weights"):
        budget_of_devices(deepseek(), [Device("phone", GB)])


def test_profiles_of_several_files_add_up(tmp_path: Path) -> None:
    paths = []
    for name, memory in (("desk", 16 * GB), ("laptop", 8 * GB)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"devices": [{"name": name, "memory_bytes": memory, "gpu": None}], "v": 1}))
    assert read_profiles(paths) == (Device("desk", 16 * GB), Device("laptop", 8 * GB))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "this is no profile"),
        ("[]", "this is no profile: Expected `object`"),
        ('{"devices": []}', "at least one device"),
        ('{"devices": [{"name": "a"}]}', "missing required field `memory_bytes`"),
        ('{"devices": [{"name": "a", "memory_bytes": "8 GB"}]}', "Expected `int`, got `str`"),
        ('{"devices": [{"name": "a", "memory_bytes": 0}]}', "more than 0 memory_bytes"),
        ("\xff", "this is no profile"),
    ],
)
def test_what_is_no_profile_is_refused_in_one_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(HomeinferError, match=words) as refused:
        read_profiles([path])
    assert "\n" not in str(refused.value)
    with pytest.raises(HomeinferError, match="can't be read"):
        read_profiles([tmp_path / "none.json"])


def test_budget_is_plain_data() -> None:
    assert budget_of_size(5) == Budget(5, "5 bytes")
