"""Which type each tensor gets: llama.cpp's presets by name, and recipes that name every tensor.

Pure functions from a model's header. What a preset makes of a model is llama.cpp's to say (its dry
run does, see quantize.py); DQ3_K_M lists a type for every tensor that llama.cpp would quantize.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import msgspec

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, printable
from homeinfer.quant.dq3_k_m import dq3_k_m_types
from homeinfer.quant.tensor_types import fitting_type, keeps_type, misfit_note, tensor_bytes

__all__ = [
    "RECIPES",
    "PlannedTensor",
    "Recipe",
    "RecipeInfo",
    "dq3_k_m",
    "fitting_type",
    "is_complete",
    "keeps_type",
    "misfit_note",
    "plan",
    "recipe_for",
    "recipe_info",
    "tensor_bytes",
]


class Recipe(msgspec.Struct, frozen=True):
    """What to make of one model.

    ftype is llama.cpp's (enum llama_ftype), for `general.file_type` and for tensors without an
    override; overrides are (tensor, type); copy leaves every type as it is; file_type, when given, is what
    `general.file_type` says instead of ftype; metadata are further keys of the written file. llama.cpp
    heeds overrides only where ftype's default type is a quantized one.
    """

    name: str
    ftype: int
    overrides: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    copy: bool = False
    file_type: int | None = None
    metadata: tuple[tuple[str, str], ...] = ()


class RecipeInfo(msgspec.Struct, frozen=True):
    """A recipe to ask for by name; bpw is what it makes of Llama 3 8B."""

    name: str
    ftype: int
    bpw: float
    about: str
    needs_imatrix: bool = False


class PlannedTensor(msgspec.Struct, frozen=True):
    """What one tensor becomes: its type and what its data takes then, in bytes, without padding."""

    name: str
    type: str
    bytes: int


_TERNARY = "only for models trained with ternary weights"
_BINARY = "only for models trained with weights this coarse"
_RECIPES = (
    RecipeInfo("DQ3_K_M", 12, 4.02, "Q3_K_M with its bits where they matter; 3.59 bpw on DeepSeek R1"),
    RecipeInfo("Q8_0", 7, 8.50, "nearly lossless"),
    RecipeInfo("Q6_K", 18, 6.56, "very close to the original"),
    RecipeInfo("Q5_K_M", 17, 5.70, "close to the original"),
    RecipeInfo("Q5_K_S", 16, 5.57, "a little smaller than Q5_K_M"),
    RecipeInfo("Q5_1", 9, 6.04, "old; Q5_K_M is better"),
    RecipeInfo("Q5_0", 8, 5.57, "old; Q5_K_S is better"),
    RecipeInfo("Q4_K_M", 15, 4.89, "the usual choice"),
    RecipeInfo("Q4_K_S", 14, 4.67, "a little smaller than Q4_K_M"),
    RecipeInfo("Q4_1", 3, 5.10, "old; Q4_K_M is better"),
    RecipeInfo("Q4_0", 2, 4.64, "old; quick on some CPUs"),
    RecipeInfo("IQ4_NL", 25, 4.68, "for models whose rows no K-quant fits"),
    RecipeInfo("IQ4_XS", 30, 4.46, "the smallest with 4 bits"),
    RecipeInfo("Q3_K_L", 13, 4.30, "3 bits, more of them higher"),
    RecipeInfo("Q3_K_M", 12, 4.00, "3 bits"),
    RecipeInfo("IQ3_M", 27, 3.76, "3 bits, slower to compute on CPUs than Q3_K"),
    RecipeInfo("IQ3_S", 26, 3.66, "a little smaller than IQ3_M"),
    RecipeInfo("Q3_K_S", 11, 3.64, "3 bits, the least of Q3_K"),
    RecipeInfo("IQ3_XS", 22, 3.50, "3 bits", needs_imatrix=True),
    RecipeInfo("IQ3_XXS", 23, 3.25, "3 bits", needs_imatrix=True),
    RecipeInfo("Q2_K", 10, 3.16, "2 bits: a clear loss"),
    RecipeInfo("Q2_K_S", 21, 2.97, "2 bits", needs_imatrix=True),
    RecipeInfo("IQ2_M", 29, 2.93, "2 bits", needs_imatrix=True),
    RecipeInfo("IQ2_S", 28, 2.74, "2 bits", needs_imatrix=True),
    RecipeInfo("IQ2_XS", 20, 2.59, "2 bits", needs_imatrix=True),
    RecipeInfo("IQ2_XXS", 19, 2.38, "2 bits", needs_imatrix=True),
    RecipeInfo("IQ1_M", 31, 2.15, "1 bit", needs_imatrix=True),
    RecipeInfo("IQ1_S", 24, 2.00, "1 bit", needs_imatrix=True),
    RecipeInfo("TQ2_0", 37, 2.52, _TERNARY),
    RecipeInfo("TQ1_0", 36, 2.19, _TERNARY),
    RecipeInfo("Q2_0", 41, 2.68, _BINARY),
    RecipeInfo("Q1_0", 40, 1.48, _BINARY),
    RecipeInfo("MXFP4_MOE", 38, 8.50, "experts MXFP4, everything else Q8_0"),
    RecipeInfo("F16", 1, 16.00, "not quantized"),
    RecipeInfo("BF16", 32, 16.00, "not quantized"),
    RecipeInfo("F32", 0, 32.00, "not quantized"),
    RecipeInfo("COPY", 0, 16.00, "every type as it is; joins a split model"),
)
RECIPES: Mapping[str, RecipeInfo] = MappingProxyType({info.name: info for info in _RECIPES})
"""Every recipe by name, as `homeinfer quantize --list-recipes` shows them."""
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def recipe_info(name: str) -> RecipeInfo:
    """The recipe of that name, in any case; HomeinferError with the closest names when there is none."""
    wanted = name.strip().upper().replace("-", "_")
    wanted = _ALIASES.get(wanted, wanted)
    if wanted in RECIPES:
        return RECIPES[wanted]
    close = difflib.get_close_matches(wanted, RECIPES, n=3, cutoff=0.5)
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    raise HomeinferError(
        f"there is no recipe '{printable(name, 40)}': {guess}'homeinfer quantize --list-recipes' shows all"
    )


def recipe_for(name: str, header: Header) -> Recipe:
    """The recipe of that name for this model; HomeinferError when there is none."""
    info = recipe_info(name)
    if info.name == "DQ3_K_M":
        return dq3_k_m(header)
    return Recipe(info.name, info.ftype, copy=info.name == "COPY")


def plan(header: Header, types: Iterable[tuple[str, str]]) -> tuple[PlannedTensor, ...]:
    """Every tensor of the model with its new type; those that `types` does not name keep theirs."""
    chosen = dict(types)
    return tuple(
        PlannedTensor(tensor.name, type_name, tensor_bytes(tensor, type_name))
        for tensor in header.tensors
        for type_name in (chosen.get(tensor.name, tensor.type),)
    )


def dq3_k_m(header: Header) -> Recipe:
    """DQ3_K_M (arXiv 2505.02390) as published for DeepSeek-shaped models, and a reading for others."""
    types, notes = dq3_k_m_types(header)
    return Recipe("DQ3_K_M", RECIPES["DQ3_K_M"].ftype, types, notes)


def is_complete(recipe: Recipe, header: Header) -> bool:
    """Whether the recipe names a type for every tensor that llama.cpp would quantize, so that nothing
    is left for llama.cpp to choose."""
    if recipe.copy:
        return True
    named = {name for name, _ in recipe.overrides}
    return all(tensor.name in named or keeps_type(tensor, header.architecture) for tensor in header.tensors)
