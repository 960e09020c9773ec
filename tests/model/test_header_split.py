from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from homeinfer.errors import HomeinferError
from homeinfer.model.header import MetaValue, ValueType, read_header
from tests.model import gguf_bytes as raw

PARTS = 3


def write_split(directory: Path, small_first: bool = False) -> list[Path]:
    writer = gguf.GGUFWriter(directory / "tiny.gguf", "llama", split_max_tensors=2, small_first_shard=small_first)
    writer.add_block_count(5)
    for index in range(5):
        writer.add_tensor(f"blk.{index}.ffn_up.weight", np.full((3, 8), index, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(directory.glob("tiny-*.gguf"))


def write_part(
    path: Path, number: int, count: int, total: int, *tensors: str, kind: ValueType = ValueType.UINT16
) -> None:
    metadata = {
        **raw.ARCHITECTURE,
        "split.no": MetaValue(kind, number),
        "split.count": MetaValue(ValueType.UINT16, count),
        "split.tensors.count": MetaValue(ValueType.INT32, total),
    }
    path.write_bytes(raw.gguf(metadata, [(name, (8,), "F32") for name in tensors]))


def refusal(path: Path) -> str:
    with pytest.raises(HomeinferError) as caught:
        read_header(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("small_first", [False, True])
@pytest.mark.parametrize("given", range(PARTS))
def test_all_parts_are_read_whichever_is_given(tmp_path: Path, given: int, small_first: bool) -> None:
    paths = write_split(tmp_path, small_first)
    header = read_header(paths[given])
    assert [file.path for file in header.files] == [str(path) for path in paths]
    assert [tensor.name for tensor in header.tensors] == [f"blk.{i}.ffn_up.weight" for i in range(5)]
    assert header.n_layer == 5
    assert header.get("split.count") == len(paths)
    for index, tensor in enumerate(header.tensors):
        data = Path(header.files[tensor.file].path).read_bytes()
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == np.full(24, index, np.float32).tobytes()


def test_missing_part_is_named(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[1].unlink()
    message = refusal(paths[0])
    assert "tiny-00002-of-00003.gguf: part 2 of 3 is missing" in message


def test_parts_in_the_wrong_place_are_refused(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    contents = [path.read_bytes() for path in paths]
    paths[1].write_bytes(contents[2])
    assert "key 'split.no': 1 expected in part 2 of 3, 2 found" in refusal(paths[0])
    paths[1].write_bytes(raw.gguf(raw.ARCHITECTURE))
    assert "key 'split.no': 1 expected in part 2 of 3, nothing found" in refusal(paths[0])
    write_part(paths[1], 1, 4, 5)
    assert "key 'split.count': 3 expected in part 2 of 3, 4 found" in refusal(paths[0])


def test_part_under_another_name_cannot_find_the_others(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    renamed = paths[1].rename(tmp_path / "renamed.gguf")
    assert "part 2 of 3" in refusal(renamed)
    miscounted = paths[0].rename(tmp_path / "tiny-00001-of-00002.gguf")
    assert "NAME-00001-of-00003.gguf" in refusal(miscounted)


def test_tensor_counts_and_duplicates_across_parts_are_refused(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    write_part(first, 0, 2, 3, "a")
    write_part(second, 1, 2, 3, "b")
    assert "3 tensors expected, all parts together have 2" in refusal(first)
    write_part(first, 0, 2, 2, "a")
    write_part(second, 1, 2, 2, "a")
    assert "tensor 'a': an earlier part has it too" in refusal(second)


def test_split_number_of_another_type_is_refused_because_llama_cpp_aborts_on_it(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    write_part(first, 0, 2, 2, "a")
    write_part(second, 1, 2, 2, "b", kind=ValueType.UINT32)
    assert "key 'split.no': a UINT32 value, UINT16 expected" in refusal(first)


def test_cut_off_part_is_named_and_allowed_on_request(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    whole = read_header(paths[0])
    paths[1].write_bytes(paths[1].read_bytes()[:-40])
    message = refusal(paths[0])
    assert message.startswith(str(paths[1]))
    assert "tensor 'blk.3.ffn_up.weight': the file is cut short" in message
    cut = read_header(paths[0], allow_truncated=True)
    assert cut.truncated
    assert cut.tensors == whole.tensors


def test_merged_file_with_a_split_count_of_zero_or_one_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "merged.gguf"
    for count in (0, 1):
        write_part(path, 0, count, 1, "a")
        assert len(read_header(path).files) == 1
