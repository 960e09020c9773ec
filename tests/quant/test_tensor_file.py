from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homeinfer.model.header import Header, MetaValue, TensorInfo, ValueType, read_header
from homeinfer.quant.inputs import FromImatrix
from homeinfer.quant.recipes import PlannedTensor, plan
from homeinfer.quant.rounded_file import write_rounded
from homeinfer.quant.tensor_file import TensorFile, header_size
from tests.quant.f16_model import write_f16_model
from tests.quant.test_quantize import cosine, first_logits

RANGES = {
    ValueType.UINT8: (0, 2**8 - 1), ValueType.INT8: (-(2**7), 2**7 - 1), ValueType.UINT16: (0, 2**16 - 1),
    ValueType.INT16: (-(2**15), 2**15 - 1), ValueType.UINT32: (0, 2**32 - 1), ValueType.INT32: (-(2**31), 2**31 - 1),
    ValueType.UINT64: (0, 2**64 - 1), ValueType.INT64: (-(2**63), 2**63 - 1),
}  # fmt: skip
TEXTS = st.binary(max_size=12).map(lambda data: data.decode("utf-8", "surrogateescape"))


def plain(kind: ValueType) -> st.SearchStrategy[Any]:
    if kind is ValueType.STRING:
        return TEXTS
    if kind is ValueType.BOOL:
        return st.booleans()
    if kind in (ValueType.FLOAT32, ValueType.FLOAT64):
        return st.floats(width=32 if kind is ValueType.FLOAT32 else 64, allow_nan=False)
    return st.integers(*RANGES[kind])


KINDS = st.sampled_from([kind for kind in ValueType if kind is not ValueType.ARRAY])
SCALARS = KINDS.flatmap(lambda kind: plain(kind).map(lambda value: MetaValue(kind, value)))
ARRAYS = KINDS.flatmap(
    lambda kind: st.lists(plain(kind), max_size=4).map(lambda value: MetaValue(ValueType.ARRAY, value, kind))
)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
ARCHITECTURE = {"general.architecture": MetaValue(ValueType.STRING, "llama")}


def one_tensor(name: str, metadata: dict[str, MetaValue]) -> tuple[Header, tuple[PlannedTensor, ...]]:
    header = Header(3, (), ARCHITECTURE | metadata, (TensorInfo(name, (32, 3), "F32", 0, 384, 0),))
    return header, plan(header, ())


@settings(max_examples=60, deadline=None)
@given(metadata=st.dictionaries(NAMES.map(lambda name: f"x.{name}"), SCALARS | ARRAYS, max_size=5))
def test_metadata_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, MetaValue]
) -> None:
    path = tmp_path_factory.getbasetemp() / "metadata.gguf"
    header, tensors = one_tensor("a.weight", metadata)
    data = np.arange(96, dtype=np.float32).tobytes()
    size = header_size(path, header, tensors, {"homeinfer.n": MetaValue(ValueType.UINT64, 0)})
    assert not path.exists()
    with TensorFile(path, header, tensors, {"homeinfer.n": MetaValue(ValueType.UINT64, 2**60)}) as file:
        file.add((data[:100], memoryview(data)[100:]), 384, lambda _: None)
        file.finish()
    assert path.stat().st_size == size + 384
    found = read_header(path)
    added = {"general.quantization_version", "homeinfer.n"}
    assert {key: value for key, value in found.metadata.items() if key not in added} == ARCHITECTURE | metadata
    assert found.get("homeinfer.n") == 2**60
    assert found.files[0].data_offset == size
    assert path.read_bytes()[found.tensors[0].offset :] == data


def test_texts_that_are_no_utf_8_keep_their_bytes(tmp_path: Path) -> None:
    odd = b"caf\xe9 \xff".decode("utf-8", "surrogateescape")
    texts = MetaValue(ValueType.ARRAY, ["a", odd], ValueType.STRING)
    header, tensors = one_tensor("é.weight", {"x.name": MetaValue(ValueType.STRING, odd), "x.texts": texts})
    with TensorFile(tmp_path / "odd.gguf", header, tensors, {}) as file:
        file.add((bytes(384),), 384, lambda _: None)
    found = read_header(tmp_path / "odd.gguf")
    assert (found.get("x.name"), found.get("x.texts"), found.tensors[0].name) == (odd, ["a", odd], "é.weight")
    assert (tmp_path / "odd.gguf").read_bytes().count(b"caf\xe9 \xff") == 2


def test_what_is_no_longer_true_of_the_file_is_left_out(tmp_path: Path) -> None:
    stale = {key: MetaValue(ValueType.UINT16, 3) for key in ("split.no", "split.count")}
    stale |= {
        "split.tensors.count": MetaValue(ValueType.INT32, 1),
        "general.alignment": MetaValue(ValueType.UINT32, 64),
    }
    stale |= {"homeinfer.tensor_rules": MetaValue(ValueType.STRING, "a=Q8_0")}
    header, tensors = one_tensor("a.weight", stale)
    with TensorFile(tmp_path / "a.gguf", header, tensors, {}) as file:
        file.add((bytes(384),), 384, lambda _: None)
    assert set(read_header(tmp_path / "a.gguf").metadata) == {"general.architecture", "general.quantization_version"}


def test_a_tensor_of_another_length_than_planned_is_a_bug(tmp_path: Path) -> None:
    header, tensors = one_tensor("a.weight", {})
    with pytest.raises(AssertionError), TensorFile(tmp_path / "a.gguf", header, tensors, {}) as file:
        file.add((bytes(383),), 384, lambda _: None)


@pytest.mark.parametrize("alignment", [None, 64, 4096])
def test_file_is_what_gguf_py_reads_and_what_llama_cpp_runs(tmp_path: Path, alignment: int | None) -> None:
    source = write_f16_model(tmp_path / "f16.gguf", layers=1, alignment=alignment)
    header = read_header(source)
    types = {"blk.0.ffn_up.weight": "Q8_0", "blk.0.attn_q.weight": "Q5_K", "token_embd.weight": "Q6_K"}
    target, added = tmp_path / "small.gguf", {"homeinfer.recipe": MetaValue(ValueType.STRING, "dynamic")}
    seen: list[float] = []
    before = header_size(target, header, plan(header, ()), added)
    nbytes = write_rounded(target, header, types, FromImatrix({}), added, 1, seen.append)
    assert target.stat().st_size == before + nbytes
    assert (seen[-1], seen) == (1.0, sorted(seen))
    reader = gguf.GGUFReader(target)
    recipe = reader.get_field("homeinfer.recipe")
    assert recipe is not None
    assert recipe.contents() == "dynamic"
    assert reader.data_offset == before
    found = read_header(target)
    for ours, theirs in zip(found.tensors, reader.tensors, strict=True):
        assert (ours.name, ours.shape) == (theirs.name, tuple(theirs.shape.tolist()))
        assert ours.type == types.get(ours.name, header.by_name[ours.name].type) == theirs.tensor_type.name
        assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
    assert cosine(first_logits(source), first_logits(target)) > 0.99
