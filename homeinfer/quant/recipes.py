"""Which type each tensor gets: llama.cpp's presets by name, and recipes that name every tensor.

Pure functions from a model's header. What a preset makes of a model is llama.cpp's to say (its dry
run does, see quantize.py); DQ3_K_M lists a type for every tensor that llama.cpp would quantize.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import msgspec

from homeinfer.errors import HomeinferError
from homeinfer.model.header import TYPE_SIZES, Header, TensorInfo, printable


class Recipe(msgspec.Struct, frozen=True):
    """What to make of one model.

    ftype is llama.cpp's (enum llama_ftype), for `general.file_type` and for tensors without an
    override; overrides are (tensor, type); copy leaves every type as it is.
    """

    name: str
    ftype: int
    overrides: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    copy: bool = False


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

_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid|altup|laurel|per_layer_model_proj|ssm_conv1d"
    r"|shortconv\.conv\.|indexer\.[kq]_proj|attn_rel_b|position_embd|^token_types"
    r"|time_mix_(first|[wav][012]|g[12]|decay_w[12]|lerp_fused)\.weight"
)
_LAYER_TENSOR = re.compile(r"(?P<stack>(?:enc\.|dec\.)?)blk\.(?P<layer>\d+)\.(?P<role>.+)\.weight")

_SUBSTITUTES = {
    **dict.fromkeys(("Q2_K", "Q3_K", "IQ3_S", "IQ4_XS", "Q4_K"), "IQ4_NL"),
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""The 32-wide type of about the same bits and error. llama.cpp's tensor_type_fallback takes Q5_0 for
Q4_K and Q4_0 for Q3_K; IQ4_NL has Q4_K's 4.5 bits and 1.07 times its error on normal weights, Q4_0 1.2."""

_EVERY_MODEL = {
    **dict.fromkeys(("output", "attn_v", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b", "attn_v_b"), "Q6_K"),
    **dict.fromkeys(("token_embd", "per_layer_token_embd", "attn_output"), "Q4_K"),
    **dict.fromkeys(("attn_q", "attn_q_a", "attn_q_b", "attn_k"), "Q4_K"),
    "attn_qkv": "Q5_K",
}
_MIXTURE = {
    **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"), "Q3_K"),
    **dict.fromkeys(("ffn_gate_chexps", "ffn_up_chexps"), "Q3_K"),
    **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_gate_shexp", "ffn_up_shexp"), "Q4_K"),
    **dict.fromkeys(("ffn_down", "ffn_down_shexp", "ffn_down_chexps"), "Q6_K"),
}
_DENSE = dict.fromkeys(("ffn_gate", "ffn_up"), "Q3_K")
_SMALL_SHARE = 0.01


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


def keeps_type(tensor: TensorInfo) -> bool:
    """Whether llama.cpp leaves this tensor as it is, as tensor_allows_quantization does: vectors,
    norms, biases, routers and other small tensors."""
    is_vector = all(extent == 1 for extent in tensor.shape[1:])
    return is_vector or not tensor.name.endswith("weight") or _KEPT.search(tensor.name) is not None


def fitting_type(wanted: str, width: int) -> str:
    """The type nearest to `wanted` whose blocks a row of `width` weights can hold."""
    for type_name in (wanted, _SUBSTITUTES.get(wanted, "F16")):
        if width % TYPE_SIZES[type_name][0] == 0:
            return type_name
    return "F16"


def tensor_bytes(tensor: TensorInfo, type_name: str) -> int:
    """What the tensor's data takes as that type, in bytes."""
    weights, size = TYPE_SIZES[type_name]
    return tensor.n_weights // weights * size


def plan(header: Header, types: Iterable[tuple[str, str]]) -> tuple[PlannedTensor, ...]:
    """Every tensor of the model with its new type; those that `types` does not name keep theirs."""
    chosen = dict(types)
    return tuple(
        PlannedTensor(tensor.name, type_name, tensor_bytes(tensor, type_name))
        for tensor in header.tensors
        for type_name in (chosen.get(tensor.name, tensor.type),)
    )


def dq3_k_m(header: Header) -> Recipe:
    """DQ3_K_M (arXiv 2505.02390) as published for DeepSeek-shaped models, and a reading for others.

    The down projections that carry the super weights (the experts' in a mixture, the layers' own in
    a dense model) get Q6_K in the first two such layers, Q4_K in one of five of the rest, Q3_K in the
    others; gate and up beside them Q3_K; everything else 4 to 6 bits.
    """
    roles = {tensor.name: _role(tensor.name) for tensor in header.tensors if not keeps_type(tensor)}
    mixture = "ffn_down_exps" in roles.values()
    types = _EVERY_MODEL | (_MIXTURE if mixture else _DENSE)
    if header.tensor("output.weight") is None:
        types["token_embd"] = types["output"]
    down = _down_types(header, roles, "ffn_down_exps" if mixture else "ffn_down")
    small = _small_roles(header, roles)
    overrides, misfits = [], []
    for tensor in header.tensors:
        role = roles.get(tensor.name)
        if role is None:
            continue
        wanted = down.get(tensor.name) or types.get(role) or ("Q6_K" if role in small else "Q4_K")
        got = fitting_type(wanted, tensor.shape[0])
        overrides.append((tensor.name, got))
        if got != wanted:
            misfits.append((wanted, got))
    notes = [] if mixture and "attn_kv_a_mqa" in roles.values() else [_reading_note(header, mixture)]
    notes += [misfit_note(misfits)] if misfits else []
    return Recipe("DQ3_K_M", RECIPES["DQ3_K_M"].ftype, tuple(overrides), tuple(notes))


def misfit_note(misfits: Iterable[tuple[str, str]]) -> str:
    """One line on tensors that got another type because of their width: (wanted, got) of each."""
    counts = Counter(misfits)
    changes = ", ".join(f"{count} {got} for {wanted}" for (wanted, got), count in sorted(counts.items()))
    return f"{counts.total()} tensors have rows that do not divide into the recipe's blocks: {changes}"


def _role(name: str) -> str:
    match = _LAYER_TENSOR.fullmatch(name)
    return match["role"] if match else name.removesuffix(".weight")


def _down_types(header: Header, roles: Mapping[str, str], role: str) -> dict[str, str]:
    """Types of the down projections in layer order. Layers that predict further tokens (nextn) stand
    behind the model's own and take the lowest."""
    n_own = header.n_layer - int(header.arch_get("nextn_predict_layers", 0))
    layers = []
    for name in (name for name, its_role in roles.items() if its_role == role):
        match = _LAYER_TENSOR.fullmatch(name)
        if match:
            layers.append((match["stack"], int(match["layer"]), name))
    return {
        name: "Q3_K" if layer >= n_own else _down_type(index) for index, (_, layer, name) in enumerate(sorted(layers))
    }


def _down_type(index: int) -> str:
    if index < 2:
        return "Q6_K"
    return "Q4_K" if (index - 2) % 5 == 0 else "Q3_K"


def _small_roles(header: Header, roles: Mapping[str, str]) -> set[str]:
    """Roles whose tensors together hold less than a hundredth of the model's weights."""
    weights: Counter[str] = Counter()
    for tensor in header.tensors:
        if tensor.name in roles:
            weights[roles[tensor.name]] += tensor.n_weights
    return {role for role, count in weights.items() if count < _SMALL_SHARE * header.n_weights}


def _reading_note(header: Header, mixture: bool) -> str:
    kind = "mixture-of-experts" if mixture else "dense"
    return (
        f"DQ3_K_M was published for DeepSeek's models; for this {kind} {header.architecture} model it is "
        "homeinfer's reading of it"
    )
