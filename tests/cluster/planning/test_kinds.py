"""Which layers take the same time, from headers alone."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from homeinfer.cluster.planning.kinds import kind_label, layer_kinds, output_kind, output_tensors
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header
from tests.support.headers import header_of


def _llama(layers: int, wide: dict[int, int] | None = None, **keys: int | list[int]) -> Header:
    widths = wide or {}
    tensors = {
        f"blk.{i}.{name}.weight": (64, widths.get(i, 128)) for i in range(layers) for name in ("ffn_up", "attn_q")
    }
    return header_of("llama", layers=layers, tensors={"token_embd.weight": (64, 100), **tensors}, **keys)


def test_like_layers_have_one_kind_wherever_they_stand() -> None:
    kinds = layer_kinds(_llama(6, {2: 96, 4: 96}))
    assert kinds[0] == kinds[1] == kinds[3] == kinds[5]
    assert kinds[2] == kinds[4] != kinds[0]


def test_a_type_of_a_tensor_makes_another_kind() -> None:
    header = _llama(3)
    tensors = tuple(
        msgspec.structs.replace(t, type="Q8_0") if t.name == "blk.1.ffn_up.weight" else t for t in header.tensors
    )
    kinds = layer_kinds(msgspec.structs.replace(header, tensors=tensors))
    assert kinds[0] == kinds[2] != kinds[1]


def test_heads_by_layer_make_kinds() -> None:
    kinds = layer_kinds(_llama(4, attention__head_count_kv=[4, 2, 4, 2]))
    assert kinds[0] == kinds[2] != kinds[1] == kinds[3]


def test_names_offsets_and_files_do_not_count() -> None:
    header = _llama(3)
    moved = tuple(msgspec.structs.replace(t, offset=t.offset + 4096) for t in header.tensors)
    renamed = msgspec.structs.replace(header.files[0], path="elsewhere.gguf")
    assert layer_kinds(msgspec.structs.replace(header, tensors=moved, files=(renamed,))) == layer_kinds(header)


def test_sliding_layers_are_another_kind(gemma_path: Path) -> None:
    kinds = layer_kinds(read_header(gemma_path))
    assert len(kinds) == 18
    full = [i for i in range(18) if i % 6 == 5]
    assert not {kinds[i] for i in full} & {kinds[i] for i in range(18) if i not in full}


def test_a_tied_embedding_is_the_output_matrix(gemma_path: Path) -> None:
    header = read_header(gemma_path)
    assert {t.name for t in output_tensors(header)} == {"output_norm.weight", "output.weight"}
    embedding = header.tensor("token_embd.weight")
    assert embedding is not None
    assert sum(t.nbytes for t in output_tensors(header)) > embedding.nbytes
    assert output_kind(header) not in layer_kinds(header)


def test_a_header_cut_short_is_enough(smollm2_path: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2_path.read_bytes()[:4_000_000])
    header = read_header(cut, allow_truncated=True)
    whole = read_header(smollm2_path)
    assert layer_kinds(header) == layer_kinds(whole)
    assert output_kind(header) == output_kind(whole)


def test_labels_name_layers_and_types() -> None:
    header = _llama(6, {2: 96, 4: 96, 5: 96})
    kinds = layer_kinds(header)
    assert kind_label(header, kinds[0]).startswith("layers 0 to 1 and 3 (F32")
    assert kind_label(header, kinds[2]).startswith("layers 2 and 4 to 5 (F32")
    assert kind_label(header, output_kind(header)).startswith("the output matrix (F32")
    with pytest.raises(HomeinferError, match="no kind of layer"):
        kind_label(header, "0" * 12)
