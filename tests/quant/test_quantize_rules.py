from __future__ import annotations

from pathlib import Path

import pytest

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header
from homeinfer.quant.quantize import quantize
from homeinfer.quant.recipes import Recipe, recipe_for
from homeinfer.quant.tensor_rules import parse_tensor_rule, with_tensor_rules
from tests.quant.f16_model import write_f16_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16_model(tmp_path_factory.mktemp("source") / "model-f16.gguf")


@pytest.fixture(scope="module")
def header(source: Path) -> Header:
    return read_header(source)


def ruled(header: Header, recipe: str, *rules: str) -> Recipe:
    return with_tensor_rules(recipe_for(recipe, header), header, [parse_tensor_rule(rule) for rule in rules])


def written(source: Path, target: Path, recipe: str, *rules: str) -> dict[str, str]:
    quantize(source, target, recipe, tensor_rules=[parse_tensor_rule(rule) for rule in rules])
    return {tensor.name: tensor.type for tensor in read_header(target).tensors}


def test_first_rule_that_matches_a_tensor_decides(header: Header) -> None:
    recipe = ruled(header, "Q4_K_M", r"blk\.0\.ffn_down=q8_0", "ffn_down|attn_v=Q6_K", "output=Q5_K")
    found = dict(recipe.overrides)
    assert found["blk.0.ffn_down.weight"] == "Q8_0"
    assert found["blk.1.ffn_down.weight"] == found["blk.0.attn_v.weight"] == "Q6_K"
    assert found["output.weight"] == found["blk.3.attn_output.weight"] == "Q5_K"
    assert recipe.ftype == 15


@pytest.mark.parametrize(
    ("recipe", "rest"), [("Q4_K_M", "Q4_K"), ("DQ3_K_M", "Q4_K"), ("F16", "F16"), ("BF16", "BF16"), ("COPY", "F16")]
)
def test_rules_hold_on_top_of_every_kind_of_recipe(source: Path, tmp_path: Path, recipe: str, rest: str) -> None:
    found = written(source, tmp_path / "small.gguf", recipe, "ffn_down=Q5_0", "attn_v=IQ4_XS")
    assert {kind for name, kind in found.items() if "ffn_down" in name} == {"Q5_0"}
    assert {kind for name, kind in found.items() if "attn_v" in name} == {"IQ4_XS"}
    assert found["blk.1.attn_q.weight"] == rest
    header = read_header(tmp_path / "small.gguf")
    assert header.get("homeinfer.tensor_rules") == "ffn_down=Q5_0 attn_v=IQ4_XS"
    assert header.get("general.file_type") == {"Q4_K_M": 15, "DQ3_K_M": 12, "BF16": 32}.get(recipe, 1)


def test_other_tensors_are_as_without_rules(source: Path, tmp_path: Path) -> None:
    without = written(source, tmp_path / "without.gguf", "Q3_K_M")
    ruled_types = written(source, tmp_path / "with.gguf", "Q3_K_M", "ffn_up=Q8_0")
    assert {name for name in without if without[name] != ruled_types[name]} == {
        f"blk.{layer}.ffn_up.weight" for layer in range(4)
    }


def test_names_with_special_characters_are_taken_literally(header: Header) -> None:
    recipe = ruled(header, "Q4_K_M", r"^blk\.1\.attn_q\.weight$=Q8_0")
    assert recipe.overrides == (("blk.1.attn_q.weight", "Q8_0"),)


def test_rows_that_a_type_does_not_fit_get_the_best_that_does(tmp_path: Path) -> None:
    source = write_f16_model(tmp_path / "narrow.gguf", layers=2, embd=320)
    recipe = ruled(read_header(source), "Q4_0", "attn_q=Q3_K", "ffn_up=Q6_K", "ffn_down=Q6_K", "attn_k=NVFP4")
    found = dict(recipe.overrides)
    assert [found[f"blk.0.{role}.weight"] for role in ("attn_q", "ffn_up", "ffn_down", "attn_k")] == [
        "IQ4_NL", "Q8_0", "Q6_K", "NVFP4",
    ]  # fmt: skip
    assert recipe.notes[-1].startswith("4 tensors have rows that do not divide")


def test_tensors_that_llama_cpp_never_quantizes_are_said(source: Path, header: Header, tmp_path: Path) -> None:
    recipe = ruled(header, "Q4_K_M", "blk.0=Q8_0")
    assert recipe.notes == (
        "--tensor 'blk.0=Q8_0': 2 tensors stay F32, since llama.cpp never quantizes norms, biases and the like: "
        "blk.0.attn_norm.weight, blk.0.ffn_norm.weight",
    )
    assert written(source, tmp_path / "small.gguf", "Q4_K_M", "blk.0=Q8_0")["blk.0.attn_norm.weight"] == "F32"


def test_rule_behind_one_that_takes_all_its_tensors_is_said(header: Header) -> None:
    recipe = ruled(header, "Q4_K_M", "ffn_down=Q6_K", r"blk\.1\.ffn_down=Q8_0")
    assert "earlier rules decide all 1 tensors" in recipe.notes[0]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("ffn_dwn=Q4_K", "no tensor of this model matches; the nearest names are blk.0.ffn_down.weight"),
        ("ffn_down", "a rule is REGEX=TYPE"),
        ("=Q4_K", "a rule is REGEX=TYPE"),
        ("ffn_down=", "a rule is REGEX=TYPE"),
        ("ffn_(=Q4_K", "the regular expression is wrong: missing )"),
        ("ffn_down=Q4K", "there is no tensor type 'Q4K' to quantize to: did you mean Q4_K"),
        ("ffn_down=Q8_1", "there is no tensor type 'Q8_1' to quantize to"),
        ("\x1b[2J\n=Q4_K", "the regular expression is wrong"),
    ],
)
def test_rules_that_cannot_be_are_refused_in_one_line(header: Header, rule: str, words: str) -> None:
    with pytest.raises(HomeinferError) as refused:
        ruled(header, "Q4_K_M", rule)
    assert words in str(refused.value)
    assert str(refused.value).startswith("--tensor '")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("rule", ["ffn_up=IQ2_XS", "token_embd=IQ1_S", "output=IQ2_XXS"])
def test_type_that_needs_an_imatrix_is_refused_without(source: Path, tmp_path: Path, rule: str) -> None:
    with pytest.raises(HomeinferError, match=r"needs an importance matrix.*homeinfer imatrix MODEL -o FILE"):
        written(source, tmp_path / "small.gguf", "Q4_K_M", rule)
    assert list(tmp_path.iterdir()) == []
