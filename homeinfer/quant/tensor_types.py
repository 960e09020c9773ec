"""Which types a tensor can take: what llama.cpp leaves alone, what fits a row, what a type weighs."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from homeinfer.errors import HomeinferError
from homeinfer.model.header import TYPE_SIZES, TensorInfo, printable

IMATRIX_TYPES = frozenset(("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"))
"""Types that llama.cpp writes only with an imatrix (tensor_requires_imatrix)."""
ALWAYS_IMATRIX_TYPES = frozenset(("IQ2_XS", "IQ2_XXS", "IQ1_S"))
"""Those that need one for the embedding and the output as well (ggml_quantize_requires_imatrix)."""

_FTYPE_Q2_K_S = 21
_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj|ssm_conv1d"
    r"|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|attn_rel_b\.weight|^position_embd|^token_types"
    r"|time_mix_(first|[wav][012]|g[12]|decay_w[12]|lerp_fused)\.weight"
    r"|\.position_embd|sam\.pos_embd|sam\.neck\.|sam\.net_|\.rel_pos|\.patch_embd|\.patch_merger"
    r"|a\.rvq\.codebook|mm\.a\.code_embd"
)
_KEPT_GLM5_NEXT = re.compile(
    r"hc_|indexer\.attn_q_b|indexer\.attn_k|indexer\.proj|indexer_compressor_(gate|ape)|ssm_[fg]_[ab]\.weight"
    r"|ssm_beta\.weight|attn_kv_a_mqa\.weight|attn_[kv]_b\.weight"
)
_LAYER_TENSOR = re.compile(r"(?P<stack>(?:enc\.|dec\.)?)blk\.(?P<layer>\d+)\.(?P<role>.+)")

_SUBSTITUTES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
        **dict.fromkeys(("TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "Q2_K", "Q3_K", "Q4_K"), "IQ4_NL"),
        "Q5_K": "Q5_1",
        "Q6_K": "Q8_0",
        "NVFP4": "MXFP4",
    }
)
"""The 32-wide type of about the same bits and error. llama.cpp's tensor_type_fallback takes Q5_0 for
Q4_K and Q4_0 for Q3_K; IQ4_NL has Q4_K's 4.5 bits and 1.07 times its error on normal weights, Q4_0 1.2."""

TARGET_TYPES = (
    "F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "MXFP4", "NVFP4", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
    "TQ2_0", "TQ1_0", "Q2_0", "Q1_0",
)  # fmt: skip
"""Every type that llama.cpp can write (ggml_quantize_chunk)."""


def type_named(text: str) -> str:
    """The tensor type of that name, in any case; HomeinferError with the closest names when there is none."""
    wanted = text.strip().upper().replace("-", "_")
    if wanted in TARGET_TYPES:
        return wanted
    close = difflib.get_close_matches(wanted, TARGET_TYPES, n=3, cutoff=0.5)
    guess = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(TARGET_TYPES)}"
    raise HomeinferError(f"there is no tensor type '{printable(text, 40)}' to quantize to: {guess}")


def keeps_type(tensor: TensorInfo, architecture: str = "") -> bool:
    """Whether llama.cpp leaves this tensor as it is, as tensor_allows_quantization does: vectors,
    norms, biases, routers and other small tensors."""
    is_vector = all(extent == 1 for extent in tensor.shape[1:])
    if is_vector or not tensor.name.endswith("weight") or _KEPT.search(tensor.name):
        return True
    return architecture == "glm5-next" and _KEPT_GLM5_NEXT.search(tensor.name) is not None


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


def role_of(name: str) -> str:
    """A tensor's name without its layer and `.weight`: attn_q, ffn_down_exps, token_embd, attn_q.bias."""
    match = _LAYER_TENSOR.fullmatch(name)
    return (match["role"] if match else name).removesuffix(".weight")


def stack_and_layer(name: str) -> tuple[str, int] | None:
    """The stack ("", "enc." or "dec.") and the layer of a tensor; None for one outside the layers."""
    match = _LAYER_TENSOR.fullmatch(name)
    return (match["stack"], int(match["layer"])) if match else None


def misfit_note(misfits: Iterable[tuple[str, str]]) -> str:
    """One line on tensors that got another type because of their width: (wanted, got) of each."""
    counts = Counter(misfits)
    changes = ", ".join(f"{count} {got} for {wanted}" for (wanted, got), count in sorted(counts.items()))
    number = "1 tensor has" if counts.total() == 1 else f"{counts.total()} tensors have"
    return f"{number} rows that do not divide into the recipe's blocks: {changes}"


def needs_imatrix(name: str, type_name: str, ftype: int) -> bool:
    """Whether llama.cpp refuses to write this tensor as that type without an imatrix entry for it
    (tensor_requires_imatrix); ftype is the recipe's."""
    if name in ("token_embd.weight", "per_layer_token_embd.weight", "output.weight"):
        return type_name in ALWAYS_IMATRIX_TYPES
    return type_name in IMATRIX_TYPES or (type_name == "Q2_K" and ftype == _FTYPE_Q2_K_S)
