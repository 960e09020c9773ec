from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import gguf
import llama_cpp
import msgspec
import numpy as np
import pytest

from homeinfer.errors import HomeinferError
from homeinfer.model.header import (
    Header,
    HeaderFile,
    MetaValue,
    TensorInfo,
    ValueType,
    read_header,
    read_header_bytes,
)
from homeinfer.quant.recipes import RECIPES, Recipe, dq3_k_m, fitting_type, plan, recipe_for, recipe_info
from tests.model.deepseek import deepseek_header

GIB = 2**30

DRY_RUN_OF_EVERY_RECIPE = """
import json, sys
from homeinfer.quant.recipes import RECIPES
from homeinfer.quant.worker import QuantizeLog, Request, run_quantizer
found = {}
for info in RECIPES.values():
    log = QuantizeLog()
    request = Request(sys.argv[1].encode(), b"", info.ftype, info.name == "COPY", False, 1, (), {})
    assert run_quantizer(request, log, dry_run=True), log.reason()
    found[info.name] = (log.needs_imatrix, log.types)
print(json.dumps(found))
"""


def header_of(architecture: str, shapes: Mapping[str, tuple[int, ...]], **keys: int) -> Header:
    """A header of F16 matrices and F32 vectors without a file."""
    metadata = {"general.architecture": MetaValue(ValueType.STRING, architecture)}
    for key, value in keys.items():
        metadata[f"{architecture}.{key}"] = MetaValue(ValueType.UINT32, value)
    tensors = tuple(
        TensorInfo(name, shape, "F32" if len(shape) == 1 else "F16", 0, 0, 0) for name, shape in shapes.items()
    )
    return Header(3, (HeaderFile("", 0, 0, 32, 0),), metadata, tensors)


def dense_layers(count: int, width: int = 512) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(count):
        block = f"blk.{layer}."
        shapes[block + "attn_norm.weight"] = (width,)
        for role in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"{block}{role}.weight"] = (width, width)
            shapes[f"{block}{role}.bias"] = (width,)
        shapes[block + "ffn_gate.weight"] = shapes[block + "ffn_up.weight"] = (width, 4 * width)
        shapes[block + "ffn_down.weight"] = (4 * width, width)
    return shapes


def types_of(recipe: Recipe, role: str) -> list[str]:
    """Of a role's tensors in layer order; of one that is no layer's by its whole name."""
    chosen = dict(recipe.overrides)
    if f"{role}.weight" in chosen:
        return [chosen[f"{role}.weight"]]
    return [kind for name, kind in recipe.overrides if name.endswith(f".{role}.weight")]


@pytest.fixture(scope="module")
def deepseek() -> Header:
    return read_header_bytes(deepseek_header(), allow_truncated=True)


@pytest.fixture(scope="module")
def llama_3_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its header, and a hole of the weights' size: 16 GB of nothing."""
    path = tmp_path_factory.mktemp("llama3") / "llama-3-8b.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(32)
    writer.add_context_length(8192)
    writer.add_embedding_length(4096)
    writer.add_feed_forward_length(14336)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {"token_embd": (128256, 4096), "output": (128256, 4096), "output_norm": (4096,)}
    for layer in range(32):
        for role in ("attn_norm", "ffn_norm"):
            shapes[f"blk.{layer}.{role}"] = (4096,)
        for role, rows in (("attn_q", 4096), ("attn_k", 1024), ("attn_v", 1024), ("attn_output", 4096)):
            shapes[f"blk.{layer}.{role}"] = (rows, 4096)
        shapes[f"blk.{layer}.ffn_gate"] = shapes[f"blk.{layer}.ffn_up"] = (14336, 4096)
        shapes[f"blk.{layer}.ffn_down"] = (4096, 14336)
    for name, shape in shapes.items():
        dtype = np.dtype(np.float32 if len(shape) == 1 else np.float16)
        writer.add_tensor_info(f"{name}.weight", shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    file = read_header(path, allow_truncated=True).files[0]
    with path.open("rb+") as opened:
        opened.truncate(file.data_offset + file.data_bytes)
    return path


def test_dq3_k_m_of_deepseek_r1_has_the_published_size(deepseek: Header) -> None:
    recipe = dq3_k_m(deepseek)
    nbytes = sum(tensor.bytes for tensor in plan(deepseek, recipe.overrides))
    assert 280.0 <= nbytes / GIB <= 281.5
    assert 3.58 <= 8 * nbytes / deepseek.n_weights <= 3.60
    assert recipe.notes == ()


def test_dq3_k_m_of_deepseek_r1_has_the_published_types(deepseek: Header) -> None:
    recipe = dq3_k_m(deepseek)
    down = types_of(recipe, "ffn_down_exps")
    assert Counter(down) == {"Q6_K": 2, "Q4_K": 12, "Q3_K": 44}
    assert down[:9] == ["Q6_K", "Q6_K", "Q4_K", "Q3_K", "Q3_K", "Q3_K", "Q3_K", "Q4_K", "Q3_K"]
    published = {
        "Q3_K": ("ffn_gate_exps", "ffn_up_exps"),
        "Q4_K": (
            "token_embd", "attn_q_a", "attn_q_b", "attn_output",
            "ffn_gate", "ffn_up", "ffn_gate_shexp", "ffn_up_shexp",
        ),
        "Q6_K": ("output", "attn_kv_a_mqa", "attn_kv_b", "ffn_down", "ffn_down_shexp"),
    }  # fmt: skip
    for kind, roles in published.items():
        for role in roles:
            assert set(types_of(recipe, role)) == {kind}, role


def test_split_mla_projections_get_what_attn_kv_b_gets() -> None:
    shapes = {
        "blk.0.attn_kv_a_mqa.weight": (7168, 576),
        "blk.0.attn_k_b.weight": (256, 512, 128),
        "blk.0.attn_v_b.weight": (512, 128, 128),
        "blk.0.ffn_down_exps.weight": (2048, 7168, 8),
    }
    recipe = dq3_k_m(header_of("deepseek2", shapes, block_count=1))
    assert types_of(recipe, "attn_k_b") == types_of(recipe, "attn_v_b") == ["Q6_K"]


def test_norms_biases_and_routers_stay_as_they_are(deepseek: Header) -> None:
    named = {name for name, _ in dq3_k_m(deepseek).overrides}
    assert named == {tensor.name for tensor in deepseek.tensors if tensor.type == "F16"}
    named = {name for name, _ in dq3_k_m(header_of("qwen2", dense_layers(2), block_count=2)).overrides}
    assert not any("norm" in name or "bias" in name for name in named)


def test_layers_that_predict_further_tokens_do_not_shift_the_pattern() -> None:
    shapes = {f"blk.{layer}.ffn_down_exps.weight": (2048, 1024, 8) for layer in range(8)}
    recipe = dq3_k_m(header_of("deepseek2", shapes, block_count=8, nextn_predict_layers=1))
    down = types_of(recipe, "ffn_down_exps")
    assert down == ["Q6_K", "Q6_K", "Q4_K", "Q3_K", "Q3_K", "Q3_K", "Q3_K", "Q3_K"]


def test_dense_model_gets_the_pattern_on_its_own_down_projections() -> None:
    shapes = {"token_embd.weight": (512, 1000), "output.weight": (512, 1000), **dense_layers(12)}
    recipe = dq3_k_m(header_of("llama", shapes, block_count=12))
    three = ["Q3_K"] * 4
    assert types_of(recipe, "ffn_down") == ["Q6_K", "Q6_K", "Q4_K", *three, "Q4_K", *three]
    for role, kind in (
        ("ffn_gate", "Q3_K"), ("ffn_up", "Q3_K"), ("attn_q", "Q4_K"), ("attn_k", "Q4_K"),
        ("attn_output", "Q4_K"), ("attn_v", "Q6_K"), ("token_embd", "Q4_K"), ("output", "Q6_K"),
    ):  # fmt: skip
        assert set(types_of(recipe, role)) == {kind}, role
    assert ["dense llama model" in note for note in recipe.notes] == [True]


def test_embedding_that_is_also_the_output_gets_the_outputs_type() -> None:
    recipe = dq3_k_m(header_of("llama", {"token_embd.weight": (512, 1000), **dense_layers(2)}, block_count=2))
    assert types_of(recipe, "token_embd") == ["Q6_K"]


def test_other_mixture_keeps_its_dense_parts_high() -> None:
    shapes = dense_layers(1) | {
        f"blk.{layer}.ffn_{role}_exps.weight": (512, 512, 8)
        for layer in (1, 2, 3, 4)
        for role in ("gate", "up", "down")
    }
    shapes["blk.1.ffn_gate_inp.weight"] = (512, 8)
    recipe = dq3_k_m(header_of("qwen3moe", shapes, block_count=5))
    assert types_of(recipe, "ffn_down_exps") == ["Q6_K", "Q6_K", "Q4_K", "Q3_K"]
    assert types_of(recipe, "ffn_gate_exps") == ["Q3_K"] * 4
    assert types_of(recipe, "ffn_down") == ["Q6_K"]
    assert types_of(recipe, "ffn_gate") == types_of(recipe, "ffn_up") == ["Q4_K"]
    assert types_of(recipe, "ffn_gate_inp") == []


def test_module_that_no_rule_names_gets_more_bits_when_it_is_small() -> None:
    shapes = dense_layers(4) | {
        "blk.0.ssm_x.weight": (512, 80),
        "blk.0.ssm_in.weight": (512, 8192),
    }
    recipe = dq3_k_m(header_of("jamba", shapes, block_count=4))
    assert (types_of(recipe, "ssm_x"), types_of(recipe, "ssm_in")) == (["Q6_K"], ["Q4_K"])


def test_row_that_no_k_quant_fits_gets_a_narrow_type_and_a_note() -> None:
    recipe = dq3_k_m(header_of("llama", dense_layers(3, width=576), block_count=3))
    assert types_of(recipe, "ffn_gate") == ["IQ4_NL"] * 3
    assert types_of(recipe, "attn_q") == ["IQ4_NL"] * 3
    assert types_of(recipe, "attn_v") == ["Q8_0"] * 3
    assert types_of(recipe, "ffn_down") == ["Q6_K", "Q6_K", "Q4_K"]
    assert recipe.notes[-1] == (
        "18 tensors have rows that do not divide into the recipe's blocks: "
        "6 IQ4_NL for Q3_K, 9 IQ4_NL for Q4_K, 3 Q8_0 for Q6_K"
    )


@pytest.mark.parametrize(
    ("wanted", "width", "got"),
    [
        ("Q3_K", 512, "Q3_K"),
        ("Q3_K", 32, "IQ4_NL"),
        ("Q4_K", 576, "IQ4_NL"),
        ("Q5_K", 576, "Q5_1"),
        ("Q6_K", 96, "Q8_0"),
        ("Q6_K", 100, "F16"),
        ("Q8_0", 48, "F16"),
        ("F16", 7, "F16"),
    ],
)
def test_type_fits_the_row(wanted: str, width: int, got: str) -> None:
    assert fitting_type(wanted, width) == got


@pytest.mark.parametrize("name", ["Q4_K_M", "q4_k_m", "Q4_K", "q4-k-m", " q4_K "])
def test_recipe_is_found_in_any_case_and_by_its_alias(name: str) -> None:
    header = header_of("llama", dense_layers(1), block_count=1)
    assert recipe_for(name, header) == Recipe("Q4_K_M", 15)


@pytest.mark.parametrize(("name", "close"), [("Q4KM", "Q4_K_M"), ("DQ3", "DQ3_K_M"), ("IQ4", "IQ4_XS")])
def test_unknown_recipe_is_answered_with_the_closest(name: str, close: str) -> None:
    with pytest.raises(HomeinferError, match=f"no recipe '{name}'.*{close}.*--list-recipes"):
        recipe_info(name)


def test_recipe_like_no_other_is_refused_in_one_line() -> None:
    with pytest.raises(HomeinferError) as refused:
        recipe_info("x\n\x1b[2J" * 50)
    assert "\n" not in str(refused.value)
    assert "\x1b" not in str(refused.value)


def test_presets_have_the_numbers_that_llama_cpp_gives_them() -> None:
    for info in RECIPES.values():
        base = {"DQ3_K_M": "MOSTLY_Q3_K_M", "F32": "ALL_F32", "COPY": "ALL_F32"}.get(info.name, f"MOSTLY_{info.name}")
        known = getattr(llama_cpp, f"LLAMA_FTYPE_{base}", None)
        assert known in (info.ftype, None), info.name


def test_llama_cpp_agrees_with_what_the_list_of_recipes_says(llama_3_8b: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", DRY_RUN_OF_EVERY_RECIPE, llama_3_8b], capture_output=True, text=True, check=True
    )
    found = msgspec.json.decode(ran.stdout, type=dict[str, tuple[bool, list[tuple[str, str]]]])
    header = read_header(llama_3_8b)
    for info in RECIPES.values():
        needs_imatrix, types = found[info.name]
        if info.name == "DQ3_K_M":
            types = list(dq3_k_m(header).overrides)
        bpw = 8 * sum(tensor.bytes for tensor in plan(header, types)) / header.n_weights
        assert needs_imatrix == info.needs_imatrix, info.name
        # without the imatrix that it wants, the dry run gives IQ3_XXS a few bits more
        assert bpw == pytest.approx(info.bpw, abs=0.13 if info.needs_imatrix else 0.006), info.name
