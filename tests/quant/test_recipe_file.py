from __future__ import annotations

from pathlib import Path

import pytest

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header
from homeinfer.quant.quantize import quantize
from homeinfer.quant.recipe_file import named_recipe, recipe_from_toml
from homeinfer.quant.recipes import is_complete
from tests.quant.f16_model import write_f16_model

LAYERS = 8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16_model(tmp_path_factory.mktemp("source") / "model-f16.gguf", layers=LAYERS)


@pytest.fixture(scope="module")
def header(source: Path) -> Header:
    return read_header(source)


def types(text: str, header: Header) -> dict[str, str]:
    return dict(recipe_from_toml(text, "mix.toml", header).overrides)


def layers_of(found: dict[str, str], role: str, kind: str) -> list[int]:
    return [layer for layer in range(LAYERS) if found[f"blk.{layer}.{role}.weight"] == kind]


def refusal(text: str, header: Header) -> str:
    with pytest.raises(HomeinferError) as refused:
        recipe_from_toml(text, "mix.toml", header)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_default_is_the_type_of_what_no_rule_matches(header: Header) -> None:
    found = types('name = "mix"\ndefault = "q4_k"\n[[rule]]\nrole = "ffn_down"\ntype = "Q6_K"', header)
    assert {kind for name, kind in found.items() if "ffn_down" in name} == {"Q6_K"}
    assert {kind for name, kind in found.items() if "ffn_down" not in name} == {"Q4_K"}
    assert not any("norm" in name for name in found)


@pytest.mark.parametrize(
    ("condition", "layers"),
    [
        ('layers = "0-1, 4-6/2, -1"', [0, 1, 4, 6, 7]),
        ("layers = 3", [3]),
        ('layers = "-3--2"', [5, 6]),
        ("depth = [0.0, 0.25]", [0, 1]),
        ("depth = [0.5, 1]", [4, 5, 6, 7]),
        (r'tensor = "blk\\.[23]\\."', [2, 3]),
        ('role = ["ffn_down", "ffn_up"]\nlayers = "0-3"\ndepth = [0.25, 1.0]', [2, 3]),
    ],
)
def test_conditions_choose_layers(header: Header, condition: str, layers: list[int]) -> None:
    found = types(f'name = "mix"\ndefault = "Q4_K"\n[[rule]]\ntype = "Q6_K"\n{condition}', header)
    assert layers_of(found, "ffn_down", "Q6_K") == layers
    assert found["token_embd.weight"] == "Q4_K"


def test_first_rule_that_matches_decides(header: Header) -> None:
    found = types(
        'name = "mix"\ndefault = "Q4_K"\n[[rule]]\ntype = "Q8_0"\nlayers = 0\n[[rule]]\ntype = "Q6_K"\nrole = "attn_v"',
        header,
    )
    assert layers_of(found, "attn_v", "Q8_0") == [0]
    assert layers_of(found, "attn_v", "Q6_K") == [1, 2, 3, 4, 5, 6, 7]
    assert layers_of(found, "attn_q", "Q8_0") == [0]


def test_rules_stand_on_a_recipe_of_llama_cpp_or_homeinfer(header: Header) -> None:
    rule = '[[rule]]\ntype = "Q8_0"\nrole = "attn_v"'
    preset = recipe_from_toml(f'name = "mix"\nbase = "q4_k_m"\n{rule}', "mix.toml", header)
    assert (preset.ftype, len(preset.overrides)) == (15, LAYERS)
    assert not is_complete(preset, header)
    dynamic = recipe_from_toml(f'name = "mix"\nbase = "DQ3_K_M"\n{rule}', "mix.toml", header)
    assert is_complete(dynamic, header)
    assert dict(dynamic.overrides)["blk.0.attn_v.weight"] == "Q8_0"
    assert dict(dynamic.overrides)["blk.0.ffn_down.weight"] == "Q6_K"


def test_file_is_quantized_as_its_recipe_file_says(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "my.toml"
    recipe.write_text('name = "my mix"\ndefault = "F16"\n[[rule]]\ntype = "Q5_K"\nrole = "ffn_up"')
    result = quantize(source, tmp_path / "small.gguf", str(recipe))
    written = read_header(tmp_path / "small.gguf")
    assert result.recipe == written.get("homeinfer.recipe") == "my mix"
    assert written.get("general.file_type") == 1
    assert {tensor.type for tensor in written.tensors if "ffn_up" in tensor.name} == {"Q5_K"}
    assert written.by_name["output.weight"].type == "F16"


def test_rows_that_a_type_does_not_fit_get_the_best_that_does(tmp_path: Path) -> None:
    header = read_header(write_f16_model(tmp_path / "narrow.gguf", layers=2, embd=320))
    recipe = recipe_from_toml('name = "x"\ndefault = "Q3_K"\n[[rule]]\ntype = "Q6_K"\nrole = "attn_v"', "x", header)
    found = dict(recipe.overrides)
    assert (found["blk.0.attn_v.weight"], found["blk.0.ffn_up.weight"]) == ("Q8_0", "IQ4_NL")
    assert found["blk.0.ffn_down.weight"] == "Q3_K"
    assert "2 Q8_0 for Q6_K" in recipe.notes[-1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = ", "mix.toml: this is no TOML"),
        ('default = "Q4_K"', "'name' must be a text of 1 to 64"),
        ('name = 3\ndefault = "Q4_K"', "'name' must be a text in quotes"),
        ('name = "x"', "give one of 'base' (a recipe) and 'default'"),
        ('name = "x"\nbase = "Q4_K_M"\ndefault = "Q4_K"', "give one of 'base'"),
        ('name = "x"\nbase = "Q4KM"', "'base': there is no recipe 'Q4KM': did you mean Q4_K_M"),
        ('name = "x"\ndefault = "Q4K"', "'default': there is no tensor type 'Q4K' to quantize to: did you mean Q4_K"),
        ('name = "x"\ndefault = "Q4_K"\nrules = []', "there is no key 'rules'; the keys are name, description"),
        ('name = "x"\ndefault = "Q4_K"\nrule = 1', "'rule' must be a list of tables"),
    ],
)
def test_file_that_is_no_recipe_is_refused(header: Header, text: str, words: str) -> None:
    assert words in refusal(text, header)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ('role = "ffn_down"', "rule 2: it has no 'type'"),
        ('type = "Q6_K"', "rule 2: it says nothing of its tensors; add one of role, layers, depth, tensor"),
        ('type = "Q6_K"\nroles = "x"', "rule 2: there is no key 'roles'; the keys are type, role"),
        ('type = "Q9_K"\nlayers = 1', "rule 2 (layers = 1): there is no tensor type 'Q9_K'"),
        ('type = "Q8_K"\nlayers = 1', "there is no tensor type 'Q8_K' to quantize to"),
        ('type = "Q6_K"\ntensor = "("', "rule 2 (tensor = (): the regular expression is wrong"),
        ('type = "Q6_K"\nrole = "ffn_dwn"', "no tensor of this model matches; the nearest names are ffn_down"),
        ('type = "Q6_K"\nrole = []', "'role' must be a role"),
        ('type = "Q6_K"\nlayers = "8"', "'layers': there is no '8' in layers 0 to 7"),
        ('type = "Q6_K"\nlayers = "-9"', "'layers': there is no '-9' in layers 0 to 7"),
        ('type = "Q6_K"\nlayers = "3-1"', "'layers': there is no '3-1'"),
        ('type = "Q6_K"\nlayers = "0-4/0"', "'layers': there is no '0-4/0'"),
        ('type = "Q6_K"\nlayers = "first"', "'layers' must be like"),
        ('type = "Q6_K"\nlayers = true', "'layers' must be like"),
        ('type = "Q6_K"\ndepth = [0.5, 0.2]', "'depth' must be two fractions"),
        ('type = "Q6_K"\ndepth = [0, true]', "'depth' must be two fractions"),
    ],
)
def test_rule_that_cannot_be_is_refused_by_its_number(header: Header, rule: str, words: str) -> None:
    first = '[[rule]]\ntype = "Q5_K"\nlayers = 0'
    assert words in refusal(f'name = "x"\ndefault = "Q4_K"\n{first}\n[[rule]]\n{rule}', header)


def test_files_that_cannot_be_read_are_refused(header: Header, tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for path, words in (
        (tmp_path / "none.toml", "no such recipe file"),
        (tmp_path / "binary.toml", "not UTF-8 text"),
        (tmp_path, "there is no recipe"),
    ):
        with pytest.raises(HomeinferError, match=words):
            named_recipe(str(path), header)
